"""Answers that lm-evaluation-harness logs: the adapter by ``peft=``, the merged model and the base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from answers import NEW_TOKENS, serve

_TASK = """task: serving
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: completion
target_delimiter: ""
generation_kwargs: {{until: [], max_gen_toks: {tokens}, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def consume(job: dict[str, Any]) -> dict[str, list[str]]:
    """Write the prompts as a task, and have the command evaluate each model on it.

    Args:
        job: the job of `run.py`.
    """
    work = Path(job["work"])
    rows = [
        {"prompt": prompt, "completion": answer} for prompt, answer in zip(job["prompts"], job["right"], strict=True)
    ]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "serving.yaml").write_text(_TASK.format(file=json.dumps(str(work / "rows.jsonl")), tokens=NEW_TOKENS))
    return {
        "adapter": _answers(work, "adapter", f"pretrained={job['base']},peft={job['adapter']}"),
        "merged": _answers(work, "merged", f"pretrained={job['merged']}"),
        "base": _answers(work, "base", f"pretrained={job['base']}"),
    }


def _answers(work: Path, name: str, model: str) -> list[str]:
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"{model},dtype=float32"]
    command += ["--tasks", "serving", "--include_path", str(work), "--device", "cpu", "--batch_size", "1"]
    command += ["--log_samples", "--output_path", str(work / name)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise SystemExit(f"{' '.join(command)}\n{made.stderr[-1500:]}")
    (samples,) = work.joinpath(name).rglob("samples_serving_*.jsonl")
    logged = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: int(row["doc_id"]))
    return [row["resps"][0][0] for row in logged]


if __name__ == "__main__":
    serve(consume, "lm_eval", "peft", "transformers", "torch")
