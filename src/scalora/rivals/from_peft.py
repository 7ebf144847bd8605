"""Rivals on PEFT's layers and optimizers: rsLoRA, LoRA+, DoRA, PiSSA, LoRA-GA, HiRA, Riemannian preconditioning.

Their learning rates assume a scaling of 1 (``lora_alpha`` = r). Where LoRA's is not taken, the reason is that one step
of AdamW moves each entry of a factor by the rate, and so W by the rate times the size of the other factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
from peft import HiraConfig, LoraConfig, PeftConfig
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import TrainingArguments

from scalora.model.adapters import LoraPair, find_lora_pairs
from scalora.rivals.method import Backward, Method, adamw_arguments, require_positive
from scalora.start import weight_gradients


@dataclass(frozen=True)
class RsLora(Method):
    """Rank-stabilised LoRA: the scaling is alpha/√r instead of alpha/r (Kalajdzievski, arXiv:2312.03732)."""

    def peft_config(self, settings: dict[str, Any]) -> PeftConfig:
        """LoRA's with ``use_rslora``."""
        return LoraConfig(**_fixed(settings, use_rslora=True))


@dataclass(frozen=True)
class LoraPlus(Method):
    """LoRA+: ``lora_B`` learns `lr_ratio` times as fast as ``lora_A`` (Hayou et al., arXiv:2402.12354), with AdamW.

    Raises:
        ValueError: lr_ratio is not a positive number.
    """

    learning_rate: ClassVar[float | None] = 2.5e-4
    """Of ``lora_A``: ``lora_B`` then has 4e-3, the largest that did well for plain LoRA."""

    lr_ratio: float = 16.0
    """η_B/η_A. The paper's recommendation, 2⁴."""

    def __post_init__(self) -> None:
        """Check the option."""
        require_positive(self)

    def optimizer(self, model: nn.Module, arguments: TrainingArguments) -> Optimizer:
        """AdamW with a learning rate for each factor."""
        optimizer: Optimizer = create_loraplus_optimizer(
            model,
            AdamW,
            loraplus_lr_ratio=self.lr_ratio,
            loraplus_weight_decay=arguments.weight_decay,  # its groups don't take AdamW's weight_decay
            **adamw_arguments(arguments),
        )
        return optimizer


@dataclass(frozen=True)
class Dora(Method):
    """DoRA: ``m·(W + sBA)/‖W + sBA‖`` with a trained magnitude m for each output (Liu et al., arXiv:2402.09353)."""

    def peft_config(self, settings: dict[str, Any]) -> PeftConfig:
        """LoRA's with ``use_dora``."""
        return LoraConfig(**_fixed(settings, use_dora=True))


@dataclass(frozen=True)
class Pissa(Method):
    """PiSSA: the adapter starts as W's top singular part, the base keeps the rest (Meng et al., arXiv:2404.02948)."""

    learning_rate: ClassVar[float | None] = 1e-4
    """Both factors start with singular vectors as long as √σ: about 3.6 in SmolLM2-135M, where ``lora_A`` starts with
    rows as long as 0.58 and ``lora_B`` with zeros. The authors train at 2e-5."""

    ordinary_adapter: ClassVar[bool] = False

    def peft_config(self, settings: dict[str, Any]) -> PeftConfig:
        """LoRA's with ``init_lora_weights="pissa"``: an exact singular value decomposition of every weight."""
        return LoraConfig(**_fixed(settings, init_lora_weights="pissa"))


