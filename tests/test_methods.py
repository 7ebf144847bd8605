"""Every method through `scalora train`, and what is measured of every run."""

import json

import pytest
import torch
import yaml
from conftest import WORDS, pairs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from scalora.cli import app
from scalora.rivals import METHODS

STEPS = 12


def train(tmp_path, **settings):
    training = {"max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2}
    training |= settings.pop("training", {})
    config = tmp_path / "config.yaml"
    content = {"output_dir": str(tmp_path / "run"), "scalora": {"warmup_steps": 1}, "training": training} | settings
    config.write_text(yaml.safe_dump(content))
    result = CliRunner().invoke(app, ["train", str(config)])
    return result, tmp_path / "run"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def update(run, base_folder, name):
    before, after = (load_file(folder / "model.safetensors") for folder in (base_folder, run / "model"))
    return (after[name] - before[name]).double()


@pytest.fixture
def words(write_jsonl):
    return {"train": str(write_jsonl("train.jsonl", pairs(24))), "eval": str(write_jsonl("eval.jsonl", pairs(8)))}


@pytest.fixture
def classes(write_jsonl):
    rows = [{"text": f" {WORDS[i % 10]} {WORDS[i % 3]}", "label": WORDS[i % 3]} for i in range(24)]
    return {"train": str(write_jsonl("train.jsonl", rows)), "eval": str(write_jsonl("eval.jsonl", rows[:8]))}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_language_model_and_is_measured(method, causal_folder, words, tmp_path):
    settings = {"lora": {"r": 4, "lora_alpha": 4}, "track_updates": 2}
    result, run = train(tmp_path, model=str(causal_folder), method=method, data=words, **settings)
    assert result.exit_code == 0, result.output
    logs = lines(run / "metrics.jsonl")
    losses = [log["loss"] for log in logs if "loss" in log]
    assert len(losses) == STEPS
    assert sum(losses[-4:]) < sum(losses[:4])
    seconds = [log["seconds"] for log in logs]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    summary = json.loads((run / "summary.json").read_text())
    assert 0 < summary["seconds_per_step"] < summary["training_seconds"]
    assert summary["peak_memory_bytes"] > 1e8
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    updates = lines(run / "updates.jsonl")
    assert [line["step"] for line in updates] == [STEPS // 2] * 4 + [STEPS] * 4
    for line in updates[4:]:
        merged = update(run, causal_folder, f"{line['layer']}.weight")
        values = torch.linalg.svdvals(merged)
        torch.testing.assert_close(torch.tensor(line["singular_values"]).double(), values, rtol=1e-2, atol=1e-4)
        assert line["norm"] == pytest.approx(float(merged.norm()), rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_classifier(method, encoder_folder, classes, tmp_path):
    settings = {"training": {"eval_strategy": "steps", "eval_steps": STEPS // 2}, "save_model": method == "lora"}
    result, run = train(
        tmp_path, model=str(encoder_folder), task="classification", method=method, data=classes, **settings
    )
    assert result.exit_code == 0, result.output
    evaluations = [log for log in lines(run / "metrics.jsonl") if "eval_loss" in log]
    assert [log["step"] for log in evaluations][:2] == [STEPS // 2, STEPS]
    assert all("eval_accuracy" in log for log in evaluations)
    if method == "lora":
        assert AutoModelForSequenceClassification.from_pretrained(run / "model").num_labels == 3
    else:
        assert not {"model", "adapter", "delta"} & {path.name for path in run.iterdir()}


@pytest.mark.slow
def test_the_rank_of_loras_update_stays_at_r_and_scaloras_does_not(causal_folder, words, tmp_path):
    ranks = {}
    for method in ("lora", "scalora"):
        (folder := tmp_path / method).mkdir()
        settings = {"lora": {"r": 2, "lora_alpha": 2}, "track_updates": 3}
        result, run = train(folder, model=str(causal_folder), method=method, data=words, **settings)
        assert result.exit_code == 0, result.output
        ranks[method] = [line["numerical_rank"] for line in lines(run / "updates.jsonl") if line["step"] == STEPS]
    assert max(ranks["lora"]) == 2
    assert min(ranks["scalora"]) > 2


@pytest.mark.slow
@pytest.mark.parametrize("start", ["random", "oracle"])
def test_scalora_can_start_away_from_zero_without_changing_the_function(start, causal_folder, words, tmp_path):
    first = {}
    for name in ("zero", start):
        (folder := tmp_path / name).mkdir()
        settings = {"lora": {"r": 4, "lora_alpha": 4}, "method_options": {"start": name}, "save_model": False}
        result, run = train(folder, model=str(causal_folder), data=words, **settings)
        assert result.exit_code == 0, result.output
        log = lines(run / "metrics.jsonl")[0]
        first[name] = log["loss"], log["grad_norm"]
    assert first[start][0] == pytest.approx(first["zero"][0], rel=1e-4)
    assert first[start][1] > 1.2 * first["zero"][1]


@pytest.mark.slow
def test_trainable_parameters_are_counted(causal_folder, words, tmp_path):
    settings = {"lora": {"r": 2, "target_modules": ["q_proj"]}, "save_model": False}
    result, run = train(tmp_path, model=str(causal_folder), method="lora", data=words, **settings)
    assert result.exit_code == 0, result.output
    # Two layers, 32 × 32, rank 2.
    assert json.loads((run / "summary.json").read_text())["trainable_parameters"] == 2 * 2 * (32 + 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lorax"}, "method='lorax': the methods are scalora, lora, full, "),
        ({"method": "relora", "method_options": {"intervall": 3}}, "did you mean 'interval'?"),
        ({"method": "lora", "method_options": {"interval": 3}}, "method_options.interval is an option of relora, not"),
        ({"method": "hira", "lora": {"use_rslora": True}}, "use_rslora"),
        ({"method": "riemannian", "method_options": {"reg": -1.0}}, "reg"),
        ({"method_options": {"start": "pissa"}}, "start='pissa': the starts are zero, random, oracle"),
        ({"track_updates": -1}, "track_updates=-1"),
    ],
)
def test_a_wrong_method_or_option_is_one_line(settings, message, causal_folder, words, tmp_path):
    result, run = train(tmp_path, model=str(causal_folder), data=words, **settings)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not run.exists()


@pytest.mark.slow
def test_every_method_sees_the_same_batches(causal_folder, words, tmp_path, monkeypatch):
    from trl import SFTTrainer

    seen, training_step = {}, SFTTrainer.training_step

    def record(trainer, model, inputs, *args, **kwargs):
        seen.setdefault(method, []).append(inputs["input_ids"].tolist())
        return training_step(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", record)
    for method in ("lora", "scalora", "full", "lora_ga", "relora", "mora"):
        (folder := tmp_path / method).mkdir()
        result, _ = train(folder, model=str(causal_folder), method=method, data=words, save_model=False)
        assert result.exit_code == 0, result.output
    assert all(batches == seen["lora"] for batches in seen.values())
    assert len({str(batch) for batch in seen["lora"]}) == STEPS
