"""The work of a rescale in C++, for CPUs (``native=True``). Owned by this folder: source, build, operations.

May import `scalora.rescale` and `scalora.maths`.
"""

from scalora.rescale.native.compiler import NativeBuildError
from scalora.rescale.native.operations import build

__all__ = ["NativeBuildError", "build"]
