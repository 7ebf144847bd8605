"""Takes a run folder for one run: checks it, locks it, and moves an earlier run aside. Deletes nothing of the user's.

A folder is a run's if it holds the file `MARKER`, which also carries the lock, or, from before there was a marker, only
files that runs have. The lock is the system's, so it ends with the process, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from scalora.parallel.job import is_first
from scalora.runs.errors import InputError
from scalora.runs.run_folder import (
    CONFIG_FILE,
    DIVERGED_FILE,
    ENVIRONMENT_FILE,
    STOPPED_FILE,
    SUMMARY_FILE,
    TRAINER,
    replace_text,
    write_json,
)
from scalora.runs.settings import Settings, run_settings
from scalora.runs.yaml_file import yaml_dump
from scalora.saving.files import swap

MARKER = ".scalora-run"

_MARK = "scalora: the folder of a run"

# What a run and the commands on it write into a run folder.
_OWN = {
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    TRAINER,
    "metrics.jsonl",
    "updates.jsonl",
    SUMMARY_FILE,
    DIVERGED_FILE,
    STOPPED_FILE,
    "delta",
    "adapter",
    "model",
    "export-adapter",
    "export-merged",
    "export-delta",
    "inspect.json",
    "report.html",
    "figures",
    "log.txt",
}

# What a run has written when it has not taken a step yet.
_BEFORE_THE_FIRST_STEP = {CONFIG_FILE, ENVIRONMENT_FILE, TRAINER, "metrics.jsonl", "updates.jsonl"}

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def check_run_folder(settings: Settings, *, overwrite: bool) -> None:
    """Check that a run may write its folder; changes nothing.

    Args:
        settings: the run's settings.
        overwrite: whether to move an earlier run's folder aside.

    Raises:
        InputError: the folder holds something and `overwrite` is False, it is not a run folder or must stay where it
            is, another run is using it, or it can't be written.
    """
    folder = Path(settings.output_dir)
    if not settings.output_dir.strip():
        raise InputError("output_dir is empty: name the folder to write")
    if folder.is_symlink() and not folder.exists():
        raise InputError(f"output_dir {str(folder)!r} is a link to {os.readlink(folder)!r}, which does not exist")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        inside = "" if existing == folder else f" is in {str(existing)!r}, which"
        raise InputError(f"output_dir {str(folder)!r}{inside} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"output_dir {str(folder)!r} can't be written: no permission for {str(existing)!r}")
    if existing != folder or not _holds_something(folder):
        return
    if not overwrite:
        ours = "choose another or add --overwrite" if is_run_folder(folder) else "it is no run folder: choose another"
        raise InputError(f"output_dir {str(folder)!r} is not empty: {ours}")
    if not is_run_folder(folder):
        raise InputError(f"output_dir {str(folder)!r} is not a run folder: not overwriting it")
    if (reason := why_not_movable(folder)) is not None:
        raise InputError(f"output_dir {str(folder)!r} can't be moved aside for --overwrite: {reason}; choose another")
    named = [("model", settings.model)]
    for key, names in (("data.train", settings.data.train), ("data.eval", settings.data.eval)):
        named += [(key, name) for name in ([names] if isinstance(names, str) else names or [])]
    if settings.reward.file is not None:
        named.append(("reward.file", settings.reward.file))
    for key, name in named:
        if Path(name).exists() and Path(name).resolve().is_relative_to(folder.resolve()):
            raise InputError(
                f"{key}={name!r} is in output_dir, which --overwrite moves aside: choose another output_dir"
            )


def is_run_folder(folder: Path) -> bool:
    """Whether scalora has made a folder, or taken an empty one, for a run.

    Args:
        folder: a folder that exists.
    """
    if _is_marked(folder / MARKER):
        return True
    names = {path.name for path in folder.iterdir() if not _is_leftover(path)}
    if not {CONFIG_FILE, ENVIRONMENT_FILE} <= names <= _OWN:
        return False
    try:
        run_settings(folder)
    except InputError:
        return False
    return True


def why_not_movable(folder: Path) -> str | None:
    """Why a folder must keep its name; None if it may be renamed.

    Args:
        folder: a folder that exists.
    """
    if folder.is_symlink():
        return f"it is a link to {os.readlink(folder)!r}"
    place = folder.resolve()
    for name, other in (("the working directory", Path.cwd()), ("the home folder", Path.home())):
        if other.resolve().is_relative_to(place):
            return f"it is {name}, or holds it"
    if folder.is_mount():
        return "a file system is mounted there"
    if os.path.lexists(folder / ".git"):
        return "it is a repository"
    if not os.access(place.parent, os.W_OK | os.X_OK):
        return f"no permission for {str(place.parent)!r}"
    return None


def move_aside(folder: Path) -> Path:
    """Rename a folder to ``NAME.earlier-N``, where nothing is yet.

    Args:
        folder: the folder.

    Returns:
        Its new path.

    Raises:
        InputError: the folder must keep its name.
    """
    if (reason := why_not_movable(folder)) is not None:
        raise InputError(f"{str(folder)!r} can't be moved aside: {reason}")
    aside = free_name(folder, "earlier")
    folder.rename(aside)
    return aside


def free_name(path: Path, what: str) -> Path:
    """A name beside a path that nothing has: ``NAME.WHAT-N``.

    Args:
        path: the path.
        what: a word that says what is there.
    """
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.{what}-{number}")):
        number += 1
    return aside


class Claim:
    """A run folder that is taken for this process. Only the first process of a job holds one.

    Args:
        settings: the run's settings, of which the output folder matters.

    Attributes:
        folder: the run folder.
    """

    def __init__(self, settings: Settings) -> None:
        self.folder = Path(settings.output_dir)
        self._locks = ExitStack()
        self._aside: Path | None = None
        self._begun = False
        self._taken = False
        self._holds_a_run = False
        self._new_folders = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self._new_inside = [path for path in (self.folder / TRAINER, self.folder / MARKER) if not path.exists()]

    def take(self) -> None:
        """Make the folder if there is none, lock it, and see whether there is an earlier run in it.

        Raises:
            InputError: another run has it, or it can't be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._locks.enter_context(_locked(self.folder))
            self._taken, self._holds_a_run = True, _holds_something(self.folder)
        except OSError as error:
            raise InputError(f"output_dir {str(self.folder)!r} can't be written: {error.strerror}") from None

    def begin(self, settings: Settings, environment: Mapping[str, Any]) -> None:
        """Write ``config.yaml`` and ``environment.json``; an earlier run in the folder is moved aside first.

        Args:
            settings: the run's settings.
            environment: the content of ``environment.json``.
        """
        if not self._holds_a_run:
            _write(self.folder, settings, environment)
            self._begun = True
            return
        aside = free_name(self.folder, "earlier")
        aside.mkdir()
        try:
            self._locks.enter_context(_locked(aside))
            _write(aside, settings, environment)
            swap(aside, self.folder)
        except BaseException:
            _discard(aside)
            raise
        self._aside, self._begun = aside, True
        print(f"the earlier run in {str(self.folder)!r} is now {str(aside)!r}", file=sys.stderr)

    def go_on(self, settings: Settings, environment: Mapping[str, Any]) -> None:
        """Write ``config.yaml`` and ``environment.json`` of a run that is resumed.

        Args:
            settings: the settings with which it goes on.
            environment: the content of ``environment.json``.
        """
        self._begun = True
        _write(self.folder, settings, environment)

    def undo(self) -> None:
        """Give a folder back whose run has not taken a step: an earlier run has its name again."""
        if self._aside is not None:
            swap(self._aside, self.folder)
            print(f"the earlier run is in {str(self.folder)!r} again", file=sys.stderr)
            _discard(self._aside)
        elif _remove_beginning(self.folder):
            self._begun = False

    def release(self) -> None:
        """Unlock the folder; if no run has begun in it, leave it as it was found."""
        if self._taken and not self._begun:
            for path in self._new_inside:
                with suppress(OSError):  # it is not there, or not empty
                    path.rmdir() if path.name == TRAINER else path.unlink()
        if not self._begun:
            for folder in self._new_folders:
                with suppress(OSError):
                    folder.rmdir()
        self._locks.close()


