"""ScaLoRA, optimally scaled low-rank adaptation (arXiv 2510.23818), for PEFT models: the public list.

Names are imported when they are first used, so that ``scalora --help`` does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scalora._version import __version__

if TYPE_CHECKING:
    from scalora.block_signs import add_block_signs as add_block_signs
    from scalora.config import ScaLoraConfig as ScaLoraConfig
    from scalora.engine import ScaLora as ScaLora
    from scalora.integrations.block_signs import BlockSignsCallback as BlockSignsCallback
    from scalora.integrations.transformers import ScaLoraCallback as ScaLoraCallback
    from scalora.maths.matrix import matrix_scaling as matrix_scaling
    from scalora.maths.matrix import polar_scaling as polar_scaling
    from scalora.maths.oracle import optimal_adapter as optimal_adapter
    from scalora.maths.oracle import oracle_residual as oracle_residual
    from scalora.maths.reference import LayerState as LayerState
    from scalora.maths.reference import PairState as PairState
    from scalora.maths.reference import reference_matrix_step as reference_matrix_step
    from scalora.maths.reference import reference_step as reference_step
    from scalora.maths.residuals import captured_energy as captured_energy
    from scalora.maths.residuals import matrix_residual as matrix_residual
    from scalora.maths.residuals import relative_residual as relative_residual
    from scalora.maths.scaling import choose_scaling as choose_scaling
    from scalora.maths.scaling import column_scaling as column_scaling
    from scalora.maths.scaling import normal_equations as normal_equations
    from scalora.maths.scaling import scalar_scaling as scalar_scaling
    from scalora.maths.spectrum import effective_rank as effective_rank
    from scalora.maths.spectrum import numerical_rank as numerical_rank
    from scalora.model.adapters import UnsupportedLayerError as UnsupportedLayerError
    from scalora.model.ema import ModelEma as ModelEma
    from scalora.model.factor_guard import ChangedFactorsError as ChangedFactorsError
    from scalora.model.remainder_layer import ChangedBaseError as ChangedBaseError
    from scalora.model.remainder_layer import accept_factors as accept_factors
    from scalora.pair_adamw import PairAdamW as PairAdamW
    from scalora.rescale.optimizers import UnsupportedOptimizerError as UnsupportedOptimizerError
    from scalora.rescale.optimizers import register_optimizer as register_optimizer
    from scalora.saving.checkpoints import last_checkpoint as last_checkpoint
    from scalora.saving.errors import StateError as StateError
    from scalora.saving.export import export_adapter as export_adapter
    from scalora.saving.export import export_merged as export_merged
    from scalora.saving.export import load_model as load_model
    from scalora.saving.verify import ExportError as ExportError
    from scalora.start import optimal_start as optimal_start

_HOMES = {
    "BlockSignsCallback": "scalora.integrations.block_signs",
    "ChangedBaseError": "scalora.model.remainder_layer",
    "ChangedFactorsError": "scalora.model.factor_guard",
    "ExportError": "scalora.saving.verify",
    "LayerState": "scalora.maths.reference",
    "ModelEma": "scalora.model.ema",
    "PairAdamW": "scalora.pair_adamw",
    "PairState": "scalora.maths.reference",
    "ScaLora": "scalora.engine",
    "ScaLoraCallback": "scalora.integrations.transformers",
    "ScaLoraConfig": "scalora.config",
    "StateError": "scalora.saving.errors",
    "UnsupportedLayerError": "scalora.model.adapters",
    "UnsupportedOptimizerError": "scalora.rescale.optimizers",
    "accept_factors": "scalora.model.remainder_layer",
    "add_block_signs": "scalora.block_signs",
    "captured_energy": "scalora.maths.residuals",
    "choose_scaling": "scalora.maths.scaling",
    "column_scaling": "scalora.maths.scaling",
    "effective_rank": "scalora.maths.spectrum",
    "export_adapter": "scalora.saving.export",
    "export_merged": "scalora.saving.export",
    "last_checkpoint": "scalora.saving.checkpoints",
    "load_model": "scalora.saving.export",
    "matrix_residual": "scalora.maths.residuals",
    "matrix_scaling": "scalora.maths.matrix",
    "normal_equations": "scalora.maths.scaling",
    "numerical_rank": "scalora.maths.spectrum",
    "optimal_adapter": "scalora.maths.oracle",
    "optimal_start": "scalora.start",
    "oracle_residual": "scalora.maths.oracle",
    "polar_scaling": "scalora.maths.matrix",
    "reference_matrix_step": "scalora.maths.reference",
    "reference_step": "scalora.maths.reference",
    "register_optimizer": "scalora.rescale.optimizers",
    "relative_residual": "scalora.maths.residuals",
    "scalar_scaling": "scalora.maths.scaling",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
