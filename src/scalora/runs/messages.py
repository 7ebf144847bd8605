"""Keeps the terminal to what concerns the user's run: every warning once, in one line, and no chatter of libraries."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from scalora.parallel.job import is_first

# Log messages that say nothing about the run, by the logger that they come from and a text that they contain.
_CHATTER = (
    # PEFT imports it; the message is about an optional speed-up of 4-bit models on some CPUs, whatever the model is.
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
    # The model is told the tokenizer's special tokens, which is what training needs.
    ("transformers.trainer_utils", "The tokenizer has new PAD/BOS/EOS tokens"),
    # What a resumed run does differently, which `scalora.runs.resume` checks and records.
    ("transformers.trainer_utils", "The following arguments do not match the ones in the `trainer_state.json`"),
    # A table of weights that a model lacks, which `scalora.runs.models` says in one line where it matters, and of those
    # that it does not need.
    ("transformers.modeling_utils", "LOAD REPORT"),
)

# Python warnings that say nothing about the run: category, and a regular expression for the beginning of the message.
_IRRELEVANT: tuple[tuple[type[Warning], str], ...] = (
    # TRL and PEFT still use the old names of activation checkpointing, which work until Transformers 6.
    (FutureWarning, r"`(is_)?gradient_checkpointing\w*` is deprecated"),
    # How bitsandbytes' 8-bit layers compute, on any data.
    (UserWarning, r"MatMul8bitLt: inputs will be cast"),
)

# What these libraries log about retries, and about errors that they also raise, would bury the one line of the error.
_QUIETER = {"huggingface_hub": ("HF_HUB_VERBOSITY", "error"), "datasets": ("DATASETS_VERBOSITY", "critical")}

# What writes warnings past the handlers of this module, which leave those of all but the first process of a job out.
_QUIETER_IN_OTHERS = {"transformers": ("TRANSFORMERS_VERBOSITY", "error")}

_until_the_end = ExitStack()


@contextmanager
def only_relevant_messages() -> Iterator[None]:
    """Show warnings, logged or not, as lines ``warning: …``, each once, and leave out chatter.

    Progress bars of libraries appear only on a terminal, only if what they stand for takes longer than two seconds, and
    vanish at the end. This takes effect only if tqdm has not been imported yet.
    """
    for option, value in _tqdm_options().items():
        os.environ.setdefault(f"TQDM_{option}", value)
    for library, (variable, level) in (_QUIETER | ({} if is_first() else _QUIETER_IN_OTHERS)).items():
        # The variable for a library that is imported later, which sets its own level then.
        logging.getLogger(library).setLevel(os.environ.setdefault(variable, level).upper())
    lines = _Lines()
    with ExitStack() as stack:
        for logger, message in _CHATTER:
            stack.enter_context(without_message(logger, message))
        stack.enter_context(warnings.catch_warnings())
        for category, pattern in _IRRELEVANT:
            warnings.filterwarnings("ignore", pattern, category)
        warnings.showwarning = lines.show_warning
        root = logging.getLogger()
        root.addHandler(lines)
        stack.callback(root.removeHandler, lines)
        yield


def only_relevant_messages_from_now_on() -> None:
    """Enter `only_relevant_messages` for the rest of a process, as a process that a command starts does first."""
    _until_the_end.enter_context(only_relevant_messages())


@contextmanager
def without_message(logger: str, message: str) -> Iterator[None]:
    """Leave out a message that a library logs.

    Args:
        logger: name of the logger that it comes from.
        message: text that it contains, before its arguments are filled in.
    """

    def is_another(record: logging.LogRecord) -> bool:
        return message not in str(record.msg)

    logging.getLogger(logger).addFilter(is_another)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(is_another)


class _Lines(logging.Handler):
    """Writes warnings to standard error, each text once and in one line."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a logged warning or error."""
        self._show(record.getMessage())

    def show_warning(self, message: Warning | str, *args: Any, **kwargs: Any) -> None:
        """Write a Python warning, without the place in the code that it comes from."""
        self._show(str(message))

    def _show(self, text: str) -> None:
        line = " ".join(text.split())
        if line not in self._shown and is_first():  # the others of a job have the same to say
            self._shown.add(line)
            print(f"warning: {line}", file=sys.stderr)


def _tqdm_options() -> dict[str, str]:
    """Defaults of tqdm's arguments, which it reads from the environment when it is imported."""
    return {"DELAY": "2", "LEAVE": ""} if sys.stderr.isatty() else {"DISABLE": "1"}
