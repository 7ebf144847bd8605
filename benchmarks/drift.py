"""Drift of a half-precision model over a thousand rescales, against a float64 replay of what each rescale moved.

    python benchmarks/drift.py

One layer, its adapter trained with AdamW and rescaled at every step. The replay adds what the adapter's product loses
at each rescale to the base weight in float64, densely. Printed is the relative change of the output for inputs of unit
variance: of the model as it is, of one rounding of the replay's weight, and of what merging in half precision in place
would have given; and what a factored remainder has discarded, relative to itself.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from scalora import ScaLora, ScaLoraConfig
from scalora.rescale.remainder import FactoredRemainder


class Replay:
    """Sums in float64, written out densely, what each rescale takes from the adapter of a layer."""

    def __init__(self, layer: LoraLayer) -> None:
        self.layer = layer
        self.weight = layer.base_layer.weight.detach().double()
        self.naive = layer.base_layer.weight.detach().clone()

    def _product(self) -> Tensor:
        A, B = (getattr(self.layer, name)["default"].weight.detach().double() for name in ("lora_B", "lora_A"))
        return self.layer.scaling["default"] * A @ B

    def before(self, *_: Any) -> None:
        """To be called right before each rescale."""
        self._last = self._product()

    def after(self, *_: Any) -> None:
        """To be called right after it."""
        remainder = self._last - self._product()
        self.weight += remainder
        self.naive += remainder.to(self.naive.dtype)

    def live(self) -> Tensor:
        """The weight that the model computes with beside its adapter, in float64."""
        weight, remainder = self.layer.base_layer.weight.detach().double(), self.layer.frozen_remainder
        return weight + remainder.dense().double() if isinstance(remainder, FactoredRemainder) else weight


def train(
    dtype: torch.dtype, merge: str, *, width: int, steps: int = 1000, target_rank: int | None = None, **settings: Any
) -> tuple[ScaLora, Replay]:
    """Fit a linear map through one layer with a rescale at every step.

    The map differs from the layer's weight by a random matrix of rank `target_rank`, or of full rank when None.
    """
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(width, width, bias=False)), LoraConfig(r=4, target_modules=["0"]))
    model.base_model.model[0].base_layer.to(dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
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
    return engine, replay


def drift(weight: Tensor, exact: Tensor) -> float:
    """Relative change of the output that one weight gives instead of another."""
    x = torch.randn(256, exact.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return ((x @ (weight.double() - exact).T).norm() / (x @ exact.T).norm()).item()


def row(name: str, dtype: torch.dtype, engine: ScaLora, replay: Replay) -> str:
    """One line of the table."""
    figures = [
        drift(replay.live(), replay.weight),
        drift(replay.weight.to(dtype), replay.weight),
        drift(replay.naive, replay.weight),
        engine.metrics().get("scalora/discarded", 0.0),
    ]
    return f"| {name} | " + " | ".join(f"{figure:.1e}" for figure in figures) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--target-rank", type=int, help="of the update that is to be learned; full when not given")
    arguments = parser.parse_args()
    print("| run | drift | one rounding | merging naively | discarded |\n|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float16):
        for merge, settings in (
            ("dense", {}),
            ("factored", {"remainder_rank": 64}),
            ("factored", {"remainder_rank": arguments.width}),
        ):
            sizes = {"width": arguments.width, "steps": arguments.steps, "target_rank": arguments.target_rank}
            engine, replay = train(dtype, merge, **sizes, **settings)
            name = " ".join([merge, *(f"{value} columns" for value in settings.values())])
            print(row(f"one layer, {str(dtype).split('.')[1]}, {name}", dtype, engine, replay), flush=True)


if __name__ == "__main__":
    main()
