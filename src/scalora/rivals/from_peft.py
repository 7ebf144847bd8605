"""Methods built on PEFT's layers and optimizers: other scalings, starts and forms of LoRA, preconditioned gradients.

Each class names the paper, and what differs from the authors' code. The default learning rates assume a scaling of 1
(``lora_alpha`` = r). Those that differ from LoRA's do so because a step of AdamW moves every entry of a factor by the
learning rate, and therefore W by the learning rate times the size of the other factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
from peft import GraloraConfig, HiraConfig, LoraConfig, PeftConfig
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import TrainingArguments

from scalora.integrations.transformers import adamw_arguments
from scalora.model.adapters import LoraPair, find_lora_pairs
from scalora.rivals.method import Backward, BeforeTraining, Method, require_positive
from scalora.start import weight_gradients


@dataclass(frozen=True)
class RsLora(Method):
    """Rank-stabilised LoRA: the scaling is alpha/√r instead of alpha/r.

    Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732.
    """

    def peft_config(self, settings: dict[str, Any]) -> PeftConfig:
        """LoRA with ``use_rslora``.

        Args:
            settings: fields of `peft.LoraConfig`.

        Raises:
            ValueError: ``use_rslora`` is set to something else.
        """
        return LoraConfig(**_fixed(settings, use_rslora=True))


@dataclass(frozen=True)
class LoraPlus(Method):
    """LoRA+: the learning rate of ``lora_B`` is a multiple of that of ``lora_A``, with AdamW.

    Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv:2402.12354.

    Raises:
        ValueError: `lr_ratio` is not a positive number.
    """

    learning_rate: ClassVar[float | None] = 2.5e-4
    """Learning rate of ``lora_A``. That of ``lora_B`` is then 4e-3, the largest at which plain LoRA did well."""

    lr_ratio: float = 16.0
    """Learning rate of ``lora_B`` divided by that of ``lora_A``. The default, 2⁴, is the paper's recommendation."""

    def __post_init__(self) -> None:
        require_positive(self)

    def optimizer(self, model: nn.Module, arguments: TrainingArguments) -> Optimizer:
        """AdamW with a learning rate for each factor.

        Args:
            model: the model to train, with LoRA layers.
            arguments: the training arguments; their learning rate is that of ``lora_A``.
        """
        optimizer: Optimizer = create_loraplus_optimizer(
            model,
            AdamW,
            loraplus_lr_ratio=self.lr_ratio,
            loraplus_weight_decay=arguments.weight_decay,  # the groups of factors ignore weight_decay
            **adamw_arguments(arguments),
        )
        return optimizer


@dataclass(frozen=True)
class Dora(Method):
    """DoRA: the weight is ``m·(W + sBA)/‖W + sBA‖``, with a trained magnitude m for each output.

    Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353.
    """

    def peft_config(self, settings: dict[str, Any]) -> PeftConfig:
        """LoRA with ``use_dora``.

        Args:
            settings: fields of `peft.LoraConfig`.

        Raises:
            ValueError: ``use_dora`` is set to something else.
        """
        return LoraConfig(**_fixed(settings, use_dora=True))


@dataclass(frozen=True)
class Pissa(Method):
    """PiSSA: the adapter starts as the part of W with the top r singular values, and the base keeps the rest.

    Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation", arXiv:2404.02948.
    """

    learning_rate: ClassVar[float | None] = 1e-4
    """Lower than for LoRA, because the factors start larger: both with singular vectors of norm √σ, about 3.6 in
    SmolLM2-135M, where LoRA starts with rows of norm 0.58 in ``lora_A`` and zeros in ``lora_B``. The authors train at
    2e-5."""

    ordinary_adapter: ClassVar[bool] = False
    before_training: ClassVar[BeforeTraining] = "start"

    def peft_config(self, settings: dict[str, Any]) -> PeftConfig:
        """LoRA with ``init_lora_weights="pissa"``, which decomposes every weight exactly.

        Args:
            settings: fields of `peft.LoraConfig`.

        Raises:
            ValueError: ``init_lora_weights`` is set to something else.
        """
        return LoraConfig(**_fixed(settings, init_lora_weights="pissa"))


