"""What the jobs of the frameworks share: each trains a tiny model by the framework's own entry point."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import scalora

R = 2
TARGETS = ["q_proj", "v_proj", "down_proj"]
BLOCK_SIGNS = {"method": "block_signs", "blocks": 4, "optimizer": "pair_adamw"}


def needs(framework):
    """Marks a module's tests: skipped where the framework is not installed."""
    missing = importlib.util.find_spec(framework) is None
    return pytest.mark.skipif(missing, reason=f"{framework} is not installed: .ci/plugins makes an environment with it")


def run(*command, cwd=None, fails=False, **environment):
    """Run a command to its end; returns what it has printed."""
    source = str(Path(scalora.__file__).parents[1])
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=550, cwd=cwd,
        env=os.environ | offline | {"PYTHONPATH": source} | environment,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, said[-6000:]
    return said


@torch.no_grad()
def logits(model):
    tokens = torch.randint(5, 60, (3, 10), generator=torch.Generator().manual_seed(0))
    return model.float().eval()(input_ids=tokens).logits


def check_adapter(base_folder, folder, dtype=torch.float32):
    """An adapter is an ordinary one of the whole update: of a higher rank, with the logits of the trained model."""
    by_peft = logits_of_adapter(base_folder, folder)
    untrained = logits(AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype))
    trained = logits(scalora.load_model(AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype), folder))
    assert (trained - untrained).norm() > 20 * (trained - by_peft).norm()
    return trained


def logits_of_adapter(base_folder, folder):
    """The logits of plain PEFT with an adapter, whose update has a higher rank than what was trained."""
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    by_peft = PeftModel.from_pretrained(base, folder)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    factors = load_file(folder / "adapter_model.safetensors")
    layers = [name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")]
    updates = [factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"] for layer in layers]
    ranks = [int(torch.linalg.matrix_rank(update, rtol=1e-4)) for update in updates]
    assert len(ranks) == 2 * len(TARGETS)
    assert min(ranks) > R
    return logits(by_peft)
