"""What exported and saved adapters name as their base: something that others can load, or nothing."""

import json
import os
import shutil

import pytest
import torch
import yaml
from conftest import pairs
from gguf import GGUFWriter
from huggingface_hub import ModelCard
from models import tiny_llama, trainable
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import scalora
from scalora import ScaLora, ScaLoraConfig
from scalora.cli import app
from scalora.runs.base_names import named_base, origin_of_gguf
from scalora.runs.models import Source

TOKENS = torch.arange(12)[None]


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def attached(base):
    settings = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, settings)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, merge="factored"))
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    return model


def named_in(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config["base_model_name_or_path"], config["revision"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """PEFT would ask the hub about the models that are named here."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("spelling", ["base", "./base", "base/", "elsewhere/../base"])
def test_a_relative_path_is_loaded_from_anywhere(spelling, base, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = attached(AutoModelForCausalLM.from_pretrained(spelling))
    model.save_pretrained(tmp_path / "saved")
    scalora.export_adapter(AutoModelForCausalLM.from_pretrained(spelling), "saved", "out")
    monkeypatch.chdir("/")
    for folder in ("saved", "out"):
        assert named_in(tmp_path / folder) == (str(base), None)
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(
            loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits, rtol=1e-2, atol=1e-2
        )


@pytest.mark.slow
def test_a_model_of_the_hub_is_pinned_to_the_commit_that_was_loaded(tmp_path):
    for number, (revision, wanted) in enumerate([(None, "c0ffee"), ("v2", "v2")]):
        model = tiny_llama()
        model.name_or_path, model.config._commit_hash = "someone/some-model", "c0ffee"
        model = attached(model)
        model.peft_config["default"].revision = revision
        model.save_pretrained(tmp_path / str(number))
        assert named_in(tmp_path / str(number)) == ("someone/some-model", wanted)
        for name, expected in (("someone/other", ("someone/other", None)), (None, ("someone/some-model", revision))):
            out = tmp_path / f"{number}-{name is None}"
            scalora.export_adapter(tiny_llama(), tmp_path / str(number), out, name=name)
            assert named_in(out) == expected


@pytest.mark.parametrize("name", ["/nowhere/at-all", "", "no-config", "model.gguf", "a/b/c"])
def test_what_nothing_can_load_is_not_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no-config").mkdir()
    model = tiny_llama()
    model.name_or_path = name
    attached(model).save_pretrained(tmp_path / "saved")
    assert named_in(tmp_path / "saved") == (None, None)
    assert name == "" or name not in (tmp_path / "saved" / "README.md").read_text()


def test_the_model_card_names_a_model_of_the_hub_and_no_path_of_this_machine(base, tmp_path):
    attached(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(tmp_path / "local")
    assert str(tmp_path) not in (tmp_path / "local" / "README.md").read_text()
    model = tiny_llama()
    model.name_or_path = "someone/some-model"
    attached(model).save_pretrained(tmp_path / "hub")
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.base_model == "someone/some-model"
    assert "base_model:adapter:someone/some-model" in card.data.tags


def gguf(path, **metadata):
    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        writer.add_string(f"general.{key.replace('__', '.')}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("metadata", "origin"),
    [
        ({"source__huggingface__repository": "someone/model"}, "someone/model"),
        ({"source__repo_url": "https://huggingface.co/someone/model"}, "someone/model"),
        ({"source__url": "https://huggingface.co/someone/model/tree/main"}, "someone/model"),
        ({"repo_url": "https://huggingface.co/someone/model/"}, "someone/model"),
        ({"repo_url": "https://huggingface.co/someone/model-GGUF"}, None),
        ({"repo_url": "https://github.com/someone/model"}, None),
        # The parent of a model has other weights than the model.
        ({"base_model__0__repo_url": "https://huggingface.co/someone/parent"}, None),
        ({}, None),
    ],
)
def test_a_gguf_file_may_say_what_it_was_converted_from(metadata, origin, tmp_path):
    path = gguf(tmp_path / "model.gguf", **metadata)
    assert origin_of_gguf(path) == origin
    base, note = named_base(Source(str(tmp_path), "model.gguf"))
    assert base.name == origin
    assert str(path) in note
    assert ("convert_lora_to_gguf.py" in note) == (origin is None)


@pytest.fixture
def run(causal_folder, write_jsonl, tmp_path, monkeypatch):
    """A run with a base that is named by a relative path."""
    shutil.copytree(causal_folder, tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path)
    training = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_checkpointing": False}
    content = {
        "model": "models/base/",
        "output_dir": "run",
        "data": {"train": str(write_jsonl("train.jsonl", pairs(12)))},
        "training": training,
        "scalora": {"merge": "factored", "warmup_steps": 0},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(content))
    result = command("train", "train.yaml")
    assert result.exit_code == 0, result.stderr[-400:]
    return tmp_path / "run"


@pytest.mark.slow
def test_the_command_says_what_it_names_and_takes_another_name(run, tmp_path):
    assert named_in(run / "adapter") == (str(tmp_path / "models" / "base"), None)
    result = command("export", run)
    assert result.exit_code == 0, result.stderr[-400:]
    assert named_in(run / "export-adapter") == (str(tmp_path / "models" / "base"), None)
    for wanted, written in (("someone/model", "someone/model"), ("models/base", str(tmp_path / "models" / "base"))):
        out = tmp_path / wanted.replace("/", "-")
        result = command("export", run, "--base-name", wanted, "--output", out)
        assert result.exit_code == 0, result.stderr[-400:]
        assert named_in(out) == (written, None)
        assert json.loads((out / "export.json").read_text())["base"] == written
    assert "base that the adapter names" in result.stdout
    (tmp_path / "models").rename(tmp_path / "moved")
    assert command("export", run, "--output", tmp_path / "out").exit_code == 2
    result = command("export", run, "--base", "moved/base", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr[-400:]
    assert named_in(tmp_path / "out") == (str(tmp_path / "moved" / "base"), None)
    refused = command("export", run, "--base", "moved/base", "--quantization", "nf4", "--output", tmp_path / "more")
    assert "leave it out" in refused.stderr


@pytest.mark.slow
def test_an_adapter_of_a_gguf_base_names_none_and_says_how_to_load_it(run, tmp_path, monkeypatch):
    from scalora.runs import finished_run

    source = Source(str(tmp_path / "files"), "model.gguf")
    (tmp_path / "files").mkdir()
    gguf(tmp_path / "files" / "model.gguf")
    real = finished_run.load_base

    def load(given, *rest):
        model = real(Source(str(tmp_path / "models" / "base"), None) if given == source else given, *rest)
        model.name_or_path = model.config._name_or_path = given.name
        return model

    monkeypatch.setattr(finished_run, "load_base", load)
    monkeypatch.setattr(finished_run, "resolve_source", lambda name: source)
    result = command("export", run, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr[-400:]
    assert named_in(tmp_path / "out") == (None, None)
    assert "It names no base" in result.stdout
    readme = (tmp_path / "out" / "README.md").read_text()
    assert f"from_pretrained({str(tmp_path / 'files')!r}, gguf_file='model.gguf')" in readme
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model is None
    assert os.listdir(tmp_path / "files") == ["model.gguf"]