@contextmanager
def claimed(settings: Settings, *, overwrite: bool, resume: bool) -> Iterator[Claim]:
    """Context manager that holds a run folder from the first check to the end of the run.

    Args:
        settings: the run's settings.
        overwrite: whether to move an earlier run's folder aside.
        resume: whether the run in the folder is to go on.

    Raises:
        InputError: the folder can't be used; see `check_run_folder`.
    """
    if resume:
        run_settings(Path(settings.output_dir))
    else:
        check_run_folder(settings, overwrite=overwrite)
    claim = Claim(settings)
    try:
        claim.take()
        if not resume:
            check_run_folder(settings, overwrite=overwrite)  # again, now that nobody else changes it
        yield claim
    finally:
        claim.release()


def check_unused(folder: Path) -> None:
    """Raise `InputError` if a run is using a folder; changes nothing.

    Args:
        folder: the run folder; need not exist.
    """
    if is_first() and (folder / MARKER).is_file():
        with _locked(folder):
            pass


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    marker = folder / MARKER
    descriptor = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"output_dir {str(folder)!r} is in use by another run: wait until it ends, or choose another"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(f"{str(folder)!r} is on a file system without locks: run nothing else in it", stacklevel=2)
        if not marker.exists() or not os.path.samestat(os.fstat(descriptor), marker.stat()):
            raise InputError(f"output_dir {str(folder)!r} was moved aside by another run just now: try again")
        if not os.fstat(descriptor).st_size:
            os.write(descriptor, f"{_MARK}. With --overwrite it is moved aside as a whole.\n".encode())
        yield
    finally:
        os.close(descriptor)


def _is_marked(marker: Path) -> bool:
    try:
        text = "" if marker.is_symlink() else marker.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    # Empty if the process was killed when it had just made the file.
    return text.startswith(_MARK) or (not text and marker.is_file())


def _holds_something(folder: Path) -> bool:
    """Whether there is more than what a run that never began leaves behind."""
    nothing = {name for name, is_nothing in ((MARKER, _is_marked), (TRAINER, _is_empty)) if is_nothing(folder / name)}
    return any(path.name not in nothing for path in folder.iterdir())


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


def _is_leftover(path: Path) -> bool:
    """Whether a file was being written when the process was killed."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def _write(folder: Path, settings: Settings, environment: Mapping[str, Any]) -> None:
    (folder / TRAINER).mkdir(exist_ok=True)
    replace_text(folder / CONFIG_FILE, yaml_dump(settings.model_dump()))
    write_json(folder / ENVIRONMENT_FILE, environment)


def _discard(folder: Path) -> None:
    """Remove a folder that this process has made for a run that never took a step."""
    if _remove_beginning(folder):
        (folder / MARKER).unlink(missing_ok=True)
        folder.rmdir()


def _remove_beginning(folder: Path) -> bool:
    """Remove what a run writes before its first step; False if there is something else in its folder, which stays."""
    content = {path.name: path for path in folder.iterdir() if path.name != MARKER}
    if not content.keys() <= _BEFORE_THE_FIRST_STEP or (TRAINER in content and not _is_empty(content[TRAINER])):
        return False
    for path in content.values():
        if path.name == TRAINER:
            path.rmdir()
        else:
            path.unlink()
    return True
