"""Measures a half-precision model's drift over many rescales against a float64 replay of what each one moved.

    python benchmarks/drift.py [--steps 10000] [--rate 1e-5]

Trains the adapter of one layer with AdamW and rescales at every step. The replay adds what the adapter's product loses
at each rescale to a dense float64 copy of the base weight. For inputs of unit variance, prints the relative change of
the output from the replay's with three weights: the model's own, the replay's rounded once, and what merging in place
in half precision would have given. Also prints the size of the update itself, and the share of a factored remainder
that was discarded.
Factors that are kept in half precision, and factors that are rounded to it for a forward pass alone, are shown for
comparison.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from scalora import ScaLora, ScaLoraConfig
from scalora.config import MERGES_INTO_THE_BASE
from scalora.rescale.remainder import FactoredRemainder


class Replay:
    """Sums what each rescale takes from a layer's adapter in a dense float64 weight.

    Args:
        layer: PEFT LoRA layer with the adapter "default".

    Attributes:
        weight: the base weight plus everything taken so far, float64.
        base: the base weight, float64.
        naive: the same, merged in place in the base weight's own dtype.
    """

    def __init__(self, layer: LoraLayer) -> None:
        self.layer = layer
        self.weight = layer.base_layer.weight.detach().double()
        self.base = self.weight.clone()
        self.naive = layer.base_layer.weight.detach().clone()

    def _product(self) -> Tensor:
        A, B = (getattr(self.layer, name)["default"].weight.detach().double() for name in ("lora_B", "lora_A"))
        return self.layer.scaling["default"] * A @ B

    def before(self, *_: Any) -> None:
        """Record the adapter's product; call right before each rescale."""
        self._last = self._product()

    def after(self, *_: Any) -> None:
        """Add what the product has lost; call right after each rescale."""
        remainder = self._last - self._product()
        self.weight += remainder
        self.naive += remainder.to(self.naive.dtype)

    def live(self) -> Tensor:
        """Effective weight of the model without its adapter, in float64."""
        weight, remainder = self.layer.base_layer.weight.detach().double(), self.layer.frozen_remainder
        return weight + remainder.dense().double() if isinstance(remainder, FactoredRemainder) else weight


def train(
    dtype: torch.dtype,
    merge: str,
    *,
    width: int,
    steps: int = 1000,
    target_rank: int | None = None,
    rate: float = 3e-3,
    factors: torch.dtype = torch.float32,
    **settings: Any,
) -> tuple[ScaLora, Replay]:
    """Fit a linear map with one adapted layer, with a rescale at every step.

    Args:
        dtype: dtype of the base weight.
        merge: where the remainder goes, any but "auto".
        width: rows and columns of the weight.
        steps: optimizer steps, each with a rescale.
        target_rank: rank of the random matrix by which the map differs from the base weight; None is full rank.
        rate: learning rate.
        factors: dtype to which the factors of a factored remainder are rounded after each rescale.
        **settings: further fields of `ScaLoraConfig`.

    Returns:
        The engine and the replay.
    """
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(width, width, bias=False)), LoraConfig(r=4, target_modules=["0"]))
    model.base_model.model[0].base_layer.to(dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    replay = Replay(model.base_model.model[0])
    optimizer.register_step_pre_hook(replay.before)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, merge=merge, **settings))
    optimizer.register_step_pre_hook(replay.after)
    generator = torch.Generator().manual_seed(1)
    rank = target_rank or width
    change = torch.randn(width, rank, generator=generator) @ torch.randn(rank, width, generator=generator) / rank**0.5
    target = model.base_model.model[0].base_layer.weight.float() + change
    for _ in range(steps):
        x = torch.randn(32, width, generator=generator)
        nn.functional.mse_loss(model(x.to(dtype)).float(), x @ target.T).backward()
        optimizer.step()
        optimizer.zero_grad()
        if merge == "factored":
            round_factors(replay.layer.frozen_remainder, factors)
    return engine, replay


def round_factors(remainder: FactoredRemainder, dtype: torch.dtype) -> None:
    """Round the factors of a remainder, in place.

    Args:
        remainder: the remainder; modified.
        dtype: the dtype to round to.
    """
    for factor in remainder.used:
        factor.copy_(factor.to(dtype))


def drift(weight: Tensor, exact: Tensor) -> float:
    """Relative change of the output when one weight replaces another.

    Args:
        weight: the weight to judge, (m, n).
        exact: the exact weight, (m, n), float64.
    """
    x = torch.randn(256, exact.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return ((x @ (weight.double() - exact).T).norm() / (x @ exact.T).norm()).item()


def row(name: str, dtype: torch.dtype, engine: ScaLora, replay: Replay) -> str:
    """Format one row of the table."""
    figures = [
        drift(replay.live(), replay.weight),
        drift(replay.weight.to(dtype), replay.weight),
        drift(replay.naive, replay.weight),
        drift(replay.base, replay.weight),
        engine.metrics().get("scalora/discarded", 0.0),
    ]
    return f"| {name} | " + " | ".join(f"{figure:.1e}" for figure in figures) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="width of the layer (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="steps, one rescale each (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate (default: %(default)s)")
    kinds = ",".join([*MERGES_INTO_THE_BASE, "factored"])
    parser.add_argument("--merges", default=kinds, help="kinds of remainders (default: %(default)s)")
    parser.add_argument("--target-rank", type=int, help="rank of the update to learn (default: full)")
    arguments = parser.parse_args()
    columns = ["run", "drift", "one rounding", "merging naively", "the update", "discarded"]
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for dtype in (torch.bfloat16, torch.float16):
        for merge, settings in (
            *((merge, {}) for merge in MERGES_INTO_THE_BASE),
            ("factored", {"remainder_rank": 64}),
            ("factored", {"remainder_rank": arguments.width}),
            ("factored", {"remainder_rank": arguments.width, "factors": dtype}),
        ):
            if merge not in arguments.merges.split(","):
                continue
            sizes = {key: getattr(arguments, key) for key in ("width", "steps", "target_rank", "rate")}
            engine, replay = train(dtype, merge, **sizes, **settings)
            columns = f", {settings['remainder_rank']} columns" if merge == "factored" else ""
            name = f"one layer, {str(dtype).split('.')[1]}, {merge}{columns}"
            kept = " kept in it" if "factors" in settings else ""
            print(row(name + kept, dtype, engine, replay), flush=True)
            if merge == "factored" and not kept and settings["remainder_rank"] == arguments.width:
                round_factors(replay.layer.frozen_remainder, dtype)
                print(row(f"{name} rounded to it for a pass", dtype, engine, replay), flush=True)


if __name__ == "__main__":
    main()
