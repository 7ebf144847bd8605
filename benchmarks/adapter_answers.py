"""Compares the answers of a run's merged model with those of its exported adapter on the original base.

    python benchmarks/adapter_answers.py RUN ADAPTER

Uses plain PEFT and Transformers: this process does not import scalora. Prints for how many prompts of the run's
evaluation data the greedy answers are the same, both losses on the completions, and the adapter's size and rank.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase


def load_base(name: str) -> Any:
    """Load a causal language model from a hub id, a folder or a GGUF file."""
    path = Path(name)
    if path.suffix == ".gguf":
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    return AutoModelForCausalLM.from_pretrained(name, dtype="float32")


@torch.no_grad()
def answers_and_loss(model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]) -> Any:
    """Greedy answers to the prompts, and the mean loss per token of the completions."""
    model.eval()
    tokenizer.padding_side = "left"
    answers, loss, count = [], 0.0, 0
    for start in range(0, len(rows), 10):
        prompts = [row["prompt"] for row in rows[start : start + 10]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        output = model.generate(**batch, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answers += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        loss += torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="sum").item()
        count += len(completion)
    return answers, loss / count


def main() -> None:
    """Load one model after the other, never two at once, and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("adapter", type=Path, help="folder of the adapter exported from it")
    arguments = parser.parse_args()
    config = yaml.safe_load((arguments.run / "config.yaml").read_text())
    rows = [json.loads(line) for line in Path(config["data"]["eval"]).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(arguments.run / "model")
    merged = AutoModelForCausalLM.from_pretrained(arguments.run / "model", dtype="float32")
    one, merged_loss = answers_and_loss(merged, tokenizer, rows)
    del merged
    adapted = PeftModel.from_pretrained(load_base(config["model"]), arguments.adapter)
    with adapted.disable_adapter():
        untouched, _ = answers_and_loss(adapted, tokenizer, rows[:10])
    other, adapter_loss = answers_and_loss(adapted, tokenizer, rows)
    same = sum(a == b for a, b in zip(one, other, strict=True))
    print(
        f"same answers: {same} of {len(rows)} (base: {sum(a == b for a, b in zip(one, untouched, strict=False))} of 10)"
    )
    print(f"loss: merged {merged_loss:.5f}, adapter {adapter_loss:.5f} ({adapter_loss / merged_loss - 1:+.3%})")
    if "scalora" in sys.modules:
        raise SystemExit("scalora was imported: this shows nothing")
    rank = json.loads((arguments.adapter / "adapter_config.json").read_text())["r"]
    size = (arguments.adapter / "adapter_model.safetensors").stat().st_size
    print(
        f"adapter: rank {rank}, {size / 1e6:.1f} MB; one of plain LoRA's rank {config['lora'].get('r', 8)} would be "
        f"{size / 1e6 * config['lora'].get('r', 8) / rank:.1f} MB"
    )


if __name__ == "__main__":
    main()