@dataclass(frozen=True)
class LoraGa(Method):
    """LoRA-GA: the adapter starts along the top 2r singular directions of the gradient.

    Wang, Yu and Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv:2407.05000, Algorithm 1. With
    the gradient G = UΣVᵀ of a weight with m outputs, ``lora_A`` starts as the first r columns of V and ``lora_B`` as
    columns r + 1 to 2r of U, all scaled to norm m^¼/√gamma, and their product is subtracted from the base weight. This
    is the authors' code with ``direction: ArB2r, scale: stable``. PEFT's ``init_lora_weights="lora_ga"`` differs: it
    multiplies ``lora_B`` by the singular values, leaves ``lora_A`` at norm 1, and does not support ``all-linear``.

    Raises:
        ValueError: `gamma` is not a positive number.
    """

    learning_rate: ClassVar[float | None] = 2.5e-4
    """Lower than for LoRA, because both factors start about twice as large as LoRA's ``lora_A``. The authors train at
    2e-5 with a scaling of 5.7, which moves W about as far."""

    ordinary_adapter: ClassVar[bool] = False
    before_training: ClassVar[BeforeTraining] = "start"

    gamma: float = 16.0
    """The initial factors are divided by √gamma. The default is that of the authors' code and of PEFT."""

    def __post_init__(self) -> None:
        require_positive(self)

    def peft_config(self, settings: dict[str, Any]) -> PeftConfig:
        """Plain LoRA. With ``lora_B`` zero, the gradient is that of the base model.

        Args:
            settings: fields of `peft.LoraConfig`.

        Raises:
            ValueError: ``init_lora_weights`` is set to something else than True.
        """
        return LoraConfig(**_fixed(settings, init_lora_weights=True))

    def adapt(
        self, model: nn.Module, config: PeftConfig | None, backward: Backward, learning_rate: float | None = None
    ) -> nn.Module:
        """Add the adapter and initialise it from gradients.

        Needs memory for the gradients of all adapted weights at the same time.

        Args:
            model: the base model, which is modified.
            config: the configuration of the adapter, from `peft_config`.
            backward: computes the gradients.
            learning_rate: not used.

        Returns:
            The model to train.

        Raises:
            UnsupportedLayerError: a base weight is quantised, or the adapter is not plain LoRA.
            ValueError: a layer got no finite gradient, or has fewer than 2r singular directions. No weight has been
                changed then.
        """
        adapted = super().adapt(model, config, backward)
        pairs = find_lora_pairs(adapted)
        gradients = weight_gradients(adapted, pairs, partial(backward, adapted))
        starts = [self._start(pair, G) for pair, G in zip(pairs, gradients, strict=True)]
        with torch.no_grad():
            for pair, (lora_B, lora_A) in zip(pairs, starts, strict=True):
                pair.lora_B.copy_(lora_B)
                pair.lora_A.copy_(lora_A)
                product = pair.scaling * pair.lora_B @ pair.lora_A
                pair.weight.copy_(pair.weight.float() - pair.oriented(product))
        return adapted

    def _start(self, pair: LoraPair, G: Tensor | None) -> tuple[Tensor, Tensor]:
        """Initial ``lora_B`` (m, r) and ``lora_A`` (r, n) for the gradient G (m, n)."""
        if G is None or not G.isfinite().all():
            raise ValueError(f"module {pair.name!r} got no finite gradient, which LoRA-GA is initialised from")
        G = G.float()
        r = pair.r
        if 2 * r > min(G.shape):
            raise ValueError(
                f"rank {r} is too large for module {pair.name!r} of shape {tuple(G.shape)}: LoRA-GA needs 2r singular "
                f"directions, so choose r ≤ {min(G.shape) // 2} or leave the module out of target_modules"
            )
        # As accurate as in the authors' code; an exact decomposition of a large layer takes minutes.
        U, _, V = torch.svd_lowrank(G, q=min(4 * r, *G.shape), niter=4)
        norm = G.shape[0] ** 0.25 / math.sqrt(self.gamma)
        return norm * U[:, r : 2 * r], norm * V[:, :r].mT


