"""Runs PEFT's own MetaMathQA benchmark with ScaLoRA: the code of a checkout of PEFT, unchanged.

    python benchmarks/peft_metamathqa/run.py CHECKOUT EXPERIMENT [options of its run.py, such as -v --clean]

CHECKOUT is the folder of a clone of huggingface/peft, whose ``src`` is imported, and EXPERIMENT the folder of an
experiment, such as experiments/lora/llama-3.2-3B-rank32-scalora here. One whose ``optimizer_type`` is "scalora" is
trained with ScaLoRA: its ``optimizer_kwargs`` are ``lr`` and ``weight_decay`` and any settings of
`scalora.ScaLoraConfig` but ``merge``, which is factored. All others run as they would without this file. Results are
where the benchmark puts them, in CHECKOUT/method_comparison/MetaMathQA, with an entry ``scalora`` for what was done.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "scalora"
"""The optimizer_type."""

_BENCHMARK = Path("method_comparison", "MetaMathQA")

# What the benchmark itself checks the other fields of its config with.
_KNOWN_TYPE = "AdamW"


class Wrapped:
    """ScaLoRA in the benchmark's helpers: replaces four of the functions of its ``utils.py``.

    Args:
        utils: the module.

    Attributes:
        engine: what has been attached; None before, and in experiments of other methods.
    """

    def __init__(self, utils: ModuleType) -> None:
        self.engine: Any = None
        self._optimizer = ""
        self._sizes: dict[str, int] = {}
        self._utils = utils
        self._check = utils.TrainConfig.__post_init__
        self._make, self._size, self._log = utils.get_optimizer_and_scheduler, utils.get_file_size, utils.log_to_file
        utils.TrainConfig.__post_init__ = lambda config: self._checked(config)
        utils.get_optimizer_and_scheduler = self.optimizer_and_scheduler
        utils.get_file_size = self.file_size
        utils.log_to_file = self.log

    def _checked(self, config: Any) -> None:
        """The benchmark's own checks, of all but the optimizer's name."""
        name = config.optimizer_type
        if name == NAME:
            config.optimizer_type = _KNOWN_TYPE
        self._check(config)
        config.optimizer_type = name
        if name == NAME and config.compile:
            raise ValueError("compile: true is not for ScaLoRA, whose layers change between steps: leave it out")

    def optimizer_and_scheduler(
        self, model: Any, *, optimizer_type: str, max_steps: int, lr_scheduler_arg: str | None, **settings: Any
    ) -> tuple[Any, Any]:
        """The benchmark's optimizer and scheduler, with ScaLoRA attached to model and optimizer where it is asked for.

        Args:
            model: the PEFT model.
            optimizer_type: "scalora", or what the benchmark knows.
            max_steps: steps of the schedule.
            lr_scheduler_arg: name of the schedule.
            settings: ``lr``, which is LoRA's, or with ``mode: matrix`` that of full fine-tuning; ``weight_decay``; and
                fields of `scalora.ScaLoraConfig`. Of another optimizer, its arguments.

        Raises:
            ValueError: there is no such setting, or ``merge`` is given.
        """
        schedule = {"max_steps": max_steps, "lr_scheduler_arg": lr_scheduler_arg}
        if optimizer_type != NAME:
            return tuple(self._make(model, optimizer_type=optimizer_type, **schedule, **settings))
        from scalora import PairAdamW, ScaLora, ScaLoraConfig

        rates = {key: settings.pop(key) for key in ("lr", "weight_decay") if key in settings}
        if "merge" in settings:
            raise ValueError(
                f"merge={settings['merge']!r}: it is factored, as the benchmark saves adapters; leave it out"
            )
        # The base is in bfloat16 and only the adapter is saved: what is merged into the base would be rounded and lost.
        config = ScaLoraConfig.from_dict(settings | {"merge": "factored"})
        if config.mode == "matrix":
            optimizer = PairAdamW(model, **rates)
            scheduler = self._schedule(optimizer, **schedule)
        else:
            optimizer, scheduler = self._make(model, optimizer_type=_KNOWN_TYPE, **schedule, **rates)
        self._optimizer = type(optimizer).__name__
        self.engine = ScaLora(model, optimizer, config)
        return optimizer, scheduler

    def _schedule(self, optimizer: Any, max_steps: int, lr_scheduler_arg: str | None) -> Any:
        """The benchmark's schedule for an optimizer that it does not make itself."""
        from transformers import get_cosine_schedule_with_warmup

        if lr_scheduler_arg is None:
            return self._utils.DummyScheduler(optimizer.param_groups[0]["lr"])
        if lr_scheduler_arg != "cosine":
            raise ValueError(f"lr_scheduler={lr_scheduler_arg!r}: the benchmark has cosine and null")
        return get_cosine_schedule_with_warmup(optimizer, int(self._utils.WARMUP_STEP_RATIO * max_steps), max_steps)

    def file_size(self, model: Any, **options: Any) -> int:
        """The benchmark's size of the saved adapter: with ScaLoRA the whole update, as an ordinary adapter.

        Args:
            model: the trained model.
            options: further arguments of the benchmark's function.
        """
        size = int(self._size(model, **options))
        if self.engine is None:
            return size
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            rank = json.loads(Path(folder, "adapter_config.json").read_text())["r"]
            written = Path(folder, self._utils.SAFETENSORS_WEIGHTS_NAME).stat().st_size
        factors = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        self._sizes = {
            "rank_of_saved_adapter": rank,
            "bytes_of_trained_factors": factors,
            "bytes_of_remainder": written - factors,
        }
        return written  # the benchmark's own number, which is 99999999 before Python 3.12

    def log(self, *, log_data: dict[str, Any], **options: Any) -> None:
        """The benchmark's result file, with an entry that says what was done.

        Args:
            log_data: the results.
            options: further arguments of the benchmark's function.
        """
        if self.engine is not None:
            import scalora

            log_data[NAME] = {
                "version": scalora.__version__,
                "optimizer": self._optimizer,
                "config": self.engine.config.to_dict(),
                "steps": self.engine.step,
                "metrics": self.engine.metrics(),
                **self._sizes,
                "note": "Made by benchmarks/peft_metamathqa/run.py of scalora, which attaches ScaLoRA to the model and "
                "the optimizer of the benchmark. The trained factors and the remainder are saved as one ordinary "
                "LoRA adapter, whose size file_size is.",
            }
        self._log(log_data=log_data, **options)


