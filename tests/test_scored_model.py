"""What `scalora evaluate` loads: merged models, and what a run, a checkpoint or an adapter has changed of its base."""

import json
import shutil

import pytest
import yaml
from conftest import pairs
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from scalora.cli import app
from scalora.runs.scored_model import load_scored
from scalora.runs.settings import Settings


def command(*words):
    return CliRunner().invoke(app, [*map(str, words)])


def scores(model, data, output):
    result = command("evaluate", model, data / "run.yaml", "--output", output)
    assert result.exit_code == 0, result.output
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(12)))
    return folder


@pytest.fixture(scope="module", params=["scalora", "lora"])
def run(request, causal_folder, data):
    """A finished run with a checkpoint before its end."""
    training = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "learning_rate": 2e-2}
    content = {
        "model": str(causal_folder),
        "method": request.param,
        "output_dir": str(data / request.param),
        "data": {"train": str(data / "rows.jsonl"), "eval": str(data / "rows.jsonl")},
        "training": training | {"per_device_train_batch_size": 4, "warmup_steps": 0, "use_cpu": True},
        "track_updates": 0,
    }
    if request.param == "scalora":
        content["scalora"] = {"warmup_steps": 1, "merge": "dense"}
    (data / "run.yaml").write_text(yaml.safe_dump(content))
    result = command("train", data / "run.yaml")
    assert result.exit_code == 0, result.output
    return data / request.param


def test_a_run_is_scored_without_its_merged_model_and_at_its_checkpoints(run, causal_folder, data, tmp_path):
    merged = scores(run, data, tmp_path / "merged.json")
    base = scores(causal_folder, data, tmp_path / "base.json")
    assert base["loss"] - merged["loss"] > 0.05
    alone = tmp_path / run.name  # as a run on a quantised base leaves it
    shutil.copytree(run, alone)
    shutil.rmtree(alone / "model")
    found = scores(alone, data, tmp_path / "alone.json")
    assert found["loss"] == pytest.approx(merged["loss"], rel=1e-4)
    assert found["weights"].startswith(f"{alone / ('delta' if run.name == 'scalora' else 'adapter')} sha256:")
    assert found["weights"].endswith(base["weights"])
    last, earlier = (scores(run / "trainer" / f"checkpoint-{n}", data, tmp_path / f"{n}.json") for n in (4, 2))
    assert last["loss"] == pytest.approx(merged["loss"], rel=1e-4)
    assert merged["loss"] + 0.01 < earlier["loss"] < base["loss"] - 0.01


def test_an_adapter_is_scored_on_the_base_that_it_names(causal_folder, data, tmp_path):
    (data / "run.yaml").write_text(yaml.safe_dump({"model": "unused", "data": {"eval": str(data / "rows.jsonl")}}))
    settings = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(causal_folder), settings)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(causal_folder).save_pretrained(tmp_path / "merged")
    found, merged = (scores(tmp_path / name, data, tmp_path / f"{name}.json") for name in ("adapter", "merged"))
    assert found["loss"] == pytest.approx(merged["loss"], rel=1e-4)

    # The same files are the same model, and others, also of the same weights, are not.
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    plain = Settings(model="unused")
    first, again = (load_scored(str(path.parent), plain).identity(plain) for _ in range(2))
    path.write_text(json.dumps(config | {"lora_alpha": 3, "target_modules": config["target_modules"][::-1]}))
    scaled = load_scored(str(path.parent), plain)
    assert first == again != scaled.identity(plain)
    path.write_text(json.dumps(config | {"target_modules": config["target_modules"][::-1]}))
    assert load_scored(str(path.parent), plain).identity(plain) == first
    assert scaled.weights == load_scored(str(path.parent), plain).weights

    path.write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere"}))
    refused = command("evaluate", tmp_path / "adapter", data / "run.yaml")
    assert refused.exit_code == 2
    assert "names '/nowhere' as its base" in refused.stderr
