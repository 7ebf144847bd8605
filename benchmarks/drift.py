"""Drift of a half-precision model over a thousand rescales, against a float64 replay of what each rescale moved.

    python benchmarks/drift.py

One layer, its adapter trained with AdamW and rescaled at every step. The replay adds what the adapter's product loses
at each rescale to the base weight in float64, densely. Printed is the relative change of the output for inputs of unit
variance: of the model as it is, of one rounding of the replay's weight, and of what merging in half precision in place
would have given.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from scalora import ScaLora, ScaLoraConfig


class Replay:
    """Sums in float64, written out densely, what each rescale takes from the adapter of a layer."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: ScaLoraConfig) -> None:
        self.layer = model.base_model.model[0]
        self.weight = self.layer.base_layer.weight.detach().double()
        self.naive = self.layer.base_layer.weight.detach().clone()
        optimizer.register_step_pre_hook(self._before)
        self.engine = ScaLora(model, optimizer, config)
        optimizer.register_step_pre_hook(self._after)

    def _product(self) -> Tensor:
        A, B = (getattr(self.layer, name)["default"].weight.detach().double() for name in ("lora_B", "lora_A"))
        return self.layer.scaling["default"] * A @ B

    def _before(self, *_: Any) -> None:
        self._last = self._product()

    def _after(self, *_: Any) -> None:
        remainder = self._last - self._product()
        self.weight += remainder
        self.naive += remainder.to(self.naive.dtype)

    def live(self) -> Tensor:
        """The weight that the model computes with beside its adapter, in float64."""
        weight, remainder = self.layer.base_layer.weight.detach().double(), self.layer.frozen_remainder
        return weight + remainder.dense().double() if self.engine.config.merge == "factored" else weight


def train(dtype: torch.dtype, merge: str, *, width: int, steps: int = 1000, **settings: Any) -> Replay:
    """Fit a random linear map through a layer in half precision, with a rescale at every step."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(width, width, bias=False)), LoraConfig(r=4, target_modules=["0"]))
    model.base_model.model[0].base_layer.to(dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    replay = Replay(model, optimizer, ScaLoraConfig(warmup_steps=0, merge=merge, **settings))
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(width, width, generator=generator)
    for _ in range(steps):
        x = torch.randn(32, width, generator=generator)
        nn.functional.mse_loss(model(x.to(dtype)).float(), x @ target.T).backward()
        optimizer.step()
        optimizer.zero_grad()
    return replay


def drift(weight: Tensor, exact: Tensor) -> float:
    """Relative change of the output that one weight gives instead of another."""
    x = torch.randn(256, exact.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return ((x @ (weight.double() - exact).T).norm() / (x @ exact.T).norm()).item()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    print("| base | remainder | drift | one rounding | merging naively | discarded |")
    print("|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float16):
        for merge, settings in (
            ("dense", {}),
            ("factored", {"remainder_rank": 64}),
            ("factored", {"remainder_rank": arguments.width}),
        ):
            replay = train(dtype, merge, width=arguments.width, steps=arguments.steps, **settings)
            figures = [drift(replay.live(), replay.weight), drift(replay.weight.to(dtype), replay.weight)]
            figures += [drift(replay.naive, replay.weight), replay.engine.metrics().get("scalora/discarded", 0.0)]
            name = " ".join([merge, *(f"{value} columns" for value in settings.values())])
            print("|", " | ".join([str(dtype).split(".")[1], name, *(f"{x:.1e}" for x in figures)]), "|", flush=True)


if __name__ == "__main__":
    main()