@dataclass(frozen=True)
class LoraGa(Method):
    """LoRA-GA: the adapter starts along the gradient's top 2r singular directions (Wang et al., arXiv:2407.05000).

    With G = UΣVᵀ, ``lora_A`` starts as V's first r columns and ``lora_B`` as U's next r, all of norm m^¼/√gamma for a
    weight with m outputs; their product is taken off the base weight. The paper's Algorithm 1, and its code with
    ``direction: ArB2r, scale: stable``. PEFT's ``init_lora_weights="lora_ga"`` is something else: it multiplies
    ``lora_B`` by the gradient's singular values and leaves ``lora_A`` at norm 1, and does not know ``all-linear``.

    Raises:
        ValueError: gamma is not a positive number.
    """

    learning_rate: ClassVar[float | None] = 2.5e-4
    """Both factors start about twice as large as LoRA's one. The authors train at 2e-5 with a scaling of 5.7, which
    moves W about as far."""

    ordinary_adapter: ClassVar[bool] = False

    gamma: float = 16.0
    """Shrinks the start. The authors' code and PEFT have 16."""

    def __post_init__(self) -> None:
        """Check the option."""
        require_positive(self)

    def peft_config(self, settings: dict[str, Any]) -> PeftConfig:
        """Plain LoRA's: with ``lora_B`` zero the function, and so the gradient, is the base's."""
        return LoraConfig(**_fixed(settings, init_lora_weights=True))

    def adapt(self, model: nn.Module, config: PeftConfig | None, backward: Backward) -> nn.Module:
        """Add the adapter and start it from the gradient of `backward`'s batches.

        Needs memory for the gradients of all adapted weights, once.

        Raises:
            UnsupportedLayerError: a quantised base weight, or an adapter that is not plain LoRA.
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
        """``lora_B`` (m, r) and ``lora_A`` (r, n)."""
        if G is None or not G.isfinite().all():
            raise ValueError(f"module {pair.name!r} got no finite gradient for LoRA-GA to start from")
        G = G.float()
        r = pair.r
        if 2 * r > min(G.shape):
            raise ValueError(
                f"rank {r} is too large for module {pair.name!r} of shape {tuple(G.shape)}: LoRA-GA needs 2r singular "
                f"directions, so choose r ≤ {min(G.shape) // 2} or leave the module out of target_modules"
            )
        # The authors' accuracy; an exact decomposition of a large layer takes minutes.
        U, _, V = torch.svd_lowrank(G, q=min(4 * r, *G.shape), niter=4)
        norm = G.shape[0] ** 0.25 / math.sqrt(self.gamma)
        return norm * U[:, r : 2 * r], norm * V[:, :r].mT


@dataclass(frozen=True)
class Hira(Method):
    """HiRA: ``W + W ⊙ BA`` (Huang et al., ICLR 2025).

    Of the settings under ``lora:`` it has ``r`` and which modules are adapted or saved; ``lora_dropout`` is its
    ``hira_dropout``. It has no scaling: ``lora_alpha`` is dropped.
    """

    learning_rate: ClassVar[float | None] = 4.5e-3
    """W's small entries multiply the adapter. PEFT's comparison of methods has this, with 1e-4 for LoRA."""

    def peft_config(self, settings: dict[str, Any]) -> PeftConfig:
        """PEFT's HiRA adapter.

        Raises:
            TypeError: a field that HiRA does not have, other than ``lora_alpha``.
        """
        renamed = {
            "hira_dropout" if name == "lora_dropout" else name: value
            for name, value in settings.items()
            if name != "lora_alpha"
        }
        known = [field.name for field in fields(HiraConfig)]
        for name, value in renamed.items():
            if name not in known:
                raise TypeError(f"{name}={value!r}: HiRA has no such field; leave it out")
        return HiraConfig(**renamed)


@dataclass(frozen=True)
class Riemannian(Method):
    """LoRA with preconditioned gradients (Zhang and Pilanci, arXiv:2402.02347), stepped by AdamW.

    ``lora_A``'s gradient is multiplied by ``(BᵀB + reg·I)⁻¹`` from the left, ``lora_B``'s by ``(AAᵀ + reg·I)⁻¹`` from
    the right, with A and B as PEFT names them.

    Raises:
        ValueError: reg is not a positive number.
    """

    reg: float = 1e-2
    """PEFT's, which tames the inverse while B is still near its zero start. The authors' is 1e-6."""

    def __post_init__(self) -> None:
        """Check the option."""
        require_positive(self)

    def optimizer(self, model: nn.Module, arguments: TrainingArguments) -> Optimizer:
        """AdamW over the preconditioned gradients."""
        optimizer: Optimizer = create_riemannian_optimizer(model, AdamW, reg=self.reg, **adamw_arguments(arguments))
        return optimizer


def _fixed(settings: dict[str, Any], **fixed: Any) -> dict[str, Any]:
    """The settings with those that make the method what it is."""
    for name, value in fixed.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{name}={settings[name]!r}: the method itself sets {name}={value!r}; leave it out")
    return settings | fixed
