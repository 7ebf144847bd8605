"""`BlockSignsCallback`: block signs in a Trainer that makes the adapter itself, as TRL's do from a ``peft_config``."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalora.block_signs import add_block_signs, check_blocks
from scalora.integrations.transformers import calling, have_pair_adamw
from scalora.model.adapters import promote_adapters
from scalora.model.signed_factors import SignedFactor


class BlockSignsCallback(TrainerCallback):  # type: ignore[misc]
    """`scalora.add_block_signs` on the Trainer's model, before it makes an optimizer or resumes.

    The checkpoints and what is saved in the end are ordinary adapters. A Trainer with a model that
    `scalora.add_block_signs` has been called on needs no callback.

    Examples:
        >>> callbacks = [BlockSignsCallback(pair_adamw=True)]
        >>> SFTTrainer(model, args, train_dataset=…, peft_config=LoraConfig(…), callbacks=callbacks)

    Args:
        blocks: as in `scalora.add_block_signs`.
        pair_adamw: whether the Trainer's optimizer is to be `scalora.PairAdamW`, with the Trainer's learning rate,
            betas, epsilon and weight decay.

    Raises:
        ValueError: `blocks` is not a power of two above 1.
        RuntimeError: when training starts: the callback was added after the Trainer was made.
    """

    def __init__(self, blocks: int | None = None, *, pair_adamw: bool = False) -> None:
        check_blocks(blocks)
        self._blocks = blocks
        self._pair_adamw = pair_adamw

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the signs. Also converts the adapter to float32: TRL makes that of a quantised model bfloat16.

        Args:
            args: the Trainer's arguments, with the settings of `scalora.PairAdamW`.
            state: the Trainer's state; not used.
            control: the Trainer's control flags; not used.
            kwargs: other arguments of the event, with the model.

        Raises:
            ValueError: as `scalora.add_block_signs`.
            UnsupportedLayerError: as `scalora.add_block_signs`.
        """
        self._add_to(kwargs["model"])
        if (trainer := calling(Trainer)) is None:
            return
        if trainer.model_init is not None:  # each training makes a new model
            trainer.call_model_init = self._signing(trainer.call_model_init)
        if self._pair_adamw:
            have_pair_adamw(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the model has the signs.

        Args:
            args: the Trainer's arguments; not used.
            state: the Trainer's state; not used.
            control: the Trainer's control flags; not used.
            kwargs: other arguments of the event, with the model.

        Raises:
            RuntimeError: it has none: the callback was not there when the Trainer was made.
        """
        if not any(isinstance(module, SignedFactor) for module in kwargs["model"].modules()):
            raise RuntimeError(
                "the model has no block signs, as BlockSignsCallback was added after the Trainer was made: give it to "
                "the Trainer's constructor, callbacks=[BlockSignsCallback()]"
            )

    def _signing(self, call_model_init: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        """The Trainer's `call_model_init`, which adds the signs."""

        @wraps(call_model_init)
        def signed(*args: Any, **kwargs: Any) -> nn.Module:
            model = call_model_init(*args, **kwargs)
            self._add_to(model)
            return model

        return signed

    def _add_to(self, model: nn.Module) -> None:
        promote_adapters(model)
        add_block_signs(model, self._blocks)
