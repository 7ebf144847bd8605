"""ScaLoRA, optimally scaled low-rank adaptation (arXiv 2510.23818), for PEFT models: the public list."""

from scalora._version import __version__
from scalora.adapters import UnsupportedLayerError
from scalora.changed_base import ChangedBaseError
from scalora.config import ScaLoraConfig
from scalora.engine import ScaLora
from scalora.export import ExportError, export_adapter, export_merged, load_model
from scalora.integrations.checkpoints import last_checkpoint
from scalora.integrations.transformers import ScaLoraCallback
from scalora.lowrank import effective_rank, numerical_rank
from scalora.scaling import (
    captured_energy,
    choose_scaling,
    column_scaling,
    normal_equations,
    optimal_adapter,
    oracle_residual,
    relative_residual,
    scalar_scaling,
)
from scalora.start import optimal_start
from scalora.state import StateError
from scalora.transport import UnsupportedOptimizerError, register_optimizer

__all__ = [
    "ChangedBaseError",
    "ExportError",
    "ScaLora",
    "ScaLoraCallback",
    "ScaLoraConfig",
    "StateError",
    "UnsupportedLayerError",
    "UnsupportedOptimizerError",
    "__version__",
    "captured_energy",
    "choose_scaling",
    "column_scaling",
    "effective_rank",
    "export_adapter",
    "export_merged",
    "last_checkpoint",
    "load_model",
    "normal_equations",
    "numerical_rank",
    "optimal_adapter",
    "optimal_start",
    "oracle_residual",
    "register_optimizer",
    "relative_residual",
    "scalar_scaling",
]
