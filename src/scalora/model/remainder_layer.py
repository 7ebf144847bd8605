"""What a PEFT LoRA layer is once a remainder belongs to it (paper, section 6).

Whoever holds the model can reach its layers by many ways: the PeftModel, a wrapper around it, the model inside it,
Transformers' own adapter methods, a copy. All of them end at the layers, so this is where the remainder is added,
merged, scaled and unloaded with its adapter, and where uses that need the original base are refused once a dense
remainder has changed it. Checked with PEFT 0.21.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from scalora.model.base_weights import BaseWeights, is_float
from scalora.model.factor_guard import FactorGuard
from scalora.model.layers import (
    configured_scaling,
    experts_of,
    factor_keys,
    factors_of,
    is_distributed,
    is_partitioned,
    stored_transposed,
    weight_key,
)
from scalora.model.matrices import matrices_of
from scalora.model.mixed_class import MixedIn, mix_in, plain_class
from scalora.model.remainder_forward import WithRemainder, remainder_of_embedding
from scalora.model.shared_pass import autocasts
from scalora.model.whole_factors import part_factors, whole_factors
from scalora.rescale.moments import is_being_captured
from scalora.rescale.remainder import DenseRemainder, FactoredRemainder, Remainder

if TYPE_CHECKING:
    from scalora.model.attachment import Attachment

REMAINDER = "frozen_remainder"
"""Name of the submodule of a PEFT layer that holds its remainder."""


class ChangedBaseError(RuntimeError):
    """Something needs the original base weights, which ScaLoRA has changed. The message says what to do instead."""


class RemainderLayer(MixedIn, LoraLayer):  # type: ignore[misc]
    """Mixed into the class of a LoRA layer by `give_remainder`.

    Attributes:
        trained_adapter: name of the adapter that the remainder belongs to.
        base_is_tied: whether the base weight is another module's, too.
        factor_guard: the guard of the model's factors, shared by its layers.
        attachment: what ScaLoRA keeps on the model, shared by its layers.
    """

    trained_adapter: str
    base_is_tied: bool
    factor_guard: FactorGuard
    attachment: Attachment
    _before_merge: BaseWeights | None = None

    @property
    def remainder(self) -> Remainder:
        """The layer's remainder."""
        # Looked up in every forward pass, so without the detour of a module's attributes.
        remainder: Remainder = self._modules[REMAINDER]
        return remainder

    def factored_remainder(self) -> FactoredRemainder:
        """The layer's remainder, which must be factored."""
        remainder = self.remainder
        assert isinstance(remainder, FactoredRemainder)
        return remainder

    @property
    def base_weight(self) -> Any:
        """The base layer's weight; None if it has none of that name, as some quantised layers."""
        return getattr(self.get_base_layer(), weight_key(self), None)

    @property
    def base_weight_name(self) -> str:
        """The name of the base weight in the layer."""
        return "base_layer.weight"

    @property
    def has_remainder(self) -> bool:
        """Whether anything has been added to the remainder."""
        return self.remainder.changed

    @property
    def trained_factors(self) -> tuple[Tensor, Tensor]:
        """PEFT's lora_A and lora_B of the adapter that the remainder belongs to."""
        return factors_of(self, self.trained_adapter)

    @property
    def trained_scaling(self) -> float:
        """The present scaling of the adapter that the remainder belongs to."""
        return float(self.scaling[self.trained_adapter])

    @property
    def remainder_scaling(self) -> float:
        """What a factored remainder is multiplied by: 1, unless PEFT's scaling has been changed from the configured."""
        return self.trained_scaling / configured_scaling(self, self.trained_adapter)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """PEFT's forward pass.

        Args:
            x: the layer's input.
            args: other arguments of the base layer.
            kwargs: other arguments of PEFT's layer and the base layer.

        Returns:
            The layer's output: a tensor, or what a module whose parameter is adapted returns.

        Raises:
            ChangedBaseError: the original base is needed, or the merged part of the update would have to be scaled.
            ChangedFactorsError: something other than an optimizer has overwritten the factors.
        """
        remainder = self.remainder
        if remainder.changed:
            self._check_use(remainder, kwargs.get("adapter_names"))
        return super().forward(x, *args, **kwargs)

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        # PEFT casts to the adapter's float32 what autocast casts back for the products: two passes over the input.
        if isinstance(self._modules.get(REMAINDER), FactoredRemainder) and isinstance(x, Tensor) and autocasts(x):
            return x
        return super()._cast_input_dtype(x, dtype)

    def cast_as_peft(self, x: Any, dtype: torch.dtype) -> Any:
        """The input in the dtype to which PEFT casts it.

        Args:
            x: the layer's input.
            dtype: the adapter's dtype.
        """
        return super()._cast_input_dtype(x, dtype)

    def _check_use(self, remainder: Remainder, adapter_names: list[str] | None) -> None:
        if isinstance(remainder, DenseRemainder):
            if adapter_names is not None:
                self.check_adapters(adapter_names, f"adapter_names={adapter_names}")
            if self.disable_adapters:
                self._refuse("a forward pass without the adapter")
            active = self.merged_adapters if self.merged else self.active_adapters
            if list(active) != [self.trained_adapter]:
                self._refuse(f"a forward pass with adapters {list(active)}")
        # Compiled code and CUDA graphs can't wait for the device; in training the check would cost time in every pass.
        if self.training or torch.compiler.is_compiling() or self.factor_guard.leader is not self:
            return
        if not is_being_captured(self.trained_factors[0].device):
            uses_factors = (
                not self.disable_adapters and not self.merged and self.trained_adapter in self.active_adapters
            )
            if uses_factors or adapter_names is not None:
                self.factor_guard.check()
                if self._base_has_changed and self.factor_guard.scalings_differ:
                    self._refuse("another scaling than in training")

    def check_adapters(self, names: Iterable[str], what: str) -> None:
        """Check that no other adapter than the trained one is to be used, if the base has changed.

        Args:
            names: the adapters.
            what: what is to be done with them, for the message.

        Raises:
            ChangedBaseError: another adapter, or the base itself, is among them.
        """
        if self._base_has_changed and set(names) - {self.trained_adapter}:
            self._refuse(what)

    def check_deletion(self, adapter_name: str) -> None:
        """Check that an adapter can be deleted.

        Args:
            adapter_name: its name.

        Raises:
            ChangedBaseError: part of its update would stay behind, in the base.
        """
        if self._base_has_changed and adapter_name == self.trained_adapter:
            self._refuse(f"delete_adapter({adapter_name!r})")

    @property
    def _base_has_changed(self) -> bool:
        return isinstance(self.remainder, DenseRemainder) and self.remainder.changed

    def _refuse(self, what: str) -> NoReturn:
        raise ChangedBaseError(
            f"{what} needs the original base weights, but ScaLoRA has merged part of the update of adapter "
            f"{self.trained_adapter!r} into them: set merge='factored', which leaves them as they are, or load the "
            "original model again (for a trainer with a reference model: pass it as ref_model)"
        )

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        result: Tensor = super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        rows = [row for row, name in enumerate(adapter_names) if name == self.trained_adapter]
        # PEFT calls a layer's variant here, but not an embedding's.
        if isinstance(self, Embedding) and isinstance(self.remainder, FactoredRemainder) and rows:
            result[rows] = result[rows] + remainder_of_embedding(self, x[rows]).to(result.dtype)
        return result

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of an adapter and its factored remainder, in the base weight's storage order.

        Args:
            adapter: the adapter's name.
        """
        update: Tensor = super().get_delta_weight(adapter)
        if adapter == self.trained_adapter and isinstance(self.remainder, FactoredRemainder):
            remainder = self.remainder_scaling * self.remainder.dense()
            remainder = remainder.mT if stored_transposed(self) else remainder
            update = update + remainder.reshape(update.shape).to(update.dtype)
        return update

    def exact_update(self) -> Tensor:
        """The update of the trained adapter and its factored remainder, as stored, in the adapter's dtype."""
        A, B = matrices_of(*self.trained_factors, experts_of(self))
        update = B @ A * self.trained_scaling
        if isinstance(self.remainder, FactoredRemainder):
            update = update + self.remainder_scaling * self.remainder.dense()
        update = update.mT if stored_transposed(self) else update
        return update.reshape(self.base_weight.shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's merge, rounded once, and such that `unmerge` restores the weights bit for bit.

        Until then the original weights are kept, in the memory of the host.

        Args:
            safe_merge: whether to check for NaN and infinite entries before anything is changed.
            adapter_names: adapters to merge; None for the active ones.

        Raises:
            ValueError: `safe_merge` found NaN or infinite entries.
            ChangedBaseError: an adapter of the original base would be merged into the changed one.
        """
        before = None if self.merged else BaseWeights(self)
        self.merge_for_good(safe_merge, adapter_names)
        if before is not None and self.merged:
            self._before_merge = before

    @torch.no_grad()
    def merge_for_good(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """`merge` without keeping the original weights: it can't be undone.

        Args:
            safe_merge: as in `merge`.
            adapter_names: as in `merge`.

        Raises:
            ValueError: as `merge`.
            ChangedBaseError: as `merge`.
        """
        names = check_adapters_to_merge(self, adapter_names)
        self.check_adapters(names, f"merging adapters {names}")
        if names and self.base_is_tied:
            own = nn.Parameter(self.base_weight.detach().clone(), requires_grad=False)
            setattr(self.get_base_layer(), weight_key(self), own)
        if self.trained_adapter in names and is_float(self.base_weight):
            self._merge_exactly(safe_merge)
            names = [name for name in names if name != self.trained_adapter]
        if names:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already following adapters were merged")
                super().merge(safe_merge=safe_merge, adapter_names=names)

    def _merge_exactly(self, safe_merge: bool) -> None:
        base, name, weight = self.get_base_layer(), self.trained_adapter, self.base_weight
        exact = self.remainder.exact(weight) if isinstance(self.remainder, DenseRemainder) else weight
        merged = exact.to(torch.promote_types(exact.dtype, torch.float32)) + self.exact_update()
        bias = self.lora_B[name].bias if self.lora_bias.get(name) else None
        if bias is not None and getattr(base, "bias", None) is None:
            raise RuntimeError(
                "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias: use it unmerged"
            )
        merged_bias = None if bias is None else base.bias + bias * self.trained_scaling
        written = [merged] if merged_bias is None else [merged, merged_bias]
        if safe_merge and not all(tensor.isfinite().all() for tensor in written):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        weight.data.copy_(merged)
        if merged_bias is not None:
            base.bias.data.copy_(merged_bias)
        self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Restore the weights as they were before `merge`."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._before_merge is None:
            raise RuntimeError("the adapter was merged for good: load the model again")
        self._before_merge.restore()
        self._before_merge = None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, after unloading layers that are nested in this one, for PEFT's `unload`, `merge_and_unload`.

        Args:
            merge: whether to merge adapters first.
            safe_merge: as in `merge`.
            adapter_names: as in `merge`.

        Raises:
            ChangedBaseError: the original base layer was asked for.
        """
        if not merge and self._base_has_changed:
            self._refuse("unload()")
        if merge:
            self.merge_for_good(safe_merge, adapter_names)
        if isinstance(nested := self.base_layer, RemainderLayer):  # of another parameter of the same module
            return nested.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        base: nn.Module = self.get_base_layer()
        return base

    def enable_adapters(self, enabled: bool) -> None:
        """PEFT's switch between the adapted and the base layer.

        Args:
            enabled: whether the adapter is used.

        Raises:
            ChangedBaseError: there is no original base layer any more.
        """
        if not enabled and self._base_has_changed:
            self._refuse("disabling the adapter (disable_adapter, disable_adapter_layers, disable_adapters)")
        super().enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's choice of the active adapters.

        Args:
            adapter_names: the adapters.
            inference_mode: whether they are frozen.

        Raises:
            ChangedBaseError: other adapters belong to the original base.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_adapters(names, f"set_adapter({adapter_names!r})")
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the layer.

        Args:
            adapter_name: the new adapter's name.
            args: arguments of PEFT's layer.
            kwargs: arguments of PEFT's layer.

        Raises:
            ChangedBaseError: the adapter would be added to the changed base.
        """
        if self._base_has_changed:
            self._refuse(f"adding adapter {adapter_name!r}")
        if adapter_name == self.trained_adapter and isinstance(self.remainder, FactoredRemainder):
            self.remainder.clear()
        super().update_layer(adapter_name, *args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, with the remainder that belongs to it.

        Args:
            adapter_name: the adapter's name.

        Raises:
            ChangedBaseError: part of the adapter's update can't be deleted from the base.
        """
        self.check_deletion(adapter_name)
        if adapter_name == self.trained_adapter:
            self.factor_guard.retire()
            delattr(self, REMAINDER)
            self.__class__ = plain_class(self)
            self.delete_adapter(adapter_name)
            return
        super().delete_adapter(adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `get_delta_weight` is the adapter's whole update, so that PEFT can convert it.

        Args:
            adapter_name: the adapter's name.
        """
        return not self._base_has_changed

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # With the weight's dtype, what a merge rounds off changes: the exact weight is rounded once more, from scratch.
        remainder, exact = self.remainder, None
        if isinstance(remainder, DenseRemainder):
            weight = self.base_weight
            if fn(torch.empty(0, dtype=weight.dtype, device=weight.device)).dtype != weight.dtype:
                if self.merged:
                    self.unmerge()
                exact = remainder.exact(weight.detach())
        super()._apply(fn, recurse)
        if exact is not None and isinstance(remainder, DenseRemainder):
            remainder.rebuild(exact, self.base_weight)
        self.factor_guard.forget()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's tensors, with the factors of the whole update in place of those of the adapter alone.

        Whatever takes the factors out of a state dict and leaves the rest (``strict=False``) then gets the whole
        update, or an error about their shapes.

        Args:
            args: as in `torch.nn.Module`.
            kwargs: as in `torch.nn.Module`.

        Raises:
            ChangedFactorsError: something other than an optimizer has overwritten the factors.
        """
        if self.factor_guard.leader is self and self.has_remainder:
            self.factor_guard.check()
        tensors = super().state_dict(*args, **kwargs)
        # Shards, and a Trainer with DeepSpeed, are for checkpoints of their own kind, which need the remainder and the
        # factors as they are.
        if (
            isinstance(self.remainder, FactoredRemainder)
            and self.remainder.changed
            and not is_distributed(self.trained_factors[0])
            and not is_partitioned(self.trained_factors[0])
            and not self.attachment.saved_by_callback
        ):
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            key_A, key_B = (prefix + key for key in factor_keys(self, self.trained_adapter))
            tensors[key_A], tensors[key_B] = self.whole_factors()
        return tensors

    @torch.no_grad()
    def whole_factors(self) -> tuple[Tensor, Tensor]:
        """lora_A, (r + c, n), and lora_B, (m, r + c), of the whole update, at the adapter's own scaling.

        c is the number of columns of the remainder, which must be factored, without those that are zero. Experts all
        have the same number.
        """
        return whole_factors(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.remainder, FactoredRemainder):
            part_factors(self, f"{prefix}{REMAINDER}.", state_dict, prefix)
        elif self.remainder.changed:
            self._check_complete(state_dict, prefix)
        self.factor_guard.forget()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_complete(self, state_dict: dict[str, Any], prefix: str) -> None:
        """The base weight, its rounding errors and the factors belong together."""
        together = [*factor_keys(self, self.trained_adapter), self.base_weight_name]
        low = self.remainder.rounded_off
        if isinstance(low, Tensor) and not is_distributed(low) and "rounded_off" in self.remainder.state_dict():
            together.append(f"{REMAINDER}.rounded_off")
        present = [prefix + key in state_dict for key in together]
        if any(present) and not all(present):
            self._refuse(f"loading some of the weights of {prefix.removesuffix('.')!r}")


def give_remainder(
    layer: LoraLayer, kind: type[RemainderLayer], adapter: str, remainder: Remainder, *, base_is_tied: bool
) -> None:
    """Make a remainder part of a LoRA layer.

    Args:
        layer: the layer; modified. It still needs `factor_guard` and `attachment`.
        kind: what is mixed into its class.
        adapter: name of the adapter that the remainder belongs to.
        remainder: the remainder.
        base_is_tied: whether the base weight is another module's, too.
    """
    layer.add_module(REMAINDER, remainder)
    mix_in(layer, kind)
    layer.trained_adapter, layer.base_is_tied = adapter, base_is_tied
    if kind is RemainderLayer and isinstance(remainder, FactoredRemainder):
        layer.lora_variant[adapter] = WithRemainder()


def accept_factors(model: nn.Module) -> None:
    """Accept the adapter's factors as they are, after something other than an optimizer has changed them on purpose.

    The merged part of the update stays as it is, so the model is the sum of that and the present factors.

    Args:
        model: a model with ScaLoRA attached, or anything that contains it.
    """
    for module in model.modules():
        if isinstance(module, RemainderLayer):
            module.factor_guard.forget()
