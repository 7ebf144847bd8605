"""axolotl trains with ScaLoRA through `axolotl train`."""

import json

import pytest
import torch
import yaml
from conftest import pairs
from frameworks import BLOCK_SIGNS, TARGETS, R, check_adapter, logits_of_adapter, needs, run

pytestmark = needs("axolotl")
SHORT = {"system_prompt": "", "format": "{instruction}", "no_input_format": "{instruction}"}
SCALORA = {"warmup_steps": 2, "interval": 2}


@pytest.fixture
def train(causal_folder, tmp_path):
    """Trains, with settings of axolotl and a block of ScaLoRA's; returns what was printed, and the output."""
    data = tmp_path / "words.jsonl"
    rows = [{"instruction": row["prompt"], "output": row["completion"]} for row in pairs(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(name="out", scalora=SCALORA, fails=False, **more):
        settings = {
            "plugins": ["scalora.integrations.axolotl.ScaloraPlugin"], "scalora": scalora,
            "base_model": str(causal_folder), "adapter": "lora", "lora_r": R, "lora_alpha": R,
            "lora_target_modules": TARGETS, "datasets": [{"path": str(data), "type": SHORT}],
            "dataset_prepared_path": str(tmp_path / "prepared"), "output_dir": str(tmp_path / name),
            "sequence_len": 64, "micro_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 12,
            "learning_rate": 1e-2, "optimizer": "adamw_torch", "lr_scheduler": "constant", "save_steps": 6,
            "logging_steps": 1, "bf16": False, "fp16": False, "tf32": False, "val_set_size": 0,
            "special_tokens": {"pad_token": "<pad>"}, "attn_implementation": "eager", "weight_decay": 0.0,
        } | more  # fmt: skip
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings))
        command = ("-m", "axolotl.cli.main", "train", config, "--launcher", "python")
        return run(*command, fails=fails, AXOLOTL_DO_NOT_TRACK="1", cwd=tmp_path), tmp_path / name

    return train


@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_it_rescales_leaves_an_ordinary_adapter_and_resumes(merge, train, causal_folder):
    said, whole = train("whole", SCALORA | {"merge": merge})
    assert '"lora_mlp_kernel": false' in said  # it is on by default, and would miss the remainder
    trained = check_adapter(causal_folder, whole)
    log = json.loads((whole / "checkpoint-12/trainer_state.json").read_text())["log_history"]
    assert next(entry for entry in reversed(log) if "loss" in entry)["scalora/rescales"] == 5
    checkpoint = str(whole / "checkpoint-6")
    _, resumed = train("resumed", SCALORA | {"merge": merge}, resume_from_checkpoint=checkpoint)
    torch.testing.assert_close(check_adapter(causal_folder, resumed), trained, rtol=1e-4, atol=1e-4)


def test_dpo_has_the_untouched_model_as_its_reference(train, causal_folder, tmp_path):
    data = tmp_path / "ranked.jsonl"
    rows = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " mauve"} for row in pairs(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ranked = {"path": str(data), "type": {"field_prompt": "prompt", "prompt_format": "{prompt}"}, "split": "train"}
    dpo = {"rl": "dpo", "rl_beta": 0.1, "datasets": [ranked]}
    _, output = train(**dpo)
    check_adapter(causal_folder, output)
    said, _ = train("dense", SCALORA | {"merge": "dense"}, fails=True, **dpo)
    assert "the trainer computes its reference with the adapter disabled" in said.splitlines()[-1]


def test_matrix_scaling_brings_its_optimizer(train, causal_folder):
    _, output = train(scalora=SCALORA | {"mode": "matrix"}, learning_rate=1e-3)
    check_adapter(causal_folder, output)


def test_block_signs_end_in_an_ordinary_adapter_and_resume(train, causal_folder):
    _, whole = train("whole", BLOCK_SIGNS, learning_rate=1e-3)
    trained = logits_of_adapter(causal_folder, whole)
    _, resumed = train("resumed", BLOCK_SIGNS, learning_rate=1e-3, resume_from_checkpoint=str(whole / "checkpoint-6"))
    torch.testing.assert_close(logits_of_adapter(causal_folder, resumed), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"scalora": {"intervall": 2}}, "scalora: unknown ScaLoRA setting 'intervall'; the settings are"),
        ({"lora_mlp_kernel": True}, "lora_mlp_kernel: true computes layers from lora_A and lora_B alone"),
    ],
)
def test_wrong_settings_are_one_line(wrong, error, train):
    said, _ = train(fails=True, **wrong)
    assert said.splitlines()[-1].startswith(f"ValueError: {error}")
