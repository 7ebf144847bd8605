"""What GRPO rewards: functions of a Python file that the config names, or a regular expression."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from scalora.runs.errors import InputError
from scalora.runs.sections import RewardSettings
from scalora.saving.errors import short_repr

Reward = Callable[..., list[float | None]]
"""Called by TRL with ``prompts``, ``completions`` and the columns of the data, each a list; returns a number for each
completion, or None where it has none to give."""

_SHOWN = 60  # characters of a value that an error shows


def reward_functions(reward: RewardSettings, columns: Sequence[str]) -> list[Reward]:
    """The functions that reward answers. Executes the file that the config names, if it names one.

    Args:
        reward: the section ``reward`` of the config.
        columns: columns of the data, which must have that of the right answers.

    Raises:
        InputError: the file can't be executed, it has no such function, or the column is missing.
    """
    if reward.file is not None:
        found = _executed(reward.file)
        return [_from_file(found, name, reward.file) for name in reward.functions]
    if reward.answer is not None and reward.answer not in columns:
        raise InputError(
            f"reward.answer={reward.answer!r}: the data have no such column; they have {', '.join(columns)}"
        )
    return [_pattern_reward(re.compile(reward.pattern or ""), reward.answer)]


def reward_digest(reward: RewardSettings) -> str | None:
    """Identifies the file of the reward functions by what is in it; None without a file.

    Args:
        reward: the section ``reward`` of the config.

    Raises:
        InputError: the file can't be read.
    """
    if reward.file is None:
        return None
    try:
        return hashlib.sha256(Path(reward.file).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"reward.file={reward.file!r} can't be read: {error}") from None


def _executed(name: str) -> Any:
    path = Path(name)
    if not path.is_file() or path.suffix != ".py":
        raise InputError(f"reward.file={name!r} {'must end in .py' if path.is_file() else 'does not exist'}")
    # Under a name by which pickle and dataclasses find it again, and which hides no other module.
    module_name = f"scalora_rewards_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # whatever the user's own code raises, sys.exit included
        del sys.modules[module_name]
        if isinstance(error, KeyboardInterrupt):
            raise
        line = getattr(error, "lineno", None) or _line(error, name)
        where = f", line {line}" if line else ""
        raise InputError(f"reward.file={name!r}{where}: {type(error).__name__}: {error}") from error
    return module


def _from_file(module: Any, name: str, file: str) -> Reward:
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        raise InputError(f"reward.functions: {file!r} has no function {name!r}; it has {', '.join(known) or 'none'}")
    if inspect.iscoroutinefunction(function):
        raise InputError(f"reward.functions: {name!r} of {file!r} is asynchronous: write it with def alone")

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> list[float | None]:
        try:
            rewards = function(*args, **kwargs)
        except Exception as error:  # whatever the user's own code raises
            line = _line(error, file)
            where = f", line {line}" if line else ""
            raise InputError(
                f"reward function {name!r} of {file!r}{where} failed: {type(error).__name__}: {error}"
            ) from error
        return _numbers(rewards, len(kwargs["completions"]), name, file)

    checked.__name__ = name  # what TRL calls its metrics after
    return checked


def _numbers(rewards: Any, count: int, name: str, file: str) -> list[float | None]:
    """What a function returned, if it is one number per completion."""
    try:
        found = [None if value is None else float(value) for value in rewards]
    except (TypeError, ValueError):
        raise InputError(
            f"reward function {name!r} of {file!r} returned {short_repr(rewards, _SHOWN)}, not a list of numbers"
        ) from None
    if len(found) != count:
        raise InputError(
            f"reward function {name!r} of {file!r} returned {len(found)} rewards for {count} completions: it must "
            "return one for each"
        )
    if any(value is not None and not math.isfinite(value) for value in found):
        raise InputError(f"reward function {name!r} of {file!r} returned a number that is not finite")
    return found


def _pattern_reward(pattern: re.Pattern[str], answer: str | None) -> Reward:
    def matches(completions: list[Any], **columns: list[Any]) -> list[float | None]:
        found = [pattern.search(_text(completion)) for completion in completions]
        if answer is None:
            return [float(match is not None) for match in found]
        return [
            float(match is not None and _matched(match) == str(right).strip())
            for match, right in zip(found, columns[answer], strict=True)
        ]

    matches.__name__ = "pattern"
    return matches


def _matched(match: re.Match[str]) -> str:
    """The first group, or the whole match if there is no group."""
    return (match[1] or "" if match.re.groups else match[0]).strip()


def _text(completion: Any) -> str:
    """A completion, or what the messages say that a conversation was completed with."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion)


def _line(error: BaseException, file: str) -> int | None:
    """The line of a file in which an error was raised."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == Path(file):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
