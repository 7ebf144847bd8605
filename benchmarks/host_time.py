"""What the host takes for an optimizer step of a model with many layers, launched one by one and replayed.

    python benchmarks/host_time.py --layers 24

On a CPU, with layers so small that the operations themselves take next to nothing. What launches a recording does
nothing here: the rest of a step with replays is what the host does beside it, such as checks that nothing has moved.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from scalora import PairAdamW, ScaLora, ScaLoraConfig
from scalora.rescale.replay import launched_one_by_one

_STEPS, _FIRST_STEPS = 30, 10


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="of the Llama, each with seven adapted ones")
    layers = parser.parse_args().layers
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the adapter names no base
    print("| method | launched one by one, ms | replayed, ms |\n| --- | --- | --- |")
    for name, mode in {"LoRA": None, "columns": "auto", "LoRA with PairAdamW": None, "matrices": "matrix"}.items():
        in_pairs = "PairAdamW" in name or mode == "matrix"
        seconds = [step_time(layers, in_pairs, mode, replayed) for replayed in (False, True)]
        print(f"| {name} | {' | '.join(f'{1e3 * each:.1f}' for each in seconds)} |", flush=True)


def step_time(layers: int, in_pairs: bool, mode: Any, replayed: bool) -> float:
    """Median seconds of a step.

    Args:
        layers: of the model.
        in_pairs: whether the optimizer is `PairAdamW`, and not AdamW.
        mode: of the rescales; None: none.
        replayed: whether recordings are replayed.
    """
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4
    )
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config).bfloat16(), lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Optimizer = PairAdamW(model, lr=1e-5) if in_pairs else AdamW(trained, lr=1e-5, fused=True)
    if mode is not None:
        ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, mode=mode, merge="dense"))
    gradients = [[torch.randn_like(parameter) for parameter in trained] for _ in range(2)]
    seconds = []
    with (
        patch("scalora.rescaling.is_recordable", _always),
        patch("scalora.pair_adamw.is_recordable", _always),
        patch("scalora.rescale.replay.record", _record),
        nullcontext() if replayed else launched_one_by_one(),
    ):
        for step in range(_STEPS):
            for parameter, gradient in zip(trained, gradients[step % 2], strict=True):
                parameter.grad = gradient
            start = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
    return median(seconds[_FIRST_STEPS:])


def _always(devices: Any) -> bool:
    return True


def _record(function: Callable[[], Any], device: torch.device, memory: Any) -> tuple[Callable[[], None], Any]:
    output = function()
    return lambda: None, output


if __name__ == "__main__":
    main()
