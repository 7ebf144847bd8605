"""Scores models three ways: by lm-evaluation-harness's command, by `scalora evaluate --harness`, and by our own scorer.

    python benchmarks/serving/agreement.py MODEL [MODEL ...] --rows ROWS --work FOLDER [--python PYTHON] [--limit N]

Each MODEL is the folder of a merged model or of an exported adapter, ROWS the demo's evaluation data (JSON lines with a
prompt and a completion, which is a list of words). From them it makes three tasks, of one file of data: answers
(exact_match), the choice among orders of the words (acc, acc_norm), and the likelihood of the completion (loss). PYTHON
is that of an environment with lm_eval[hf] and peft for the harness's own command (default: this one). Prints a table in
Markdown, and exits with 1 where a score differs, or an example's log-likelihood does by more than rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig
from transformers import AutoTokenizer

PATTERN = r"^\s*([^\n]*)"
"""What is compared of an answer, as in recipes/demo/demo.yaml: its first line."""

NEW_TOKENS = 32

# Log-likelihoods of float32 models in padded batches and in others: they differ in the last digits.
_ROUNDING = 1e-3

_COMMON = {"test_split": "test", "dataset_path": "json", "doc_to_text": "prompt", "target_delimiter": ""}

TASKS: dict[str, dict[str, Any]] = {
    "agreement_answers": {
        "output_type": "generate_until",
        "doc_to_target": "{{completion.strip()}}",
        "generation_kwargs": {"until": [], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        "filter_list": [
            {
                "name": "first_line",
                "filter": [{"function": "regex", "regex_pattern": PATTERN}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "agreement_choices": {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    },
    "agreement_likelihood": {
        "output_type": "loglikelihood",
        "doc_to_target": "ended",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
}


def with_choices(rows: list[dict[str, Any]], end: str) -> list[dict[str, Any]]:
    """Examples for all three tasks: the completion, several orders of its words, and itself with the end token.

    Args:
        rows: prompts and completions.
        end: the end token, which training puts after a completion.
    """
    examples = []
    for number, row in enumerate(rows):
        words = row["completion"].strip().split(", ")
        start = row["completion"][: -len(", ".join(words))]
        orders = [words, words[::-1], sorted(words), words[1:] + words[:1]]
        choices = list(dict.fromkeys(start + ", ".join(order) for order in orders))
        answer = number % len(choices)  # so that the right one is not always the first
        choices.insert(answer, choices.pop(0))
        ended = row["completion"] + end
        examples.append({**row, "choices": choices, "answer": answer, "ended": ended})
    return examples


def write_tasks(examples: list[dict[str, Any]], folder: Path) -> Path:
    """Write the data and the task files of the harness.

    Args:
        examples: the examples of `with_choices`.
        folder: folder for them, which exists.

    Returns:
        The file of the data.
    """
    data = folder / "examples.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for example in examples))
    for name, task in TASKS.items():
        files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **_COMMON, **files, **task}))
    return data


def own_config(data: Path) -> dict[str, Any]:
    """The config by which our own scorer does the same.

    Args:
        data: the file of the data.
    """
    metrics = ["loss", "exact_match", "multiple_choice"]
    evaluate = {"metrics": metrics, "max_new_tokens": NEW_TOKENS, "answer_pattern": PATTERN}
    return {"model": "unused", "data": {"eval": str(data)}, "evaluate": evaluate}


def of_harness(
    results: dict[str, Any], samples: dict[str, list[dict[str, Any]]], tokens: int
) -> tuple[dict[str, float], list[float]]:
    """What the harness found, under our names, and the log-likelihood of each choice of each example.

    Args:
        results: its scores by task.
        samples: its outputs by task.
        tokens: number of tokens of all completions, with their ends.
    """
    choices = sorted(samples["agreement_choices"], key=lambda row: int(row["doc_id"]))
    total = sum(float(row["resps"][0][0][0]) for row in samples["agreement_likelihood"])
    scores = {
        "exact_match": results["agreement_answers"]["exact_match,first_line"],
        "acc": results["agreement_choices"]["acc,none"],
        "acc_norm": results["agreement_choices"]["acc_norm,none"],
        "loss": -total / tokens,
    }
    return scores, [float(answer[0][0]) for row in choices for answer in row["resps"]]


def completion_tokens(tokenizer: Any, examples: list[dict[str, Any]]) -> int:
    """Number of tokens of all completions with their ends, as both tokenise them: what the whole has more.

    Args:
        tokenizer: the model's tokenizer.
        examples: the examples of `with_choices`.
    """
    lengths = (
        len(tokenizer(row["prompt"] + row["ended"])["input_ids"]) - len(tokenizer(row["prompt"])["input_ids"])
        for row in examples
    )
    return sum(lengths)


def main() -> None:
    """Score each model, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders of merged models and adapters")
    parser.add_argument("--rows", type=Path, required=True, help="prompts and completions, JSON lines")
    parser.add_argument("--work", type=Path, required=True, help="folder for data, tasks and outputs; must not exist")
    parser.add_argument("--python", default=sys.executable, help="of the environment of the harness's command")
    parser.add_argument("--limit", type=int, help="number of rows (default: all)")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True)
    rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()[: arguments.limit]]
    print(
        "| model | score | lm_eval | scalora evaluate --harness | scalora evaluate |\n| --- | --- | --- | --- | --- |"
    )
    different = []
    for model in arguments.models:
        folder = (arguments.work / model.resolve().parent.name / model.name).resolve()
        folder.mkdir(parents=True)
        tokenizer = AutoTokenizer.from_pretrained(model)
        examples = with_choices(rows, tokenizer.eos_token)
        data = write_tasks(examples, folder)
        tokens = completion_tokens(tokenizer, examples)
        found = {
            "lm_eval": of_harness(*_by_its_command(arguments.python, model, folder), tokens),
            "--harness": of_harness(*_by_our_command(model, folder), tokens),
            "own": _own(model, folder, data),
        }
        for score in found["own"][0]:
            values = [scores[score] for scores, _ in found.values()]
            print(f"| {model} | {score} | " + " | ".join(f"{value:.6g}" for value in values) + " |", flush=True)
            if max(values) - min(values) > (_ROUNDING if score == "loss" else 0):
                different.append(f"{score} of {model}")
        likelihoods = [each for _, each in found.values()]
        apart = max(max(same) - min(same) for same in zip(*likelihoods, strict=True))
        print(f"{len(likelihoods[0])} log-likelihoods of {model}: at most {apart:.1e} apart", file=sys.stderr)
        if apart > _ROUNDING:
            different.append(f"log-likelihoods of {model}")
    print(
        ", ".join(f"{name} {version(name)}" for name in ("lm_eval", "transformers", "peft", "torch")), file=sys.stderr
    )
    if different:
        raise SystemExit(f"not the same: {'; '.join(different)}")


