"""Full fine-tuning and GaLore: methods that train the weights of the base itself.

They can be restricted to the matrices that LoRA would adapt, as a comparison with adapters needs: training embeddings
and norms too may help for reasons that have nothing to do with the rank.

GaLore saves optimizer memory by keeping Adam's moments in a low-rank space. It uses the authors' package, galore-torch
(Apache-2.0), through the integration in Transformers, with one difference: Transformers drops the betas, the epsilon
and the weight decay of the training arguments, which are passed on here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, get_args

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from scalora.integrations.transformers import adamw_arguments
from scalora.model.adapters import UnsupportedLayerError
from scalora.rivals.method import Backward, BeforeTraining, Method, require_positive

IN_BLOCKS = r".*\.\d+\..*"
"""Matches the modules in a transformer's blocks, whose names contain a number; heads, embeddings and poolers lie
outside. The authors of GaLore and of APOLLO project the linear layers of the blocks only."""


Matrices = Literal["all", "adapted"]


@dataclass(frozen=True)
class TrainsBase(Method):
    """Base class of the methods that train the weights of the base.

    Raises:
        ValueError: there is no such choice of matrices.
    """

    learning_rate: ClassVar[float | None] = None
    """The default of the training arguments' class, which is meant for full fine-tuning."""

    ordinary_adapter: ClassVar[bool] = False
    before_training: ClassVar[BeforeTraining] = "copy"

    matrices: Matrices = "all"
    """What is trained. all: every weight, and the settings under `lora` have no effect. adapted: the base weights that
    LoRA with the settings under `lora` would adapt, and what it trains besides, such as a classifier's head and
    `modules_to_save`; a tied weight wherever it is used. Use it in a comparison with adapters. all by default, which is
    what full fine-tuning means elsewhere."""

    def __post_init__(self) -> None:
        if self.matrices not in get_args(Matrices):
            raise ValueError(f"matrices={self.matrices!r}: the choices are {', '.join(get_args(Matrices))}")

    def peft_config(self, settings: dict[str, Any]) -> PeftConfig | None:
        """The configuration of the adapter whose matrices are trained; None if all weights are.

        Args:
            settings: fields of `peft.LoraConfig`.

        Raises:
            TypeError: there is no such field.
            ValueError: a field has an invalid value.
        """
        return LoraConfig(**settings) if self.matrices == "adapted" else None

    def adapt(
        self, model: nn.Module, config: PeftConfig | None, backward: Backward, learning_rate: float | None = None
    ) -> nn.Module:
        """Freeze what is not to be trained.

        Args:
            model: the base model, which is modified.
            config: the configuration of the adapter, from `peft_config`.
            backward: not used.
            learning_rate: not used.

        Returns:
            The model to train, which has no adapter.

        Raises:
            UnsupportedLayerError: a weight is quantised, or an adapter would train something other than whole weights.
        """
        if config is not None:
            trained = _trained_with_adapter(model, config)
            for parameter in model.parameters():
                parameter.requires_grad_(parameter in trained)
        return model


@dataclass(frozen=True)
class Full(TrainsBase):
    """Full fine-tuning with the Trainer's optimizer, of all weights or of those that LoRA would adapt."""


def _trained_with_adapter(model: nn.Module, config: PeftConfig) -> set[nn.Parameter]:
    """The parameters that an adapter would train or add to. PEFT itself adapts a copy of the model without weights."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise UnsupportedLayerError(
                f"full fine-tuning can't train {name!r}: it is quantised ({parameter.dtype}); load the base without "
                "quantisation"
            )
    empty = {parameter: nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in model.parameters()}
    copied = copy.deepcopy(model, {id(parameter): counterpart for parameter, counterpart in empty.items()})
    with torch.device("meta"):
        adapted = get_peft_model(copied, config)
    found = {id(parameter) for parameter in adapted.parameters() if parameter.requires_grad}  # biases
    for name, module in adapted.named_modules():
        if isinstance(module, TrainableTokensWrapper):
            raise UnsupportedLayerError(
                f"full fine-tuning can't train single rows of module {name!r}: leave lora.trainable_token_indices out, "
                "or list the embeddings in lora.modules_to_save"
            )
        if isinstance(module, ModulesToSaveWrapper):
            found |= {id(parameter) for parameter in module.original_module.parameters()}
        elif isinstance(module, LoraLayer):
            found |= {id(parameter) for parameter in _adapted_parameters(name, module)}
    return {parameter for parameter, counterpart in empty.items() if id(counterpart) in found}


def _adapted_parameters(name: str, layer: LoraLayer) -> list[nn.Parameter]:
    """The base weight that an adapter is added to, and its bias if the adapter has one."""
    base = layer.get_base_layer()
    weight = layer.get_param() if isinstance(layer, ParamWrapper) else getattr(base, "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise UnsupportedLayerError(
            f"full fine-tuning can't find the weight of module {name!r} ({type(base).__name__}): leave it out of "
            "lora.target_modules"
        )
    return [weight, base.bias] if any(layer.lora_bias.values()) and base.bias is not None else [weight]


@dataclass(frozen=True)
class GaLore(TrainsBase):
    """GaLore: Adam in the subspace of the gradient's top singular vectors, which is updated periodically.

    Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv:2403.03507. The linear
    layers in the blocks are trained so, all other parameters by AdamW.

    Raises:
        ValueError: an option is not a positive number, or there is no such choice of matrices.
    """

    steps_entries: ClassVar[bool] = False
    cannot_resume: ClassVar[str | None] = (
        "the projections in its optimizer's state are objects, which a Trainer does not load from a checkpoint"
    )

    optim: ClassVar[str] = "galore_adamw"
    """Name of the optimizer in ``training.optim``."""

    package: ClassVar[str] = "galore-torch"
    """Package that provides the optimizer, by its name for pip."""

    rank: int = 8
    """Rank of the space that the moments are kept in. The default is that of LoRA, so that both keep moments of similar
    size."""

    update_proj_gap: int = 200
    """Steps after which the low-rank space is computed anew. The default is the authors'."""

    scale: float = 4.0
    """Factor of the update. The default is the authors' for fine-tuning at a learning rate of 3e-5; their 0.25 is for
    pre-training at 1e-2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self)

    def training_defaults(self) -> dict[str, Any]:
        """The training arguments that select and configure the optimizer.

        Raises:
            ImportError: the optimizer's package is not installed.
        """
        if find_spec(self.package.replace("-", "_")) is None:
            raise ImportError(f"the optimizer {self.optim} needs a package: pip install {self.package}")
        return {
            "optim": self.optim,
            "optim_target_modules": IN_BLOCKS,
            "optim_args": f"rank={self.rank},update_proj_gap={self.update_proj_gap},scale={self.scale}",
        }

    def optimizer(self, model: nn.Module, arguments: TrainingArguments) -> Optimizer:
        """The optimizer of Transformers, with the betas, the epsilon and the weight decay of the training arguments.

        Args:
            model: the model to train.
            arguments: the training arguments, from `training_defaults`.

        Raises:
            ValueError: the training arguments name another optimizer, or the model has no linear layers in blocks.
        """
        if arguments.optim != self.optim:
            raise ValueError(
                f"training.optim={getattr(arguments.optim, 'value', arguments.optim)!r}: the method needs the "
                f"optimizer {self.optim!r}; leave training.optim out"
            )
        cls, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        optimizer: Optimizer = cls(**keywords | adamw_arguments(arguments), no_deprecation_warning=True)
        return optimizer
