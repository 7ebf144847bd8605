"""Atomic writing of files and folders: whatever ends the process, what was there before is there, or what is new.

Each writer has a temporary name of its own, hidden and in the same folder, so that processes that write at the same
time don't write into each other's file.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# Of renameat2 in Linux and renamex_np in macOS, which Python's os has no names for.
_AT_FDCWD, _EXCHANGE = -100, 2

# A file system, or a system, that can't do it.
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Context manager to write a file atomically: yields a temporary path, and renames it on success.

    After an error the temporary file is removed, and a file that was at `path` before is unchanged. A link is followed:
    what it leads to is written, and the link stays.

    Args:
        path: the file to write, in a folder that exists; replaced if it exists.

    Raises:
        OSError: the file can't be written (the disk is full, the folder is read-only, it is a device, …). The message
            names `path`.
    """
    target = path.resolve() if path.is_symlink() else path
    temporary = temporary_beside(target)
    try:
        with naming_errors(path):
            if target.exists() and not target.is_file() and not target.is_dir():
                raise OSError(errno.EINVAL, "it is not a regular file")
            yield temporary
            _sync(temporary)
            os.replace(temporary, target)
            _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Context manager to write a folder atomically: yields an empty temporary folder, and renames it on success.

    After an error the temporary folder is removed, and a folder that was at `path` before is unchanged.

    Args:
        path: the folder to write. Its parents are created.
        replace: whether a folder at `path` that is not empty is replaced, and then removed. By default it is an error,
            because the folder may hold files of the user's.

    Raises:
        OSError: the folder can't be written (the disk is full, the parent is read-only, `path` is a link, …). The
            message names `path`.
    """
    temporary = temporary_beside(path)
    try:
        with naming_errors(path):
            _require_free(path, replace)
            temporary.mkdir(parents=True)
            yield temporary
            for item in temporary.rglob("*"):
                if not item.is_symlink():
                    _sync(item)
            _sync(temporary)
            if replace and path.exists():
                swap(temporary, path)
            else:
                temporary.rename(path)
                _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def swap(new: Path, path: Path) -> None:
    """Exchange the names of two folders in one step, so that there is always a folder at `path`.

    Where the system can't, it takes three renames. A process that is killed between them leaves both folders complete,
    one of them under a hidden name beside `path`.

    Args:
        new: the one folder, in the same file system.
        path: the other folder.

    Raises:
        OSError: a folder can't be renamed; both have the names that they had.
    """
    if not _exchanged(new, path):
        third = temporary_beside(path)
        path.rename(third)
        try:
            new.rename(path)
        except OSError:
            third.rename(path)
            raise
        third.rename(new)
    _sync(path.parent)


def temporary_beside(path: Path) -> Path:
    """A name that no other writer has: hidden, in the same folder, with the name of what is written.

    Args:
        path: the file or folder that is written.
    """
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


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


def _require_free(path: Path, replace: bool) -> None:
    if path.is_symlink():
        raise OSError(errno.EEXIST, f"it is a link to {os.readlink(path)!r}, which is not replaced")
    if path.is_dir() and not replace and any(path.iterdir()):
        raise OSError(errno.EEXIST, "there is a folder that is not empty")
    if path.exists() and not path.is_dir():
        raise OSError(errno.EEXIST, "there is a file")


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names at once; False if the system or the file system can't."""
    if os.name == "nt":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        failed = libc.renamex_np(*names, ctypes.c_uint(_EXCHANGE))
    elif hasattr(libc, "renameat2"):
        failed = libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_EXCHANGE))
    else:
        return False
    if failed and (number := ctypes.get_errno()) not in _UNSUPPORTED:
        raise OSError(number, os.strerror(number), str(other))
    return not failed


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before anything relies on them."""
    if os.name == "nt":  # which syncs neither folders nor files that are open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # some file systems don't sync folders
            raise
    finally:
        os.close(descriptor)
