"""`kernels` in C++, for CPUs: each operation takes all layers at once and passes once over memory.

PyTorch's own operations are the reference. What they alone can do (other dtypes, transposed weights, factored
remainders, other devices) is left to them.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.maths.scaling import Grams
from scalora.rescale import kernels
from scalora.rescale.remainder import DenseRemainder, Remainder

_SOURCE = Path(__file__).with_name("native.cpp")

# By what PyTorch finds the processor capable of, and not what the compiler does: a build folder may be shared.
_INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": (*(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")), "-mfma", "-mprefer-vector-width=512"),
}


class NativeBuildError(ValueError):
    """``native=True`` where the C++ can't be compiled; the message says why and what to do."""


@functools.cache
def build() -> kernels.Kernels:
    """Compile and load them, once for each version of PyTorch and kind of processor: some ten seconds the first time.

    Raises:
        NativeBuildError: there is no compiler, or it fails.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    # torch itself looks at times of change only, and would load what was built for another version of either.
    content = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]
    name = re.sub(r"\W", "_", f"scalora_{content}_{torch.__version__}_{capability}".lower())
    path = os.environ.get("PATH", "")
    # Where pip puts ninja; it is not in the PATH of a virtual environment that is used without being activated.
    os.environ["PATH"] = os.pathsep.join([path, sysconfig.get_path("scripts")])
    try:
        # Here, because they want what nothing else does (setuptools, filelock).
        from filelock import FileLock
        from torch.utils import cpp_extension

        folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / name
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "building"):
            # torch's own lock, which outlives a process that was killed and is then waited for without an end.
            (folder / "lock").unlink(missing_ok=True)
            cpp_extension.load(
                name,
                [str(_SOURCE)],
                extra_cflags=["-O3", "-fopenmp", "-ffp-contract=fast", *_INSTRUCTIONS.get(capability, ())],
                build_directory=str(folder),
                is_python_module=False,
            )
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        # Of what the compiler printed, below its long command.
        reason = next((line for line in lines[1:] if "error" in line or "not found" in line), lines[0])
        raise NativeBuildError(
            f"native=True: the C++ can't be compiled ({reason.strip()}): install g++ or clang++, and "
            "scalora[native] by pip, or leave native out"
        ) from None
    finally:
        os.environ["PATH"] = path
    return kernels.Kernels(grams, merge, expand_factors, multiply)


def grams(
    lora_B: Sequence[Float[Tensor, "m r"]],
    grad_B: Sequence[Float[Tensor, "m r"]],
    lora_A: Sequence[Float[Tensor, "r n"]],
    grad_A: Sequence[Float[Tensor, "r n"]],
) -> Grams:
    """As `kernels.grams`."""
    if not _are_plain(lora_B, grad_B, lora_A, grad_A):
        return kernels.grams(lora_B, grad_B, lora_A, grad_A)
    return Grams(*torch.ops.scalora.grams(lora_B, grad_B, lora_A, grad_A))


def merge(
    remainders: Sequence[Remainder],
    weights: Sequence[Tensor],
    lora_B: Sequence[Float[Tensor, "m r"]],
    lora_A: Sequence[Float[Tensor, "r n"]],
    coefficients: Float[Tensor, "layers r"],
) -> None:
    """As `kernels.merge`."""
    upright = [r for r in remainders if isinstance(r, DenseRemainder) and not r.transposed]
    rounded_off = [r.rounded_off for r in upright if r.rounded_off is not None]
    of_half = len(rounded_off) == len(weights) and _are_plain(rounded_off, dtype=torch.int16)
    weights_fit = _are_plain(weights, dtype=torch.bfloat16) if of_half else _are_plain(weights)
    if not (weights_fit and len(upright) == len(weights) and _are_plain(lora_B, lora_A)):
        kernels.merge(remainders, weights, lora_B, lora_A, coefficients)
        return
    torch.ops.scalora.merge_(weights, rounded_off, lora_B, lora_A, coefficients.contiguous())


def expand_factors(factors: Float[Tensor, "layers rows columns"], like: Sequence[Tensor]) -> list[Tensor]:
    """As `kernels.expand_factors`, without copies."""
    return list(factors.expand(len(like), *like[0].shape).unbind())


def multiply(tensors: Sequence[Tensor], factors: Sequence[Tensor], power: int = 1) -> None:
    """As `kernels.multiply`."""
    if not (_are_plain(tensors) and all(f.is_cpu and f.dtype == torch.float32 for f in factors)):
        kernels.multiply(tensors, factors, power)
        return
    torch.ops.scalora.multiply_(tensors, factors, power)


def _are_plain(*lists: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> bool:
    return all(t.is_cpu and t.dtype == dtype and t.is_contiguous() for tensors in lists for t in tensors)
