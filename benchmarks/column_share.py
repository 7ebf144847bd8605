"""Shows why a model's layers take the column or the scalar optimum: how many directions their columns really have.

    python benchmarks/column_share.py decoder runs/smollm2 runs/spelling/train.jsonl --batch 8
    python benchmarks/column_share.py encoder MODEL runs/cities/train.jsonl --batch 32

Trains with ScaLoRA (r = 8, all linear layers, AdamW at a constant learning rate). Every ten steps it prints the share
of layers that take each optimum, and the effective number of directions among the eight columns of A, B, G·B and Gᵀ·A:
the participation ratio of the squared singular values of the normalised columns, 8 if they are orthogonal and 1 if they
are parallel. All figures are means over layers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from scalora import ScaLora
from scalora.model.adapters import find_lora_pairs

_RANK, _RATE, _EVERY = 8, 4e-3, 10


def directions(columns: Tensor) -> float:
    """Participation ratio of the normalised columns; zero columns are ignored."""
    unit = torch.nn.functional.normalize(columns.double(), dim=0)
    energy = torch.linalg.svdvals(unit).square()
    return float(energy.sum().square() / energy.square().sum())


def decoder_batch(tokenizer: Any, rows: list[dict[str, str]]) -> dict[str, Tensor]:
    """Tokenise prompts and completions; labels cover only the completions."""
    batch = tokenizer([row["prompt"] + row["completion"] for row in rows], return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    for label, row in zip(labels, rows, strict=True):
        label[: len(tokenizer(row["prompt"]).input_ids)] = -100
    return {**batch, "labels": labels}


def encoder_batch(tokenizer: Any, rows: list[dict[str, str]], names: list[str]) -> dict[str, Tensor]:
    """Tokenise texts; labels are their classes."""
    batch = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    return {**batch, "labels": torch.tensor([names.index(row["label"]) for row in rows])}


def main() -> None:
    """Train, and print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["decoder", "encoder"], help="causal language model or text classifier")
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("data", type=Path, help="jsonl file with prompt and completion (decoder), or text and label")
    parser.add_argument("--batch", type=int, default=8, help="examples per step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.data.read_text(encoding="utf-8").splitlines()]
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if arguments.kind == "decoder":
        names, task = [], "CAUSAL_LM"
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    else:
        names, task = sorted({row["label"] for row in rows}), "SEQ_CLS"
        model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=len(names))
    adapter = LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules="all-linear", task_type=task)
    model = get_peft_model(model, adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=_RATE, weight_decay=0)
    engine = ScaLora(model, optimizer)
    pairs = find_lora_pairs(model)
    print("| step | column | scalar | A | B | G·B | Gᵀ·A |\n|---|---|---|---|---|---|---|")
    for step in range(1, arguments.steps + 1):
        part = [rows[i % len(rows)] for i in range((step - 1) * arguments.batch, step * arguments.batch)]
        batch = decoder_batch(tokenizer, part) if arguments.kind == "decoder" else encoder_batch(tokenizer, part, names)
        model(**batch).loss.backward()
        if step % _EVERY == 0:
            found = [
                [directions(x) for x in (p.lora_B.detach(), p.lora_A.detach().T, p.lora_B.grad, p.lora_A.grad.T)]
                for p in pairs
            ]
            means = " | ".join(f"{mean:.1f}" for mean in torch.tensor(found).mean(0))
            shares = engine.metrics()  # of the previous rescale; none during warm-up
            column, scalar = (shares.get(f"scalora/{kind}_share", float("nan")) for kind in ("column", "scalar"))
            print(f"| {step} | {column:.0%} | {scalar:.0%} | {means} |", flush=True)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
