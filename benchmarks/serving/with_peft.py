"""Answers of plain PEFT: the base that the adapter names, the adapter on a base, and the merged model."""

from __future__ import annotations

from typing import Any

from answers import answers_of, serve
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def consume(job: dict[str, Any]) -> dict[str, list[str]]:
    """Load each way, one model after the other.

    Args:
        job: the job of `run.py`.
    """
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    found = {"merged": answers_of(AutoModelForCausalLM.from_pretrained(job["merged"]), tokenizer, job)}
    base = AutoModelForCausalLM.from_pretrained(job["base"])
    found["base"] = answers_of(base, tokenizer, job)
    found["adapter: PeftModel"] = answers_of(PeftModel.from_pretrained(base, job["adapter"]), tokenizer, job)
    del base
    found["adapter: AutoPeftModel"] = answers_of(
        AutoPeftModelForCausalLM.from_pretrained(job["adapter"]), tokenizer, job
    )
    return found


if __name__ == "__main__":
    serve(consume, "peft", "transformers", "torch")
