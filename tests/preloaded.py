"""What the tests of several processes import, before these are forked."""

import contextlib

import accelerate  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import trl  # noqa: F401
from transformers import AutoModelForCausalLM, Trainer  # noqa: F401
from trl import SFTTrainer  # noqa: F401

import scalora.cli
import scalora.runs.evaluate
import scalora.runs.train  # noqa: F401

with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401
