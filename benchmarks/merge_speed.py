"""How long a merge takes, beside the time in which its bytes could be moved once.

    python benchmarks/merge_speed.py --output merge.json [--dtypes float32,bfloat16,float16] [--ranks 8,16,64]

Compares PyTorch's own operations with the library's Triton kernel on a GPU, and with its C++ on a CPU. On a GPU, first
checks that the kernel does what PyTorch's operations do.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalora import config
from scalora.bench.floor import rescale_work
from scalora.model.placement import bytes_beside
from scalora.rescale import kernels, native
from scalora.rescale.eight_bit import EightBitRemainder
from scalora.rescale.native import operations
from scalora.rescale.one_pass import Rounding, plan_of
from scalora.rescale.remainder import HALF, DenseRemainder, add_to_all, scale_columns
from scalora.rescale.stochastic import StochasticRemainder

Merge = Callable[[list[DenseRemainder], list[Tensor], list[Tensor], list[Tensor], Tensor], None]

KINDS: dict[config.Merge, Callable[[Tensor, str], DenseRemainder]] = {
    "dense": lambda weight, _: DenseRemainder(weight, transposed=False),
    "dense_8bit": lambda weight, _: EightBitRemainder(weight, transposed=False),
    "stochastic": lambda weight, name: StochasticRemainder(weight, transposed=False, name=name),
}
"""The kinds of remainders that are merged into weights, made of a weight and a name."""


def floor_bytes(
    rows: int, columns: int, rank: int, layers: int, dtype: torch.dtype, *, merge: config.Merge = "dense"
) -> int:
    """Bytes of the weights, read and written, of what is kept beside them, and of the factors.

    Args:
        rows: rows of each weight.
        columns: columns of each weight.
        rank: columns of the factors.
        layers: number of weights.
        dtype: dtype of the weights.
        merge: kind of the remainder, which says how many bytes are kept of each entry's rounding error.
    """
    entry = dtype.itemsize + bytes_beside(merge, dtype)
    return layers * int(rescale_work(rows, columns, rank, weight_bytes=entry).merge.bytes)


def bytes_moved(
    rows: int, columns: int, rank: int, layers: int, dtype: torch.dtype, *, merge: config.Merge = "dense"
) -> int:
    """Bytes that a merge by the kernel moves, if no cache had any of the factors: counted from its grid.

    Args:
        rows: as in `floor_bytes`.
        columns: as in `floor_bytes`.
        rank: as in `floor_bytes`.
        layers: as in `floor_bytes`.
        dtype: as in `floor_bytes`.
        merge: as in `floor_bytes`.
    """
    factors = 4 * layers * rank * (rows + columns)
    weights = floor_bytes(rows, columns, rank, layers, dtype, merge=merge) - factors
    # The layers' factors are copied into one tensor first.
    rounding = Rounding.of(KINDS[merge](torch.empty(1, 1, dtype=dtype), ""), dtype)
    return weights + 2 * factors + plan_of(rows, columns, rank, layers, dtype, rounding).bytes_of_factors(rank)


def eager(
    remainders: list[DenseRemainder],
    weights: list[Tensor],
    lora_B: list[Tensor],
    lora_A: list[Tensor],
    coefficients: Tensor,
) -> None:
    """Merge with PyTorch's own operations."""
    left, right = scale_columns(torch.stack(lora_B), torch.stack(lora_A).mT, coefficients)
    add_to_all(remainders, weights, left.unbind(), right.unbind())


class Layers:
    """Layers of one shape with the factors of a merge.

    Args:
        shape: (m, n) of the weights.
        rank: columns of the factors.
        dtype: dtype of the weights.
        count: number of layers.
        device: their device.
        kind: kind of the remainders, one of `KINDS`.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        rank: int,
        dtype: torch.dtype,
        count: int,
        device: torch.device,
        *,
        kind: config.Merge = "dense",
    ) -> None:
        m, n = shape
        self.weights = [torch.randn(m, n, device=device).to(dtype) for _ in range(count)]
        self.remainders: list[DenseRemainder] = [
            KINDS[kind](weight, str(number)) for number, weight in enumerate(self.weights)
        ]
        self.lora_B = [torch.randn(m, rank, device=device) * 1e-6 for _ in range(count)]
        self.lora_A = [torch.randn(rank, n, device=device) for _ in range(count)]
        self.coefficients = torch.ones(count, rank, dtype=torch.float64, device=device)

    def merged_by(self, merge: Merge) -> None:
        """Merge into all layers.

        Args:
            merge: the operation.
        """
        merge(self.remainders, self.weights, self.lora_B, self.lora_A, self.coefficients)


def seconds(device: torch.device, calls: list[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Times of each of `calls`, which are made in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 2):
        for call, of_call in zip(calls, times, strict=True):
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                # So that the device does not wait for the host within what is measured.
                torch.cuda._sleep(1_000_000)
                start.record()
                call()
                end.record()
                end.synchronize()
                taken = start.elapsed_time(end) / 1e3
            else:
                began = time.perf_counter()
                call()
                taken = time.perf_counter() - began
            if repeat >= 2:
                of_call.append(taken)
    return times


def host_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """What a call costs the host, without waiting for the device."""
    times = []
    for _ in range(20):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return statistics.median(times)


def check(device: torch.device) -> list[str]:
    """Where a merge by the kernel is further from the exact sum than float32's rounding; empty if nowhere."""
    wrong = []
    for dtype in (torch.float32, *HALF):
        for m, n, r in ((512, 768, 8), (510, 770, 16), (512, 2048, 64), (300, 1000, 320)):
            layers = Layers((m, n), r, dtype, 2, device)
            layers.lora_B = [B * 1e4 for B in layers.lora_B]
            pairs = zip(layers.weights, layers.lora_B, layers.lora_A, strict=True)
            exact = [weight.double() + B.double() @ A.double() for weight, B, A in pairs]
            layers.merged_by(kernels.merge)
            for remainder, weight, wanted in zip(layers.remainders, layers.weights, exact, strict=True):
                error = ((remainder.exact(weight).double() - wanted).abs().max() / wanted.abs().max()).item()
                if error > 2.0**-21:
                    wrong.append(f"{dtype} {(m, n, r)}: error {error:.1e}")
    return wrong


def bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes per second, read and written, of an in-place addition."""
    x = torch.zeros(1 << (28 if device.type == "cuda" else 24), device=device)
    (times,) = seconds(device, [lambda: x.add_(1)], repeats)
    return 2 * x.nbytes / min(times)


def measure(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], rank: int, kind: config.Merge, args: Any
) -> dict[str, Any]:
    """Times of one kind of merge; of several weights in turn, so that caches are as cold as in a model."""
    m, n = shape
    count = max(2, min(30, (1 << (28 if device.type == "cuda" else 26)) // (m * n * 4)))
    layers = Layers(shape, rank, dtype, count, device, kind=kind)
    contenders: dict[str, Merge] = {"eager": eager, "kernel": kernels.merge}
    if device.type == "cpu":
        # The C++ leaves float16 to PyTorch's operations.
        contenders = {"eager": eager} | ({} if dtype == torch.float16 else {"C++": operations.merge})
    first = {}
    for name, merge in contenders.items():
        began = time.perf_counter()
        layers.merged_by(merge)
        if device.type == "cuda":
            torch.cuda.synchronize()
        first[name] = time.perf_counter() - began
    calls = [lambda merge=merge: layers.merged_by(merge) for merge in contenders.values()]
    times = seconds(device, calls, args.repeats)
    return {
        "dtype": str(dtype).removeprefix("torch.") + ("" if kind == "dense" else f", {kind}"),
        "shape": shape,
        "rank": rank,
        "floor": floor_bytes(m, n, rank, 1, dtype, merge=kind) / args.bandwidth,
        "median": {name: statistics.median(t) / count for name, t in zip(contenders, times, strict=True)},
        "best": {name: min(t) / count for name, t in zip(contenders, times, strict=True)},
        "first_call": first,
        "host": {name: host_seconds(call, device) / count for name, call in zip(contenders, calls, strict=True)},
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: microseconds a merge, medians, and how often the floor."""
    names = list(dict.fromkeys(name for row in rows for name in row["median"]))
    columns = [f"{name} µs (× floor)" for name in names]
    lines = [
        f"| dtype | shape | r | floor µs | {' | '.join(columns)} | host µs | first call s |",
        "|---" * (6 + len(names)) + "|",
    ]
    for row in rows:
        cells = [f"{1e6 * t:.0f} ({t / row['floor']:.1f})" if (t := row["median"].get(name)) else "–" for name in names]
        host = " / ".join(f"{1e6 * t:.0f}" for t in row["host"].values())
        first = " / ".join(f"{t:.1f}" for t in row["first_call"].values())
        shape = "×".join(map(str, row["shape"]))
        values = [row["dtype"], shape, str(row["rank"]), f"{1e6 * row['floor']:.0f}", *cells, host, first]
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    """Check, measure, print and write."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--dtypes", default="float32,bfloat16,float16", help="dtypes of the weights")
    parser.add_argument("--ranks", default="8,16,64" if on_gpu else "8", help="ranks of the product")
    default = "2048x2048,4096x4096,14336x4096" if on_gpu else "192x576,576x576,1536x576,2048x2048,4096x4096"
    parser.add_argument("--shapes", default=default, help="shapes of the weights")
    parser.add_argument("--repeats", type=int, default=20, help="times that each merge is measured")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on a CPU")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    # A merge that falls back to PyTorch's operations would be measured as the kernel.
    warnings.filterwarnings("error", message="merges into")
    device = torch.device("cuda" if on_gpu else "cpu")
    began = time.perf_counter()
    if not on_gpu:
        native.build()
    # The product in full float32 in all contenders.
    torch.backends.cuda.matmul.allow_tf32 = False
    args.bandwidth = bandwidth(device, args.repeats)
    name = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    print(f"{name}, torch {torch.__version__}, in-place add at {args.bandwidth / 1e9:.0f} GB/s", flush=True)
    wrong = check(device)
    print(f"check ({time.perf_counter() - began:.0f} s):", "; ".join(wrong) or "to float32's rounding", flush=True)
    rows = []
    for dtype in (getattr(torch, name) for name in args.dtypes.split(",")):
        for kind in KINDS if on_gpu and dtype in HALF else ("dense",):
            for rank in map(int, args.ranks.split(",")):
                for shape in args.shapes.split(","):
                    m, n = map(int, shape.split("x"))
                    rows.append(measure(device, dtype, (m, n), rank, kind, args))
                    if on_gpu:
                        torch.cuda.empty_cache()
    print(table(rows))
    print(f"{time.perf_counter() - began:.0f} s in all")
    if args.output:
        told = {"device": name, "torch": torch.__version__, "bandwidth": args.bandwidth, "wrong": wrong, "rows": rows}
        args.output.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
