"""Writes the plans in docs/distributed.md, from what `scalora estimate` says: ``python docs/distributed_plans.py``."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from scalora.bench.estimate import estimate
from scalora.bench.settings import EstimateSettings, Parallel
from scalora.studies.grid import grid

PAGE = Path(__file__).with_name("distributed.md")

# Between these lines.
_BEGIN, _END = "<!-- plans -->\n", "<!-- end of plans -->\n"

# The shapes of Llama 3.1: width, width of the MLP, layers, heads.
SHAPES = {"8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64), "405B": (16384, 53248, 126, 128)}


@dataclass(frozen=True)
class Plan:
    """A row of the table.

    Attributes:
        size: a key of `SHAPES`.
        gpus: the number of GPUs.
        parallel: how they train.
        r: the rank.
    """

    size: str
    gpus: int
    parallel: Parallel
    r: int = 16


PLANS = (
    Plan("8B", 8, "ddp"),
    Plan("8B", 8, "fsdp2"),
    Plan("70B", 8, "fsdp2"),
    Plan("70B", 8, "zero3"),
    Plan("70B", 64, "fsdp2"),
    Plan("70B", 64, "fsdp2", r=64),
    Plan("405B", 64, "fsdp2"),
)


def write_config(folder: Path, size: str) -> Path:
    """Write the config.json of a Llama.

    Args:
        folder: the folder.
        size: a key of `SHAPES`.
    """
    width, middle, layers, heads = SHAPES[size]
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": middle,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def row(plan: Plan, config: Path) -> list[str]:
    """A row of the table.

    Args:
        plan: what to estimate.
        config: the model's config.
    """
    settings = EstimateSettings(config, r=plan.r, merge="dense", gpus=plan.gpus, parallel=plan.parallel)
    found = estimate(settings)
    memory, sent, over = found.memory, found.traffic, found.seconds.overhead
    assert sent is not None
    both = f"{memory.base / 1e9:.1f} + {memory.remainder / 1e9:.1f}"
    shares = f"{sent.share(1):.2%} / {sent.share(10):.3%}"
    times = f"{over(1):.2%} / {over(10):.2%}"
    sizes = f"{memory.lora / 1e9:.1f}", f"{memory.scalora / 1e9:.1f}"
    received = f"{sent.step / 1e9:,.1f}", f"{sent.rescale / 1e6:,.0f}"
    return [plan.size, f"{plan.gpus}", plan.parallel, f"{plan.r}", both, *sizes, *received, shares, times]


def plans() -> str:
    """The table."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(plan, write_config(Path(folder) / plan.size, plan.size)) for plan in PLANS]
    header = ["model", "GPUs", "", "r", "base + low halves, GB", "LoRA, GB", "ScaLoRA, GB", "step receives, GB"]
    header += ["rescale receives, MB", "share of traffic, I = 1 / 10", "longer step, I = 1 / 10"]
    return grid(header, rows) + "\n"


def page() -> str:
    """The page, with its plans written anew."""
    pattern = re.compile(f"(?<={re.escape(_BEGIN)}).*(?={re.escape(_END)})", re.DOTALL)
    return pattern.sub(lambda _: plans(), PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
