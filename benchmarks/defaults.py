"""Runs `scalora train` over a grid of settings and prints the table from which the library's defaults were chosen.

    python benchmarks/defaults.py recipes/classification.yaml runs/defaults.jsonl --seeds 0 1 \
        --grid training.learning_rate=1e-3,2e-3 --grid method=lora,scalora --model PATH

Unknown flags are passed to `scalora train` as overrides of the config. Each cell is one run in its own process;
finished cells are read from the results file and not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

_COLUMNS = ("train_loss", "eval_loss", "eval_accuracy")


def run_cell(config: str, settings: dict[str, str], overrides: list[str]) -> dict[str, float]:
    """Run one training; the training loss is the mean over the last quarter of the logged steps."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [word for key, value in settings.items() for word in (f"--{key}", value)]
        command = [sys.executable, "-m", "scalora", "train", config, *flags, *overrides]
        done = subprocess.run([*command, "--output_dir", f"{folder}/run"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
        logs = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    losses = [log["loss"] for log in logs if "loss" in log]
    result = {"train_loss": statistics.mean(losses[-(len(losses) // 4 or 1) :])}
    return result | {key: summary[key] for key in ("eval_loss", "eval_accuracy", "training_seconds") if key in summary}


def main() -> None:
    """Run the missing cells and print the mean over seeds of each setting."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="config file for scalora train")
    parser.add_argument("results", type=Path, help="jsonl file for the results of finished cells")
    parser.add_argument("--seeds", nargs="+", default=["0"], help="training seeds (default: 0)")
    parser.add_argument(
        "--grid", action="append", default=[], help="one axis of the grid as key=value,value,…; repeatable"
    )
    arguments, overrides = parser.parse_known_args()
    axes = {key: values.split(",") for key, values in (axis.split("=", 1) for axis in arguments.grid)}
    cells = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.touch()
    done = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    print("|", " | ".join([*axes, *_COLUMNS]), "|")
    for cell in cells:
        rows = []
        for seed in arguments.seeds:
            settings = cell | {"training.seed": seed}
            row = next((r for r in done if r["settings"] == settings), None)
            if row is None:
                row = {"settings": settings, **run_cell(arguments.config, settings, overrides)}
                with arguments.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            rows.append(row)
        means = [f"{statistics.mean(r[key] for r in rows):.4f}" for key in _COLUMNS if key in rows[0]]
        print("|", " | ".join([*cell.values(), *means]), "|", flush=True)


if __name__ == "__main__":
    main()
