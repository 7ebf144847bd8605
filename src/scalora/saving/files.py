"""Files and folders that appear whole or not at all, whatever goes wrong while they are written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, put in its place if all went well; gone if not.

    Raises:
        OSError: the disk is full, the folder is read-only, …; whatever was at `path` before is still there.
    """
    temporary = _temporary(path)
    try:
        with naming_errors(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty temporary folder beside `path`, put in its place if all went well; gone if not.

    Raises:
        OSError: as `atomic_write`.
    """
    temporary, earlier = _temporary(path), path.with_name(f".{path.name}.earlier")
    for leftover in (temporary, earlier):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with naming_errors(path):
            temporary.mkdir(parents=True)
            yield temporary
            if path.exists():
                path.rename(earlier)
            try:
                temporary.rename(path)
            except OSError:
                if earlier.exists():
                    earlier.rename(path)
                raise
    finally:
        for leftover in (temporary, earlier):
            shutil.rmtree(leftover, ignore_errors=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


@contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Make of whatever stops the writing an `OSError` that says what could not be written.

    A full disk alone has no name, what is written first has a temporary one, and safetensors has an error of its own.
    """
    prefix = "can't be written: "
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, prefix + str(error), str(path)) from None
    except OSError as error:
        reason = (error.strerror or str(error)).removeprefix(prefix)
        raise OSError(error.errno or errno.EIO, prefix + reason, str(path)) from None
