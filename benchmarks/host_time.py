"""What the host takes for a training step of a model with many layers: passes, and optimizer steps with rescales.

    python benchmarks/host_time.py --layers 24

On a CPU, with layers so small that the operations themselves take next to nothing, in seconds of the processor. An
optimizer step is taken as it is without recordings, launched one by one, and replayed. What launches a recording does
nothing here: the rest of a step with replays is what the host does beside it, such as checks that nothing has moved.
"""

from __future__ import annotations

import argparse
import gc
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

from scalora import PairAdamW, ScaLora, ScaLoraConfig, add_block_signs
from scalora.rescale.other_optimizers import _WATCHES
from scalora.rescale.remainder import DenseRemainder
from scalora.rescale.replay import launched_one_by_one

# Methods take turns, because a machine is faster at some moments than at others, of some steps each, because caches are
# cold in the first ones. The first rounds are until the places of a factored remainder are recorded.
_ROUNDS, _FIRST_ROUNDS = 10, 3
_STEPS, _FIRST_STEPS = 7, 3
_RANK, _TOKENS = 4, 48


class Method:
    """A model that a method trains.

    Args:
        layers: of the Llama.
        in_pairs: whether the optimizer is `PairAdamW`, and not AdamW.
        rescales: fields of `scalora.ScaLoraConfig`; None without rescales.
        blocks: of block signs; 0 for none.
    """

    def __init__(self, layers: int, in_pairs: bool, rescales: dict[str, Any] | None, blocks: int) -> None:
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4
        )
        lora = LoraConfig(r=_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        self._model = get_peft_model(LlamaForCausalLM(config).bfloat16(), lora).train()
        if blocks:
            add_block_signs(self._model, blocks)
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer: Optimizer = (
            PairAdamW(self._model, lr=1e-5) if in_pairs else AdamW(trained, lr=1e-5, fused=True)
        )
        if rescales is not None:
            ScaLora(self._model, self._optimizer, ScaLoraConfig(warmup_steps=0, **rescales))
            for module in self._model.modules():
                if isinstance(module, DenseRemainder):
                    module.changed = True  # as after a rescale, which a recording here does not execute
        self._tokens = torch.randint(64, (1, _TOKENS))

    def step(self) -> tuple[float, float]:
        """Take a step; the seconds of its passes and of the optimizer."""
        marks = [time.process_time()]
        with torch.autocast("cpu", torch.bfloat16):
            loss = self._model(input_ids=self._tokens, labels=self._tokens).loss
        loss.backward()
        marks.append(time.process_time())
        self._optimizer.step()
        marks.append(time.process_time())
        self._optimizer.zero_grad()
        return marks[1] - marks[0], marks[2] - marks[1]


METHODS: dict[str, tuple[bool, dict[str, Any] | None, int]] = {
    "LoRA": (False, None, 0),
    "columns, dense": (False, {"merge": "dense"}, 0),
    "columns, factored": (False, {"merge": "factored", "remainder_rank": 4 * _RANK}, 0),
    "LoRA with PairAdamW": (True, None, 0),
    "matrices, dense": (True, {"mode": "matrix", "merge": "dense"}, 0),
    "block signs with PairAdamW": (True, None, 8),
}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="of the Llama, each with seven adapted ones")
    layers = parser.parse_args().layers
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the adapter names no base
    one_by_one, replayed = (times(layers, replayed=replayed) for replayed in (False, True))
    print("| method | forward and backward pass, ms | optimizer step, launched one by one, ms | replayed, ms |")
    print("| --- | --- | --- | --- |")
    for name in METHODS:
        (passes, launched), (_, graphed) = one_by_one[name], replayed[name]
        print(f"| {name} | {' | '.join(f'{1e3 * each:.1f}' for each in (passes, launched, graphed))} |")


def times(layers: int, *, replayed: bool) -> dict[str, tuple[float, float]]:
    """Median seconds of a forward and a backward pass, and of an optimizer step, of each method. They take turns.

    Args:
        layers: of the model.
        replayed: whether recordings are replayed.
    """
    methods = {name: Method(layers, *settings) for name, settings in METHODS.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    gc.freeze()  # what there is so far would be looked through again and again
    _WATCHES.clear()  # engines look at the steps of each other's optimizers
    with (
        patch("scalora.rescaling.is_recordable", _always),
        patch("scalora.pair_adamw.is_recordable", _always),
        patch("scalora.rescale.replay.record", _record),
        nullcontext() if replayed else launched_one_by_one(),
    ):
        for number in range(_ROUNDS):
            for name, method in methods.items():
                taken = [method.step() for _ in range(_STEPS)]
                if number >= _FIRST_ROUNDS:
                    seconds[name] += taken[_FIRST_STEPS:]
    return {
        name: (median(p for p, _ in of_method), median(s for _, s in of_method)) for name, of_method in seconds.items()
    }


def _always(devices: Any) -> bool:
    return True


def _record(function: Callable[[], Any], device: torch.device, memory: Any) -> tuple[Callable[[], None], Any]:
    output = function()
    return lambda: None, output


if __name__ == "__main__":
    main()