@dataclass(frozen=True)
class Hira(Method):
    """HiRA: the weight is ``W + W ⊙ BA``.

    Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", ICLR 2025. Of
    the settings under ``lora:`` it takes ``r``, ``lora_dropout`` (its ``hira_dropout``), and the choice of adapted and
    saved modules. It has no scaling; ``lora_alpha`` is ignored.
    """

    learning_rate: ClassVar[float | None] = 4.5e-3
    """Higher than for LoRA, because the adapter is multiplied by the small entries of W. PEFT's comparison of methods
    uses this rate, and 1e-4 for LoRA."""

    def peft_config(self, settings: dict[str, Any]) -> PeftConfig:
        """The configuration of PEFT's HiRA.

        Args:
            settings: fields of `peft.LoraConfig`.

        Raises:
            TypeError: a field other than ``lora_alpha`` that HiRA does not have.
        """
        without_alpha = {name: value for name, value in settings.items() if name != "lora_alpha"}
        return HiraConfig(**_renamed(without_alpha, HiraConfig, "HiRA", lora_dropout="hira_dropout"))


@dataclass(frozen=True)
class Gralora(Method):
    """GraLoRA: each of k × k blocks of the update has factors of rank r/k of its own.

    Jung et al., "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning", arXiv:2505.20355. Of the
    settings under ``lora:`` it takes ``r``, ``lora_alpha`` (its ``alpha``), ``lora_dropout`` (its ``gralora_dropout``),
    and the choice of adapted and saved modules.

    Raises:
        ValueError: `k` is not a positive integer.
    """

    k: int = 2
    """Number of parts of each side of an update, of which r is a multiple. The default is PEFT's, the authors' for
    r = 32 and below."""

    ordinary_adapter: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_positive(self)

    def peft_config(self, settings: dict[str, Any]) -> PeftConfig:
        """The configuration of PEFT's GraLoRA.

        Args:
            settings: fields of `peft.LoraConfig`.

        Raises:
            TypeError: a field that GraLoRA does not have.
        """
        names = {"lora_alpha": "alpha", "lora_dropout": "gralora_dropout"}
        return GraloraConfig(gralora_k=self.k, **_renamed(settings, GraloraConfig, "GraLoRA", **names))


@dataclass(frozen=True)
class Riemannian(Method):
    """Riemannian preconditioning: LoRA trained by AdamW with preconditioned gradients.

    Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", arXiv:2402.02347. With A and
    B as PEFT names them, the gradient of ``lora_A`` is multiplied by ``(BᵀB + reg·I)⁻¹`` from the left, and that of
    ``lora_B`` by ``(AAᵀ + reg·I)⁻¹`` from the right.

    Raises:
        ValueError: `reg` is not a positive number.
    """

    steps_entries: ClassVar[bool] = False

    reg: float = 1e-2
    """Regularisation of the inverses. The default is PEFT's, which limits the inverse while B is still near its start
    at zero; the authors use 1e-6."""

    def __post_init__(self) -> None:
        require_positive(self)

    def optimizer(self, model: nn.Module, arguments: TrainingArguments) -> Optimizer:
        """AdamW on the preconditioned gradients.

        Args:
            model: the model to train, with LoRA layers.
            arguments: the training arguments, with the settings of AdamW.
        """
        optimizer: Optimizer = create_riemannian_optimizer(model, AdamW, reg=self.reg, **adamw_arguments(arguments))
        return optimizer


def _renamed(settings: dict[str, Any], config: type[PeftConfig], method: str, **names: str) -> dict[str, Any]:
    """The settings by the names that another configuration of PEFT's has for them; `TypeError` if it has none."""
    renamed = {names.get(name, name): value for name, value in settings.items()}
    known = [field.name for field in fields(config)]
    for name, value in renamed.items():
        if name not in known:
            raise TypeError(f"{name}={value!r}: {method} has no such field; leave it out")
    return renamed


def _fixed(settings: dict[str, Any], **fixed: Any) -> dict[str, Any]:
    """The settings, and those that define the method; `ValueError` if they contradict."""
    for name, value in fixed.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{name}={settings[name]!r}: the method itself sets {name}={value!r}; leave it out")
    return settings | fixed
