"""What the consumers share: the job that `run.py` hands them, and greedy answers by Transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

NEW_TOKENS = 32


def serve(consume: Callable[[dict[str, Any]], dict[str, list[str]]], *packages: str) -> None:
    """Run a consumer: read the job that the command line names, and write what it answers beside it.

    Args:
        consume: answers of each way of loading, by its name. Takes the job: ``base``, ``adapter`` and ``merged`` are
            folders, ``prompts`` texts, ``tokens`` their ids, ``end`` the id of the end token, ``rank`` the adapter's,
            ``work`` a folder to work in.
        packages: what to report the versions of.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    result = {"answers": consume(job), "versions": {name: version(name) for name in packages}}
    Path(job["work"], "result.json").write_text(json.dumps(result))


def answers_of(model: Any, tokenizer: Any, job: dict[str, Any]) -> list[str]:
    """Greedy answers of a Transformers or PEFT model, one prompt at a time, so that nothing is padded.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        job: the job.
    """
    import torch

    model.eval()
    answers = []
    for tokens in job["tokens"]:
        output = model.generate(
            input_ids=torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=job["end"],
            pad_token_id=job["end"],
        )
        answers.append(tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True))
    return answers
