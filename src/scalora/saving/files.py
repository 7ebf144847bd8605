"""Atomic writing of files and folders: they appear complete or not at all."""

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
    """Context manager to write a file atomically: yields a temporary path, and renames it on success.

    After an error the temporary file is removed, and a file that was at `path` before is unchanged.

    Args:
        path: the file to write, in a folder that exists; replaced if it exists.

    Raises:
        OSError: the file can't be written (the disk is full, the folder is read-only, …). The message names `path`.
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
    """Context manager to write a folder atomically: yields an empty temporary folder, and renames it on success.

    After an error the temporary folder is removed, and a folder that was at `path` before is unchanged.

    Args:
        path: the folder to write; replaced if it exists. Its parents are created.

    Raises:
        OSError: the folder can't be written (the disk is full, the parent is read-only, …). The message names `path`.
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
    """Context manager that turns write errors into an `OSError` with the path that the user knows.

    The error of a full disk names no file, other errors name the temporary file, and safetensors has its own error
    class.

    Args:
        path: the file or folder that is written.

    Raises:
        OSError: something in the context raised an `OSError` or a `SafetensorError`.
    """
    prefix = "can't be written: "
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, prefix + str(error), str(path)) from None
    except OSError as error:
        reason = (error.strerror or str(error)).removeprefix(prefix)
        raise OSError(error.errno or errno.EIO, prefix + reason, str(path)) from None
