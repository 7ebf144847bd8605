"""Answers of llama.cpp: base, adapter and merged model, converted by its own scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from answers import NEW_TOKENS, serve
from llama_cpp import Llama


def consume(job: dict[str, Any]) -> dict[str, list[str]]:
    """Convert base, adapter and merged model to GGUF in float32, and load each.

    Args:
        job: the job of `run.py`.
    """
    base, adapter, merged = (str(Path(job["work"], f"{name}.gguf")) for name in ("base", "adapter", "merged"))
    _convert("convert_hf_to_gguf.py", job["base"], base)
    _convert("convert_lora_to_gguf.py", job["adapter"], adapter, "--base", job["base"])
    _convert("convert_hf_to_gguf.py", job["merged"], merged)
    return {
        "adapter": _answers(job, model_path=base, lora_path=adapter),
        "merged": _answers(job, model_path=merged),
        "base": _answers(job, model_path=base),
    }


def _convert(script: str, source: str, target: str, *options: str) -> None:
    # The scripts are no part of the package: they are in its source, under vendor/llama.cpp.
    folder = Path(os.environ["LLAMA_CPP"])
    command = [sys.executable, str(folder / script), source, "--outfile", target, "--outtype", "f32", *options]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise SystemExit(f"{' '.join(command)}\n{made.stderr[-1500:]}")


def _answers(job: dict[str, Any], **options: str) -> list[str]:
    model = Llama(**options, n_ctx=1024, verbose=False)
    answers = []
    for tokens in job["tokens"]:
        model.reset()
        answer: list[int] = []
        for token in model.generate(tokens, temp=0.0, repeat_penalty=1.0):
            if token == job["end"] or len(answer) == NEW_TOKENS:
                break
            answer.append(token)
        answers.append(model.detokenize(answer, prev_tokens=tokens).decode(errors="replace"))
    return answers


if __name__ == "__main__":
    serve(consume, "llama-cpp-python", "gguf")