def _by_its_command(python: str, model: Path, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    loaded = f"pretrained={model.resolve()}"
    if (model / "adapter_config.json").is_file():
        base = PeftConfig.from_pretrained(model).base_model_name_or_path
        loaded = f"pretrained={base},peft={model.resolve()}"
    words = [python, "-m", "lm_eval", "--model", "hf", "--model_args", f"{loaded},dtype=float32"]
    words += ["--tasks", ",".join(TASKS), "--include_path", str(folder), "--batch_size", "16"]
    _run([*words, "--log_samples", "--output_path", str(folder / "lm_eval")])
    (results,) = (folder / "lm_eval").rglob("results_*.json")
    samples = {name: next((folder / "lm_eval").rglob(f"samples_{name}_*.jsonl")) for name in TASKS}
    return json.loads(results.read_text())["results"], {name: _lines(path) for name, path in samples.items()}


def _by_our_command(model: Path, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    output = folder / "harness"
    words = [sys.executable, "-m", "scalora", "evaluate", str(model), "--dtype", "float32"]
    for setting in (f"tasks={','.join(TASKS)}", f"include_path={folder}", "batch_size=16"):
        words += ["--harness", setting]
    _run([*words, "--output", str(output)])
    samples = {name: _lines(output / f"samples_{name}.jsonl") for name in TASKS}
    return json.loads((output / "results.json").read_text())["results"], samples


def _own(model: Path, folder: Path, data: Path) -> tuple[dict[str, float], list[float]]:
    config, output = folder / "own.yaml", folder / "own"
    config.write_text(yaml.safe_dump(own_config(data)))
    _run([sys.executable, "-m", "scalora", "evaluate", str(model), str(config), "--output", str(output)])
    found = json.loads((output / "results.json").read_text())
    rows = _lines(output / "samples_multiple_choice.jsonl")
    scores = {name: found[name] for name in ("exact_match", "acc", "acc_norm", "loss")}
    return scores, [each for row in rows for each in row["log_likelihoods"]]


def _run(command: list[str]) -> None:
    print("$", *command, file=sys.stderr, flush=True)
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=sys.stderr)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
