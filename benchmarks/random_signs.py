"""Trains a run of a study with random signs on the entries of LoRA's update: with or without matrix scaling.

    python benchmarks/random_signs.py recipes/studies/minilm-cities.yaml matrix 2.4e-3 --seed 0 --run.model MODEL

`lora` is LoRA with AdamW, `pair_adamw` LoRA with `PairAdamW`, `matrix` adds the rescales. The weight of every adapted
layer is ``W + s·S ⊙ (B·A)``, with S as in the method `signed`; what a rescale moves into W gets the same signs. With
``--blocks k`` there is one random sign for each of k × k blocks. All else is the same: in the space of ``S ⊙ W``, it is
the same method. An experiment by patches, for float32 on one device; it prints the final evaluation and saves no model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from peft.tuners.lora.layer import Linear
from torch import Tensor
from torch.nn.functional import linear

from scalora.cli import app
from scalora.rescale.remainder import DenseRemainder
from scalora.rivals.signed import signs_of

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "pair_adamw": {"method": "lora", "optimizer": "pair_adamw"},
    "matrix": {"method": "scalora", "optimizer": "pair_adamw", "scalora": {"native": False}},
}


class Signs:
    """The signs of each weight, drawn at its first use.

    Args:
        blocks: number of parts of each side; 0 for a sign of its own for each entry.
    """

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._of: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, weight: Tensor) -> Tensor:
        """The signs of a weight.

        Args:
            weight: the base weight of a layer; kept alive, so that its `id` stays its own.
        """
        if id(weight) not in self._of:
            self._of[id(weight)] = self._drawn(f"weight {len(self._of)}", weight).to(weight.dtype), weight
        return self._of[id(weight)][0]

    def _drawn(self, name: str, weight: Tensor) -> Tensor:
        if not self._blocks:
            return signs_of(name, weight)
        of_rows, of_columns = (torch.arange(size) * self._blocks // size for size in weight.shape)
        return signs_of(name, torch.empty(self._blocks, self._blocks))[of_rows][:, of_columns]


def patch_in(signs: Signs) -> None:
    """Give all LoRA layers, and all merges, the signs.

    Args:
        signs: the signs.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base, (adapter,) = self.base_layer, self.active_adapters
        product = self.lora_B[adapter].weight @ self.lora_A[adapter].weight
        return linear(x, base.weight + self.scaling[adapter] * signs.of(base.weight) * product, base.bias)

    @torch.no_grad()
    def add(self: Any, weight: Tensor, left: Tensor, right: Tensor) -> None:
        self.changed = True
        weight.data += signs.of(weight) * (left @ right.mT)

    Linear.forward = forward
    DenseRemainder.add = add  # type: ignore[method-assign]


def main() -> None:
    """Train and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a study file, whose run is taken")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("learning_rate", type=float)
    parser.add_argument("--blocks", type=int, default=0, help="of equal signs, for each side; 0: a sign for each entry")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run.model", dest="model", help="in place of the study's")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    patch_in(Signs(arguments.blocks))
    run = yaml.safe_load(arguments.study.read_text())["run"] | METHODS[arguments.method]
    run |= {"save_model": False, "lora": {"r": arguments.rank, "lora_alpha": arguments.rank}}
    run["model"] = arguments.model or run["model"]
    seeds = {"seed": arguments.seed, "data_seed": arguments.seed}
    run["training"] |= {"learning_rate": arguments.learning_rate} | seeds
    run.pop("track_updates", None)  # by the adapter's factors, which are another update without signs
    with tempfile.TemporaryDirectory() as folder:
        run["output_dir"] = str(Path(folder, "run"))
        config = Path(folder, "run.yaml")
        config.write_text(yaml.safe_dump(run))
        app(["train", str(config)], standalone_mode=False)
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    scores = {name: value for name, value in summary.items() if name.startswith("eval_") and isinstance(value, float)}
    print(
        json.dumps(
            {"method": arguments.method, "rank": arguments.rank, "blocks": arguments.blocks, **seeds, **scores}
            | {"learning_rate": arguments.learning_rate, "seconds": round(summary["training_seconds"])}
        )
    )


if __name__ == "__main__":
    main()
