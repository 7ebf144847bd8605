"""ms-swift trains with ScaLoRA through `swift sft`."""

import json

import pytest
import torch
from conftest import pairs
from frameworks import BLOCK_SIGNS, TARGETS, R, check_adapter, logits_of_adapter, needs, run

pytestmark = needs("swift")
SCALORA = {"warmup_steps": 2, "interval": 2}


@pytest.fixture
def train(causal_folder, tmp_path):
    """Trains by `swift sft`, with settings of ScaLoRA; returns what was printed, and the last checkpoint."""
    rows = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in pairs(40)
    ]
    data = tmp_path / "words.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(name="out", scalora=SCALORA, fails=False, command="sft", **more):
        plugin = tmp_path / f"{name}.py"
        plugin.write_text(f"from scalora.integrations.swift import register\nregister(**{scalora!r})\n")
        settings = {
            "model": causal_folder, "model_type": "llama", "template": "dummy", "tuner_type": "lora",
            "torch_dtype": "float32", "lora_rank": R, "lora_alpha": R, "target_modules": TARGETS, "dataset": data,
            "max_length": 64, "max_steps": 12, "output_dir": tmp_path / name, "add_version": "false",
            "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 6,
            "report_to": "none", "split_dataset_ratio": 0, "external_plugins": plugin, "callbacks": "scalora",
            "use_hf": "true", "bf16": "false", "fp16": "false", "gradient_accumulation_steps": 1, "weight_decay": 0,
            "lora_dropout": 0,
        } | more  # fmt: skip
        options = []
        for key, value in settings.items():
            options += [f"--{key}", *(value if isinstance(value, list) else [value])]
        said = run("-m", "swift.cli.main", command, *options, fails=fails)
        return said, tmp_path / name / "checkpoint-12"

    return train


@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_it_rescales_leaves_an_ordinary_adapter_and_resumes(merge, train, causal_folder):
    _, whole = train("whole", SCALORA | {"merge": merge})
    trained = check_adapter(causal_folder, whole)
    log = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    assert next(entry for entry in reversed(log) if "loss" in entry)["scalora/rescales"] == 5
    checkpoint = whole.parent / "checkpoint-6"
    _, resumed = train("resumed", SCALORA | {"merge": merge}, resume_from_checkpoint=checkpoint)
    torch.testing.assert_close(check_adapter(causal_folder, resumed), trained, rtol=1e-4, atol=1e-4)
    _, further = train("further", SCALORA | {"merge": merge}, adapters=whole, learning_rate=1e-9)
    torch.testing.assert_close(check_adapter(causal_folder, further), trained, rtol=1e-4, atol=1e-4)


def test_dpo_has_the_untouched_model_as_its_reference(train, causal_folder, tmp_path):
    rows = [
        {
            "messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}],
            "rejected_response": " mauve",
        }
        for r in pairs(40)
    ]
    data = tmp_path / "ranked.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dpo = {"command": "rlhf", "rlhf_type": "dpo", "beta": 0.1, "dataset": data}
    _, output = train(**dpo)
    check_adapter(causal_folder, output)
    said, _ = train("dense", SCALORA | {"merge": "dense"}, fails=True, **dpo)
    assert "the trainer computes its reference with the adapter disabled" in said


def test_matrix_scaling_brings_its_optimizer(train, causal_folder):
    _, output = train(scalora=SCALORA | {"mode": "matrix"}, learning_rate=1e-3)
    check_adapter(causal_folder, output)


def test_block_signs_end_in_an_ordinary_adapter_and_resume(train, causal_folder):
    _, whole = train("whole", BLOCK_SIGNS, learning_rate=1e-3)
    trained = logits_of_adapter(causal_folder, whole)
    _, resumed = train("resumed", BLOCK_SIGNS, learning_rate=1e-3, resume_from_checkpoint=whole.parent / "checkpoint-6")
    torch.testing.assert_close(logits_of_adapter(causal_folder, resumed), trained, rtol=1e-4, atol=1e-4)
    _, further = train("further", BLOCK_SIGNS, adapters=whole, learning_rate=1e-9)
    torch.testing.assert_close(logits_of_adapter(causal_folder, further), trained, rtol=1e-4, atol=1e-4)


def test_wrong_settings_are_one_line(train):
    said, _ = train(scalora={"intervall": 2}, fails=True)
    assert "ValueError: scalora: unknown ScaLoRA setting 'intervall'; the settings are" in said.splitlines()[-1]
