"""LLaMA-Factory trains with ScaLoRA through its own `run_exp`."""

import json

import pytest
import torch
import yaml
from conftest import pairs
from frameworks import BLOCK_SIGNS, TARGETS, R, check_adapter, logits_of_adapter, needs, run

pytestmark = needs("llamafactory")
MODULE = ("-m", "scalora.integrations.llamafactory")
SCALORA = {"warmup_steps": 2, "interval": 2}


@pytest.fixture
def train(causal_folder, tmp_path):
    """Trains, with settings of LLaMA-Factory and a block of ScaLoRA's; returns what was printed, and the output."""
    (tmp_path / "data").mkdir()
    rows = [{"instruction": row["prompt"], "input": "", "output": row["completion"]} for row in pairs(40)]
    (tmp_path / "data/words.json").write_text(json.dumps(rows))
    (tmp_path / "data/dataset_info.json").write_text(json.dumps({"words": {"file_name": "words.json"}}))

    def train(name="out", scalora=SCALORA, fails=False, **more):
        settings = {
            "model_name_or_path": str(causal_folder), "stage": "sft", "do_train": True, "finetuning_type": "lora",
            "lora_rank": R, "lora_alpha": R, "lora_target": ",".join(TARGETS), "dataset": "words",
            "dataset_dir": str(tmp_path / "data"), "template": "empty", "cutoff_len": 64, "max_steps": 12,
            "output_dir": str(tmp_path / name), "per_device_train_batch_size": 4, "learning_rate": 1e-2,
            "logging_steps": 1, "save_steps": 6, "report_to": "none", "use_cpu": True, "preprocessing_num_workers": 1,
            "scalora": scalora,
        } | more  # fmt: skip
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings))
        return run(*MODULE, config, fails=fails), tmp_path / name

    return train


@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_it_rescales_leaves_an_ordinary_adapter_and_resumes(merge, train, causal_folder):
    _, whole = train("whole", SCALORA | {"merge": merge})
    trained = check_adapter(causal_folder, whole)
    log = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    assert next(entry for entry in reversed(log) if "loss" in entry)["scalora/rescales"] == 5
    checkpoint = str(whole / "checkpoint-6")
    _, resumed = train("resumed", SCALORA | {"merge": merge}, resume_from_checkpoint=checkpoint)
    torch.testing.assert_close(check_adapter(causal_folder, resumed), trained, rtol=1e-4, atol=1e-4)


def test_dpo_has_the_untouched_model_as_its_reference(train, causal_folder, tmp_path):
    rows = [{"instruction": row["prompt"], "chosen": row["completion"], "rejected": " mauve"} for row in pairs(40)]
    (tmp_path / "data/words.json").write_text(json.dumps(rows))
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info = {"words": {"file_name": "words.json", "ranking": True, "columns": columns}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))
    _, output = train(stage="dpo", pref_beta=0.1)
    check_adapter(causal_folder, output)
    said, _ = train(name="dense", stage="dpo", scalora=SCALORA | {"merge": "dense"}, fails=True)
    assert "the trainer computes its reference with the adapter disabled" in said.splitlines()[-1]


def test_matrix_scaling_brings_its_optimizer(train, causal_folder):
    _, output = train(scalora=SCALORA | {"mode": "matrix"}, learning_rate=1e-3)
    check_adapter(causal_folder, output)


def test_block_signs_end_in_an_ordinary_adapter_and_resume(train, causal_folder):
    _, whole = train("whole", BLOCK_SIGNS, learning_rate=1e-3)
    trained = logits_of_adapter(causal_folder, whole)
    _, resumed = train("resumed", BLOCK_SIGNS, learning_rate=1e-3, resume_from_checkpoint=str(whole / "checkpoint-6"))
    torch.testing.assert_close(logits_of_adapter(causal_folder, resumed), trained, rtol=1e-4, atol=1e-4)


def test_wrong_settings_are_one_line(train):
    said, _ = train(scalora={"intervall": 2}, fails=True)
    assert said.strip().splitlines()[-1].startswith("scalora: unknown ScaLoRA setting 'intervall'; the settings are")
    said, _ = train(finetuning_type="full", fails=True)
    assert said.strip().splitlines()[-1].startswith("finetuning_type: full has no LoRA adapter")
