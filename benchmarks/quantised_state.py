"""Measures the error that a rescale adds to 8-bit optimizer state, next to the error of 8 bits without a rescale.

    python benchmarks/quantised_state.py

First table: the adapter of one linear layer is scaled at step k and, in a second run, from the start; the 8-bit
optimizer then takes the same steps in both. The distance between the two runs (transport) is compared with the distance
between the second and the same run with 32-bit state (quantisation), both relative to the distance travelled since step
k. Second table: whole runs of the engine with a rescale at every step; mean training loss of the last quarter.
"""

from __future__ import annotations

import argparse
import statistics

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from scalora import ScaLora, ScaLoraConfig
from scalora.rescale.optimizers import state_kinds
from scalora.rescale.transport import scale_gradients_and_states

OPTIMIZERS = {
    "AdamW": {"lr": 1e-3, "weight_decay": 0.1},
    "Adam": {"lr": 1e-3},
    "Lion": {"lr": 1e-4},
    "SGD": {"lr": 3e-4, "momentum": 0.9},
    "RMSprop": {"lr": 1e-3},
    "Adagrad": {"lr": 1e-2},
}
# Both factors have at least the 4096 elements from which bitsandbytes quantises.
INPUTS, OUTPUTS, RANK = 512, 768, 8


def run(name: str, bits: int, alpha: Tensor, beta: Tensor, at: int, *, seed: int, k: int, steps: int) -> Tensor:
    """Train A and B, scaled before one step; until step k only the moments change, not the weights.

    Args:
        name: name of an optimizer in bitsandbytes.
        bits: bits of its state, 8 or 32.
        alpha: factors of A's columns, (r,).
        beta: factors of B's rows, (r,).
        at: step before which A and B are scaled; at 0 there is no state to carry over.
        seed: seed of the data and the start.
        k: step at which the weights begin to move.
        steps: steps in total.

    Returns:
        How far A and B have moved since step k, flattened.
    """
    generator = torch.Generator().manual_seed(seed)
    A = nn.Parameter(torch.randn(OUTPUTS, RANK, generator=generator) / 5)
    B = nn.Parameter(torch.randn(RANK, INPUTS, generator=generator) / 5)
    W = torch.randn(OUTPUTS, INPUTS, generator=generator) / INPUTS**0.5
    target = torch.randn(OUTPUTS, INPUTS, generator=generator) / INPUTS**0.5
    settings = dict(OPTIMIZERS[name])
    optimizer = getattr(bnb.optim, name)([A, B], **settings, optim_bits=bits)
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = settings["lr"] if t >= k else 1e-300
        x = torch.randn(64, INPUTS, generator=generator)
        optimizer.zero_grad()
        if t == at == 0:
            W = _scale(W, A, B, alpha, beta)
        ((x @ (W + A @ B - target).T) ** 2).mean().backward()
        if t == at > 0:
            W = _scale(W, A, B, alpha, beta)
            kinds = state_kinds(optimizer)
            scale_gradients_and_states(optimizer, kinds, [A], [beta.expand(A.shape)])
            scale_gradients_and_states(optimizer, kinds, [B], [alpha[:, None].expand(B.shape)])
        if t == k:
            start = torch.cat([A.detach().flatten(), B.detach().flatten()])
        optimizer.step()
    return torch.cat([A.detach().flatten(), B.detach().flatten()]) - start


@torch.no_grad()
def _scale(W: Tensor, A: Tensor, B: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    kept = W + A @ B
    A.mul_(alpha)
    B.mul_(beta[:, None])
    return kept - A @ B


def errors(name: str, *, seed: int, spread: float, k: int = 20, steps: int = 60) -> tuple[float, float]:
    """Transport error and quantisation error of one run, both relative to the distance travelled since step k.

    Args:
        name: name of an optimizer in bitsandbytes.
        seed: seed of the data, the start and the factors.
        spread: factors are log-uniform between 1/spread and spread.
        k: step of the rescale.
        steps: steps in total.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    alpha, beta = (spread ** (2 * torch.rand(RANK, generator=generator) - 1) for _ in range(2))
    carried, from_start, exact = (
        run(name, bits, alpha, beta, at, seed=seed, k=k, steps=steps) for bits, at in ((8, k), (8, 0), (32, 0))
    )
    travelled = exact.norm()
    return ((carried - from_start).norm() / travelled).item(), ((from_start - exact).norm() / travelled).item()


def engine_loss(bits: int, method: str, *, seed: int, steps: int) -> float:
    """Mean training loss over the last quarter of a run with AdamW on a two-layer regression, in batches of 64.

    Args:
        bits: bits of the optimizer's state, 8 or 32.
        method: "lora" or "scalora".
        seed: seed of the models and the data.
        steps: optimizer steps of the run.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS), nn.Tanh(), nn.Linear(OUTPUTS, INPUTS))
    teacher = nn.Sequential(nn.Linear(INPUTS, OUTPUTS), nn.Tanh(), nn.Linear(OUTPUTS, INPUTS)).requires_grad_(False)
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules=["0", "2"]))
    optimizer = bnb.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, optim_bits=bits)
    if method == "scalora":
        ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=10, interval=1))
    losses = []
    for _ in range(steps):
        x = torch.randn(64, INPUTS)
        loss = (model(x) - teacher(x)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return statistics.mean(losses[-(steps // 4) :])


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each whole run (default: %(default)s)")
    arguments = parser.parse_args()
    # The tensors are so small that threads would mostly wait for each other.
    torch.set_num_threads(1)
    print("| optimizer, 8 bits | factors | transport | quantisation |\n|---|---|---|---|")
    for name in OPTIMIZERS:
        for spread in (3.0, 30.0):
            pairs = [errors(name, seed=seed, spread=spread) for seed in arguments.seeds]
            transport, quantisation = (statistics.mean(column) for column in zip(*pairs, strict=True))
            print(f"| {name} | 1/{spread:.0f} … {spread:.0f} | {transport:.2%} | {quantisation:.2%} |", flush=True)
    print("\n| method | state | loss of each seed |\n|---|---|---|")
    for method in ("lora", "scalora"):
        for bits in (32, 8):
            losses = [engine_loss(bits, method, seed=seed, steps=arguments.steps) for seed in arguments.seeds]
            print(f"| {method} | {bits} bits |", ", ".join(f"{loss:.4f}" for loss in losses), "|", flush=True)


if __name__ == "__main__":
    main()