def main(words: list[str] | None = None) -> None:
    """Run the benchmark.

    Args:
        words: the words of the command line. None: those that there are.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of a clone of huggingface/peft")
    parser.add_argument("experiment", type=Path, help="folder of an experiment: …/experiments/METHOD/NAME")
    arguments, options = parser.parse_known_args(words)
    benchmark, experiment = (arguments.checkout / _BENCHMARK).resolve(), arguments.experiment.resolve()
    if not (benchmark / "run.py").is_file():
        raise SystemExit(
            f"{str(arguments.checkout)!r} is no clone of huggingface/peft: it has no {_BENCHMARK / 'run.py'}"
        )
    if not experiment.is_dir() or experiment.parents[1].name != "experiments":
        raise SystemExit(f"{str(arguments.experiment)!r} is no folder …/experiments/METHOD/NAME")
    # As its own command has it: its helpers by their bare names, and the experiment relative to where it is run.
    sys.path[:0] = [str(benchmark), str(arguments.checkout.resolve() / "src")]
    os.chdir(experiment.parents[2])
    import utils

    Wrapped(utils)
    sys.argv = ["run.py", str(experiment.relative_to(experiment.parents[2])), *options]
    runpy.run_path(str(benchmark / "run.py"), run_name="__main__")


if __name__ == "__main__":
    main()
