"""Answers of what mergekit makes: the adapter merged into the base, and an adapter extracted from the merged model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from answers import answers_of, serve
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def consume(job: dict[str, Any]) -> dict[str, list[str]]:
    """Run both commands of mergekit, and load what they write.

    Args:
        job: the job of `run.py`.
    """
    work = Path(job["work"])
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": f"{job['base']}+{job['adapter']}"}],
        "dtype": "float32",
    }
    (work / "merge.yaml").write_text(json.dumps(recipe))
    _run("mergekit-yaml", work / "merge.yaml", work / "merged", "--lora-merge-cache", work / "cache")
    extracted = work / "extracted"
    options = ["--model", job["merged"], "--base-model", job["base"], "--out-path", extracted]
    _run("mergekit-extract-lora", *options, "--max-rank", job["rank"])
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    found = {
        "adapter: mergekit-yaml": answers_of(AutoModelForCausalLM.from_pretrained(work / "merged"), tokenizer, job)
    }
    base = AutoModelForCausalLM.from_pretrained(job["base"])
    found["base"] = answers_of(base, tokenizer, job)
    found["merged: mergekit-extract-lora"] = answers_of(PeftModel.from_pretrained(base, extracted), tokenizer, job)
    return found


def _run(name: str, *words: object) -> None:
    command = [str(Path(sys.executable).with_name(name)), *map(str, words)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise SystemExit(f"{' '.join(command)}\n{made.stderr[-1500:]}")


if __name__ == "__main__":
    serve(consume, "mergekit", "peft", "transformers", "torch")
