"""`ScaLoraCallback`: ScaLoRA in Lightning's Trainer, with automatic or manual optimisation.

Lightning Fabric needs none: ``ScaLora(model, optimizer)`` before or after ``fabric.setup`` is all. Checked with
Lightning 2.6; an import of this module needs it, scalora does not.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.utils.hooks import RemovableHandle

from scalora.config import ScaLoraConfig
from scalora.engine import ScaLora
from scalora.model.adapters import find_lora_pairs
from scalora.model.attachment import attachment_of
from scalora.rescale.optimizers import UnsupportedOptimizerError
from scalora.saving.attach import attach
from scalora.saving.errors import StateError


class ScaLoraCallback(Callback):  # type: ignore[misc]
    """Adds ScaLoRA to a Lightning Trainer.

    Examples:
        >>> trainer = lightning.Trainer(callbacks=[ScaLoraCallback(ScaLoraConfig())])
        >>> trainer.fit(module)  # a LightningModule with a PeftModel in it

    Attaches `ScaLora` when fitting starts, to the optimizer that holds the adapter, and detaches it at the end. Its
    metrics are logged every ``log_every_n_steps`` steps.

    Checkpoints and ``ckpt_path`` work as usual: what Lightning saves of the module and of its optimizers is all that a
    run needs to go on to the same weights. Dropout masks and the order of data follow Lightning, which does not save
    the state of random number generators.

    Args:
        config: the settings. None: the defaults.

    Attributes:
        config: the settings.
        engine: the `ScaLora` of the last fit; None before one.
    """

    def __init__(self, config: ScaLoraConfig | None = None) -> None:
        super().__init__()
        self.config = config or ScaLoraConfig()
        self.engine: ScaLora | None = None
        self._hook: RemovableHandle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the model take the remainders in a checkpoint, which Lightning loads before there is an optimizer.

        Args:
            trainer: Lightning's Trainer; not used.
            pl_module: the module.
            stage: ``"fit"``, ``"test"`` and so on; not used.
        """

        def before_loading(module: LightningModule, *args: Any) -> None:
            if attachment_of(module) is None:
                attach(module, self.config.merge, self.config.remainder_rank)

        self._hook = pl_module.register_load_state_dict_pre_hook(before_loading)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the engine, before Lightning loads the state of the optimizers.

        Args:
            trainer: Lightning's Trainer, with the optimizers.
            pl_module: the module.

        Raises:
            UnsupportedLayerError: a module is not supported; the message names it.
            UnsupportedOptimizerError: the optimizer's state can't be transported, or is DeepSpeed's; the message says
                why.
            ValueError: no optimizer holds the adapter.
        """
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise UnsupportedOptimizerError(
                "Lightning's DeepSpeedStrategy is not supported: use DeepSpeed through transformers.Trainer or "
                "Accelerate, or strategy='ddp'"
            )
        factors = {
            id(p)
            for pair in find_lora_pairs(pl_module, sharded=True, all_shapes=True)
            for p in (pair.lora_A, pair.lora_B)
        }
        for optimizer in trainer.optimizers:
            if any(id(p) in factors for group in optimizer.param_groups for p in group["params"]):
                self.engine = ScaLora(pl_module, optimizer, self.config)
                return
        raise ValueError(
            f"no optimizer of {type(pl_module).__name__} holds the adapter's parameters: create it from "
            "self.parameters() in configure_optimizers()"
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that a resumed run has found what it needs.

        Args:
            trainer: Lightning's Trainer.
            pl_module: the module; not used.

        Raises:
            StateError: the checkpoint was written without ScaLoRA.
        """
        if trainer.ckpt_path and trainer.global_step and self.engine is not None and not self.engine.step:
            raise StateError(
                f"fit() resumes {str(trainer.ckpt_path)!r} at step {trainer.global_step}, but it was written without "
                "ScaLoRA: leave the callback out, or load the weights alone and start a new run"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the metrics, in the steps that Lightning logs.

        Args:
            trainer: Lightning's Trainer.
            pl_module: the module.
            outputs: of the training step; not used.
            batch: the batch; not used.
            batch_idx: its number; not used.
        """
        every = trainer.log_every_n_steps
        if self.engine is not None and every and self.engine.step and self.engine.step % every == 0:
            pl_module.log_dict(self.engine.metrics())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach the engine. The next fit attaches a new one.

        Args:
            trainer: Lightning's Trainer; not used.
            pl_module: the module; not used.
        """
        if self.engine is not None:
            self.engine.detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hook of `setup` away.

        Args:
            trainer: Lightning's Trainer; not used.
            pl_module: the module; not used.
            stage: ``"fit"``, ``"test"`` and so on; not used.
        """
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
