"""Kills training runs with SIGKILL at random moments, resumes them, and compares them with an uninterrupted run.

    python benchmarks/kill_and_resume.py --merge dense --kills 20

Trains a tiny Llama in `transformers.Trainer` with dropout and shuffled data. It writes a checkpoint at every step and
keeps the last two, so that about half of the kills happen while a checkpoint is being written. For each kill, prints
when it happened and the largest difference of any weight from the uninterrupted run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import tempfile
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from scalora import ScaLoraCallback, ScaLoraConfig

STEPS = 40


def train(folder: Path, merge: str, started: multiprocessing.Event) -> None:
    """Train to the end from the last whole checkpoint, if there is one; runs in a process of its own.

    Args:
        folder: folder for checkpoints, log and final weights.
        merge: where the remainder goes, "dense" or "factored".
        started: set when training is about to start.
    """
    os.dup2(os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=False,
        )
    )
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1))
    ids = torch.randint(0, 64, (64, 8), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=4,
        max_steps=STEPS,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in ids]),
        callbacks=[ScaLoraCallback(ScaLoraConfig(warmup_steps=1, merge=merge))],
    )
    resume = (folder / "trainer").is_dir() and get_last_checkpoint(str(folder / "trainer")) is not None
    started.set()
    trainer.train(resume_from_checkpoint=resume)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "partial")
    (folder / "partial").rename(folder / "final.safetensors")


def run(folder: Path, merge: str, kill_after: float | None) -> tuple[bool, float]:
    """Run `train` in a separate process.

    Args:
        folder: folder of the run; continued if it has a checkpoint.
        merge: where the remainder goes, "dense" or "factored".
        kill_after: seconds of training before SIGKILL; None lets it finish.

    Returns:
        Whether it was killed, and the seconds it trained.
    """
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=train, args=(folder, merge, started))
    process.start()
    if not started.wait(120):
        raise SystemExit(f"training did not start: see {folder / 'log.txt'}")
    begin = time.perf_counter()
    process.join(kill_after)
    killed = process.is_alive()
    if killed:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    elif process.exitcode:
        raise SystemExit(f"training failed: {(folder / 'log.txt').read_text().splitlines()[-1]}")
    return killed, time.perf_counter() - begin


def difference(one: Path, other: Path) -> float:
    """Largest difference of any weight between two runs; infinite if their names or shapes differ."""
    a, b = load_file(one / "final.safetensors"), load_file(other / "final.safetensors")
    if a.keys() != b.keys() or any(a[key].shape != b[key].shape for key in a):
        return float("inf")
    return max((a[key] - b[key]).abs().max().item() for key in a if a[key].numel())


def main() -> None:
    """Print one line per kill, then the largest difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--merge", choices=["dense", "factored"], required=True, help="where the remainder goes")
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills (default: %(default)s)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    moments = random.Random(arguments.seed)
    worst, kills, attempts = 0.0, 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        alone = Path(scratch, "alone")
        _, seconds = run(alone, arguments.merge, None)
        print(f"left alone: {STEPS} steps in {seconds:.1f} s", flush=True)
        while kills < arguments.kills:
            folder, attempts = Path(scratch, str(attempts)), attempts + 1  # a run that beats its kill is discarded
            moment = moments.uniform(0.05, 0.95) * seconds
            killed, _ = run(folder, arguments.merge, moment)
            whole = get_last_checkpoint(str(folder / "trainer")) if (folder / "trainer").is_dir() else None
            if not killed:
                continue
            kills += 1
            run(folder, arguments.merge, None)
            aside = [path.name for path in (folder / "trainer").glob("incomplete-*")]
            worst = max(worst, change := difference(alone, folder))
            print(
                f"killed after {moment:.2f} s, last {whole and Path(whole).name}, aside {aside}: {change:.1e}",
                flush=True,
            )
    print(f"{kills} kills, {arguments.merge}: largest difference {worst:.1e}")


if __name__ == "__main__":
    main()
