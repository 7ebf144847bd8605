"""LLaMA-Factory's v1 trains with ScaLoRA through its own `run_sft`."""

import json

import pytest
import yaml
from conftest import pairs
from frameworks import BLOCK_SIGNS, TARGETS, R, check_adapter, logits_of_adapter, needs, run

pytestmark = needs("llamafactory")
SCALORA = {"warmup_steps": 2, "interval": 2}


@pytest.fixture
def train(causal_folder, tmp_path):
    """Trains, with a block of ScaLoRA's settings; returns what was printed, and the output."""
    rows = [{"instruction": row["prompt"], "input": "", "output": row["completion"]} for row in pairs(40)]
    (tmp_path / "words.json").write_text(json.dumps(rows))
    info = {"words": {"path": str(tmp_path / "words.json"), "source": "local", "converter": "alpaca"}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(info))

    def train(name="out", scalora=SCALORA, fails=False, **more):
        settings = {
            "model": str(causal_folder),
            "peft_config": {"name": "lora", "r": R, "lora_alpha": R, "target_modules": TARGETS},
            "train_dataset": str(tmp_path / "data.yaml"), "output_dir": str(tmp_path / name), "max_steps": 12,
            "micro_batch_size": 4, "cutoff_len": 64, "learning_rate": 1e-2, "bf16": False, "batching_workers": 0,
            "enable_activation_checkpointing": False, "optim_config": {"name": "scalora"} | scalora,
        } | more  # fmt: skip
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings))
        return run("-m", "scalora.integrations.llamafactory_v1", config, fails=fails), tmp_path / name

    return train


@pytest.mark.parametrize("more", [{"merge": "dense"}, {"merge": "factored"}, {"mode": "matrix"}])
def test_it_leaves_an_ordinary_adapter_of_a_higher_rank(more, train, causal_folder):
    _, output = train(scalora=SCALORA | more)
    check_adapter(causal_folder, output)


def test_block_signs_end_in_an_ordinary_adapter(train, causal_folder):
    _, output = train(scalora=BLOCK_SIGNS, learning_rate=1e-3)
    logits_of_adapter(causal_folder, output)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"scalora": {"intervall": 2}}, "optim_config: unknown ScaLoRA setting 'intervall'; the settings are"),
        ({"optim_config": None}, "set optim_config: {name: scalora}"),
        ({"resume_from_checkpoint": "auto"}, "resume_from_checkpoint is not supported with ScaLoRA in v1"),
    ],
)
def test_what_is_wrong_or_not_supported_is_one_line(wrong, error, train):
    said, _ = train(fails=True, **wrong)
    assert said.splitlines()[-1].startswith(error)
