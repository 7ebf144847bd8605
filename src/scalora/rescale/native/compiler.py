"""Compiles `native.cpp` once for each version of PyTorch and kind of processor, and loads what was compiled.

One call of the compiler, without torch's own builder, which wants ninja in the process's PATH and waits for a lock that
a killed build leaves behind. What is loaded lies in a folder that nobody else can write to.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("native.cpp")

# By what PyTorch finds the processor capable of, not what the compiler does: machines may share a cache.
_INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": (*(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")), "-mfma", "-mprefer-vector-width=512"),
}

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class NativeBuildError(ValueError):
    """``native=True`` where the C++ can't be compiled or loaded; the message says why and what to do."""


@functools.cache
def load_operations() -> None:
    """Make ``torch.ops.scalora`` available; compiles for some ten seconds if this has not been done before.

    Raises:
        NativeBuildError: there is no compiler, or it fails, or others could write to the cache.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    content = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]
    name = re.sub(r"\W", "_", f"scalora_{content}_{torch.__version__}_{capability}".lower())
    try:
        library = _cache() / f"{name}.so"
        if not library.exists():
            _compile(library, _INSTRUCTIONS.get(capability, ()))
        _require_private(library)
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeBuildError(
            f"native=True: the C++ can't be compiled ({_reason(error)}): install g++ or clang++, and scalora[native] "
            "with pip, or leave native out"
        ) from None


def _cache() -> Path:
    """The user's own cache folder, made if it is not there."""
    try:
        from platformdirs import user_cache_path
    except ImportError as error:
        raise OSError(str(error)) from None
    folder = user_cache_path("scalora") / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_private(folder)
    return folder


def _require_private(path: Path) -> None:
    """Refuse a file or folder that another user owns, could write to, or could put another in place of."""
    own = path.stat()
    if own.st_uid != os.getuid() or own.st_mode & _WRITABLE_BY_OTHERS:
        raise NativeBuildError(
            f"native=True: code is not loaded from {str(path)!r}, which other users own or can write to: run "
            f"`chmod go-w` on it, or choose another cache folder with XDG_CACHE_HOME"
        )
    for parent in path.resolve().parents:
        mode = parent.stat().st_mode
        if mode & _WRITABLE_BY_OTHERS and not mode & stat.S_ISVTX:
            raise NativeBuildError(
                f"native=True: code is not loaded from {str(path)!r}, because other users can write to "
                f"{str(parent)!r}: run `chmod go-w` on that, or choose another cache folder with XDG_CACHE_HOME"
            )


def _compile(library: Path, instructions: tuple[str, ...]) -> None:
    """Compile beside the target and put the result in its place, so that it is there whole or not at all."""
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled = Path(folder) / library.name
        subprocess.run(
            [
                *shlex.split(os.environ.get("CXX", "c++")),
                *("-std=c++20", "-O3", "-fopenmp", "-ffp-contract=fast", "-fPIC", "-shared", *instructions),
                f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
                f"-isystem{torch_folder / 'include'}",
                str(_SOURCE),
                *("-o", str(compiled), f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"),
            ],
            check=True,
            capture_output=True,
            text=True,
        )
        compiled.chmod(0o600)
        compiled.replace(library)


def _reason(error: Exception) -> str:
    """One line: of what the compiler printed, the first that names an error."""
    lines = (getattr(error, "stderr", None) or str(error) or type(error).__name__).splitlines()
    return next((line for line in lines if "error" in line or "not found" in line), lines[0]).strip()
