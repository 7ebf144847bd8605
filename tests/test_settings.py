"""Reading and checking a config."""

import dataclasses
import json

import pytest
from peft import LoraConfig
from transformers import TrainingArguments
from trl import SFTConfig

from scalora.rivals import METHODS
from scalora.rivals.method import Method
from scalora.runs.errors import InputError
from scalora.runs.settings import Settings, check_nested, load_settings, method_class, run_settings, training_class


@pytest.fixture
def load(tmp_path):
    def load(text, *words):
        (tmp_path / "run.yaml").write_text(text)
        return load_settings(tmp_path / "run.yaml", words)

    return load


def test_a_section_without_keys_is_empty(load):
    empty = load("model: base\nlora:\n  # r: 4\ndata:\nscalora:\ntraining:\nevaluate:\nmethod_options:\n")
    assert empty == load("model: base")
    assert load("model: base\nlora:\n", "--lora.r", "4").lora == {"r": 4}
    assert load("", "--model", "base").model == "base"


def test_a_word_of_the_command_line_replaces_the_key_of_the_file(load):
    settings = load("model: base\nlora: {r: 4, lora_alpha: 4}", "--lora.r=2", "--max-steps", "7", "--data.eval", "null")
    assert settings.lora == {"r": 2, "lora_alpha": 4}
    assert settings.training == {"max_steps": 7}
    assert settings.data.eval is None
    assert load("model: base", "--max_steps", "-1").training == {"max_steps": -1}


def default_values(cls):
    """The fields of a class with their defaults, as far as those are plain data."""
    found = {}
    for field in dataclasses.fields(cls):
        made = field.default_factory is not dataclasses.MISSING
        value = field.default_factory() if made else field.default
        plain = (str, int, float, bool, list, dict, type(None))
        found[field.name] = value if type(value) in plain else None
    return found


@pytest.mark.parametrize(("task", "cls"), [("sft", SFTConfig), ("regression", TrainingArguments)])
def test_no_key_of_the_libraries_is_refused(task, cls, load):
    training, lora = (default_values(c) for c in (cls, LoraConfig))
    checked = check_nested(Settings(model="base", task=task, training=training, lora=lora))
    assert (checked.training, checked.lora) == (training, lora)
    bare = [
        word
        for name, value in training.items()
        if name not in Settings.model_fields
        for word in (f"--{name}", json.dumps(value) if value != "" else "''")
    ]
    assert load(f"model: base\ntask: {task}", *bare).training.keys() == training.keys() - Settings.model_fields.keys()
    assert training_class(task) is cls


def test_a_text_that_a_field_takes_is_not_refused(load):
    values = {"include_num_input_tokens_seen": "no", "lr_scheduler_type": "cosine", "report_to": "none", "fsdp": "off"}
    assert load("model: base", *(f"--{key}={value}" for key, value in values.items())).training == values
    assert load("model: base", "--lora.init_lora_weights=gaussian").lora == {"init_lora_weights": "gaussian"}
    with pytest.raises(InputError, match=r"lora\.init_lora_weights='off': write true or false"):
        load("model: base", "--lora.init_lora_weights=off")


def test_every_method_is_known_by_name_and_has_a_class(load):
    for name in METHODS:
        assert issubclass(method_class(load("model: base", "--method", name)), Method)
    assert "nothing" not in METHODS
    assert 3 not in METHODS
    with pytest.raises(KeyError):
        METHODS["nothing"]


def test_the_config_of_a_run_must_name_a_method(tmp_path):
    (tmp_path / "config.yaml").write_text("model: base\nmethod: lora\n")
    assert run_settings(tmp_path).method == "lora"
    (tmp_path / "config.yaml").write_text("model: base\nmethod: lorra\n")
    with pytest.raises(InputError, match=r"method='lorra': the methods are scalora, lora, .*; did you mean 'lora'"):
        run_settings(tmp_path)


@pytest.mark.parametrize("section", ["lora", "training"])
def test_an_error_of_a_long_section_names_the_command_that_lists_its_keys(section):
    with pytest.raises(InputError, match=rf"unknown key '{section}\.zzz': `scalora config --all` lists the keys"):
        check_nested(Settings.model_validate({"model": "base", section: {"zzz": 1}}))
