"""How long a merge takes: PyTorch's own operations, the C++ (on a CPU), compiled ones, and the lower bound.

    python benchmarks/merge_speed.py --output merge.json [--dtypes float32,bfloat16,float16] [--ranks 8,16,64]

First checks that compiled merges do what PyTorch's own operations do. Needs PyTorch; on a GPU also Triton.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compiled_merge
import torch
from torch import Tensor

from scalora.rescale.native import NativeBuildError
from scalora.rescale.native.compiler import load_operations
from scalora.rescale.remainder import HALF, DenseRemainder


def remainder_of(weight: Tensor, rounded_off: Tensor | None) -> DenseRemainder:
    """A remainder of a weight, with what rounding has left out of it so far."""
    remainder = DenseRemainder(weight, transposed=False)
    if rounded_off is not None:
        remainder.rounded_off = rounded_off
    return remainder


def eager(weight: Tensor, rounded_off: Tensor | None, left: Tensor, right: Tensor) -> None:
    """Merge with PyTorch's own operations."""
    remainder_of(weight, rounded_off).add(weight, left, right)


def in_cpp(weight: Tensor, rounded_off: Tensor | None, left: Tensor, right: Tensor) -> None:
    """Merge with the C++."""
    ones = torch.ones(1, left.shape[1], dtype=torch.float64)
    lows = [] if rounded_off is None else [rounded_off]
    torch.ops.scalora.merge_([weight], lows, [left], [right.mT.contiguous()], ones)


def compiled(unrolled: bool) -> Callable[..., None]:
    """`merge_` with the product in the loop, or stored."""

    def merge(weight: Tensor, rounded_off: Tensor | None, left: Tensor, right: Tensor) -> None:
        most = 1 << 10 if unrolled else 0
        compiled_merge._UNROLLED_ON_CPU = compiled_merge._UNROLLED_ON_GPU = most
        if not compiled_merge.merge_(weight, rounded_off, left, right):
            raise RuntimeError("this can't be compiled here")

    return merge


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
    """What the compiled merge does differently from eager, on `device`; empty if nothing that matters."""
    wrong = []
    for dtype in HALF:
        every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256).to(device)
        for unrolled in (False, True) if dtype == torch.bfloat16 else (False,):
            weight, low = every.clone(), torch.randint(-32767, 32768, every.shape, dtype=torch.int16, device=device)
            expected, expected_low = weight.clone(), low.clone()
            nothing = torch.zeros(256, 4, device=device)
            compiled(unrolled)(weight, low, nothing, nothing)
            eager(expected, expected_low, nothing, nothing)
            number = ~every.isnan()
            differ = (weight.view(torch.int16) != expected.view(torch.int16)) & number
            far = ((low.int() - expected_low.int()).abs() > (1 if dtype == torch.float16 else 0)) & number
            for what, which in (("weights", differ), ("remainders", far)):
                # Float16's neighbours of a tie may fall to either side where a division is not rounded correctly.
                if (count := int(which.sum())) > (16 if dtype == torch.float16 and device.type == "cuda" else 0):
                    bits = every.view(torch.int16)[which][:3].tolist()
                    wrong.append(f"{dtype} {'unrolled' if unrolled else 'stored'}: {count} {what} differ, at {bits}")
    for dtype in (torch.float32, *HALF):
        for m, n, r in ((512, 768, 8), (510, 770, 16), (512, 2048, 64)):
            for unrolled in (False, True) if r < 64 else (False,):
                weight = (torch.randn(m, n, device=device) * 0.05).to(dtype)
                low = torch.zeros_like(weight, dtype=torch.int16) if dtype in HALF else None
                left, right = torch.randn(m, r, device=device) * 1e-3, torch.randn(n, r, device=device)
                exact = weight.double() + left.double() @ right.double().mT
                compiled(unrolled)(weight, low, left, right)
                joined = remainder_of(weight, low).exact(weight)
                error = ((joined.double() - exact).abs().max() / exact.abs().max()).item()
                if error > 2.0**-21:
                    wrong.append(f"{dtype} {(m, n, r)} {'unrolled' if unrolled else 'stored'}: error {error:.1e}")
    return wrong


def bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes per second, read and written, of an in-place addition."""
    x = torch.zeros(1 << (28 if device.type == "cuda" else 24), device=device)
    (times,) = seconds(device, [lambda: x.add_(1)], repeats)
    return 2 * x.nbytes / min(times)


def measure(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], rank: int, args: Any) -> dict[str, Any]:
    """Times of one kind of merge; of several weights in turn, so that caches are as cold as in a model."""
    m, n = shape
    size = m * n * 4
    count = max(2, min(30, (1 << (28 if device.type == "cuda" else 26)) // size))
    weights = [torch.randn(m, n, device=device).to(dtype) for _ in range(count)]
    lows = [torch.zeros_like(w, dtype=torch.int16) if dtype in HALF else None for w in weights]
    left, right = torch.randn(m, rank, device=device) * 1e-6, torch.randn(n, rank, device=device)

    def all_of(merge: Callable[..., None]) -> Callable[[], None]:
        def call() -> None:
            for weight, low in zip(weights, lows, strict=True):
                merge(weight, low, left, right)

        return call

    contenders: dict[str, Callable[..., None]] = {"eager": eager}
    if args.cpp and dtype != torch.float16:
        contenders["C++"] = in_cpp
    if rank <= args.unroll_up_to and dtype != torch.float16:
        contenders["unrolled"] = compiled(True)
    if dtype in HALF:
        contenders["stored"] = compiled(False)
    first = {}
    for name, merge in contenders.items():
        began = time.perf_counter()
        merge(weights[0], lows[0], left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()
        first[name] = time.perf_counter() - began
    times = seconds(device, [all_of(merge) for merge in contenders.values()], args.repeats)
    host = {name: host_seconds(all_of(merge), device) / count for name, merge in contenders.items()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "shape": shape,
        "rank": rank,
        "floor": 2 * size / args.bandwidth,
        "median": {n: statistics.median(t) / count for n, t in zip(contenders, times, strict=True)},
        "best": {n: min(t) / count for n, t in zip(contenders, times, strict=True)},
        "first_call": first,
        "host": host,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: microseconds a merge, medians, and how often the floor."""
    names = ["eager", "C++", "unrolled", "stored"]
    lines = [
        "| dtype | shape | r | floor µs | " + " | ".join(f"{n} µs (× floor)" for n in names) + " | host µs | first s |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        cells = [f"{1e6 * t:.0f} ({t / row['floor']:.1f})" if (t := row["median"].get(name)) else "–" for name in names]
        shape = "×".join(map(str, row["shape"]))
        host = " / ".join(f"{1e6 * row['host'][n]:.0f}" if n in row["host"] else "–" for n in names)
        first = " / ".join(f"{row['first_call'][n]:.1f}" if n in row["first_call"] else "–" for n in names[2:])
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
    default = (
        "2048x2048,8192x2048,2048x8192,4096x4096,14336x4096"
        if on_gpu
        else "192x576,576x576,1536x576,2048x2048,4096x4096"
    )
    parser.add_argument("--shapes", default=default, help="shapes of the weights")
    parser.add_argument("--repeats", type=int, default=20, help="times that each merge is measured")
    parser.add_argument(
        "--unroll-up-to",
        type=int,
        default=16,
        help="highest rank whose product is computed in the loop: compiling takes long at high ranks",
    )
    parser.add_argument("--threads", type=int, help="threads of PyTorch on a CPU")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if on_gpu else "cpu")
    began = time.perf_counter()
    if not compiled_merge.can_compile(device):
        raise SystemExit("there is no compiler")
    args.cpp = not on_gpu
    if args.cpp:
        try:
            load_operations()
        except NativeBuildError as error:
            raise SystemExit(str(error)) from None
    # The product in full float32 in all contenders.
    torch.backends.cuda.matmul.allow_tf32 = False
    args.bandwidth = bandwidth(device, args.repeats)
    name = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    print(f"{name}, torch {torch.__version__}, in-place add at {args.bandwidth / 1e9:.0f} GB/s", flush=True)
    wrong = check(device)
    print(f"check ({time.perf_counter() - began:.0f} s):", "; ".join(wrong) or "as eager", flush=True)
    rows = []
    for dtype in args.dtypes.split(","):
        for rank in map(int, args.ranks.split(",")):
            for shape in args.shapes.split(","):
                m, n = map(int, shape.split("x"))
                rows.append(measure(device, getattr(torch, dtype), (m, n), rank, args))
                if on_gpu:
                    torch.cuda.empty_cache()
    print(table(rows))
    print(f"{time.perf_counter() - began:.0f} s in all")
    if args.output:
        told = {"device": name, "torch": torch.__version__, "bandwidth": args.bandwidth, "wrong": wrong, "rows": rows}
        args.output.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
