"""How long a LoRA layer with a factored remainder takes, forward and backward, next to plain LoRA of the same width.

    python benchmarks/shared_pass.py [--device cuda] [--widths 1024,2048] [--tokens 1024] [--dtypes float32,bfloat16]

Prints the milliseconds of the layer with LoRA of rank r, and relative to these: without any adapter, with LoRA of rank
r + k, with a remainder of k columns in a pass of its own, and with one that shares the adapter's. The calls take turns,
and the ratios are medians over them. In half precision the products are done under autocast, as in training. Then the
milliseconds that a compression of the remainders of many such layers takes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from scalora import ScaLora, ScaLoraConfig
from scalora.rescale.remainder import FactoredRemainder, compress_full


def layer(width: int, dtype: torch.dtype, device: torch.device, rank: int, columns: int) -> nn.Module:
    """One linear layer, with LoRA if the rank is positive, and with a remainder if there are columns."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(width, width, bias=False).to(device, dtype).requires_grad_(False))
    if not rank:
        return base
    model = get_peft_model(base, LoraConfig(r=rank, target_modules=["0"]))
    if columns:
        trained = [p for p in model.parameters() if p.requires_grad]
        ScaLora(model, torch.optim.AdamW(trained), ScaLoraConfig(merge="factored", remainder_rank=columns))
        for remainder in model.modules():
            if isinstance(remainder, FactoredRemainder):
                remainder.append(*(1e-3 * torch.randn(width, columns, device=device) for _ in range(2)))
    return model


def passes(model: nn.Module, x: torch.Tensor, backward: bool) -> Callable[[], None]:
    """The forward pass of a layer, and the backward pass if asked for."""
    gradient, half = torch.ones_like(x), x.dtype != torch.float32

    def run() -> None:
        autocast = torch.autocast(x.device.type, x.dtype if half else torch.bfloat16, enabled=half)
        with autocast, torch.set_grad_enabled(backward):
            output = model(x)
        if backward:
            output.backward(gradient)

    return run


def in_two_passes(run: Callable[[], None]) -> Callable[[], None]:
    """The same, with the remainder in a pass of its own."""

    def separately() -> None:
        with patch("scalora.model.remainder_forward.can_share", lambda *_: False):
            run()

    return separately


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """How long a call takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def row(width: int, dtype: torch.dtype, backward: bool, arguments: argparse.Namespace) -> str:
    """One row of the table."""
    device, r, k = torch.device(arguments.device), arguments.rank, arguments.columns
    x = torch.randn(arguments.tokens, width, device=device).to(dtype).requires_grad_(backward)
    shared = passes(layer(width, dtype, device, r, k), x, backward)
    ways = [
        passes(layer(width, dtype, device, r, 0), x, backward),
        passes(layer(width, dtype, device, 0, 0), x, backward),
        passes(layer(width, dtype, device, r + k, 0), x, backward),
        in_two_passes(shared),
        shared,
    ]
    times = []
    for turn in range(arguments.repeats + 3):
        order = [(turn + i) % len(ways) for i in range(len(ways))]
        taken = {i: seconds(ways[i], device) for i in order}
        times.append([taken[i] for i in range(len(ways))])
    times = times[3:]  # the first ones allocate
    lora = statistics.median(of_turn[0] for of_turn in times)
    ratios = [statistics.median(of_turn[i] / of_turn[0] for of_turn in times) for i in range(1, len(ways))]
    name = f"{str(dtype).removeprefix('torch.')} | {width} | {'both' if backward else 'forward'}"
    return f"| {name} | {1e3 * lora:.3g} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |"


def compression(width: int, arguments: argparse.Namespace) -> str:
    """The time of one compression of many layers."""
    device, r, k = torch.device(arguments.device), arguments.rank, arguments.columns

    def filled() -> list[FactoredRemainder]:
        remainders = [FactoredRemainder(width, width, k, r, dtype=torch.float32, device=device) for _ in range(layers)]
        for remainder in remainders:
            remainder.append(*(torch.randn(width, 2 * k + r, device=device) for _ in range(2)))
        return remainders

    layers = arguments.layers
    times = [seconds(partial(compress_full, filled()), device) for _ in range(4)]
    return f"{layers} layers of width {width}, {2 * k + r} columns to {k}: {1e3 * statistics.median(times[1:]):.3g} ms"


def main() -> None:
    """Print the table and the times of compressions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument(
        "--widths", default="576,1024,2048", help="rows and columns of the weight (default: %(default)s)"
    )
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of the weight (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="rows of the input (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="r, of the adapter (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=64, help="k, of the remainder (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=28, help="layers to compress together (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="calls of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    widths = [int(width) for width in arguments.widths.split(",")]
    r, k = arguments.rank, arguments.columns
    print(
        f"| dtype | width | passes | LoRA of rank {r}, ms | no adapter | LoRA of rank {r + k} | two passes | one pass |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for dtype in arguments.dtypes.split(","):
        for width in widths:
            for backward in (False, True):
                print(row(width, getattr(torch, dtype), backward, arguments), flush=True)
    for width in widths:
        print(compression(width, arguments), flush=True)


if __name__ == "__main__":
    main()
