"""The commented config that `scalora config` prints, the list of keys in the help, and the page of the docs."""

import dataclasses
import re
import runpy
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import pytest
import yaml
from conftest import WORDS, pairs
from typer.testing import CliRunner

from scalora import ScaLoraConfig
from scalora.cli import app
from scalora.config import LORA_DEFAULTS
from scalora.rivals import METHODS
from scalora.rivals.method import Method
from scalora.runs import prepare
from scalora.runs.config_template import config_template, key_list
from scalora.runs.errors import InputError
from scalora.runs.prepare import training_arguments
from scalora.runs.sections import DataSettings, EvaluateSettings, NeedsSettings, RewardSettings
from scalora.runs.settings import Settings, load_settings, section_fields
from scalora.runs.tasks import Task
from scalora.runs.training_defaults import DEPENDENT_DEFAULTS, TRAINING_DEFAULTS
from scalora.runs.type_words import type_words

ROOT = Path(__file__).parent.parent
TASKS = get_args(Task)
NEEDED = ("--model", "base", "--data.train", "train.jsonl")

OWN = {
    "": {key: info.description for key, info in Settings.model_fields.items()},
    "data": {key: info.description for key, info in DataSettings.model_fields.items()},
    "reward": {key: info.description for key, info in RewardSettings.model_fields.items()},
    "evaluate": {key: info.description for key, info in EvaluateSettings.model_fields.items()},
    "needs": {key: info.description for key, info in NeedsSettings.model_fields.items()},
    "scalora": {field.name: field.metadata["help"] for field in dataclasses.fields(ScaLoraConfig)},
}


def scalora(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def loaded(tmp_path, text, *words):
    (tmp_path / "run.yaml").write_text(text)
    rewards = ["--reward.pattern", "a"] if re.search("^task: grpo", text, re.MULTILINE) else []
    return load_settings(tmp_path / "run.yaml", [*NEEDED, *rewards, *words])


def entries(text):
    """Each key of a template as (section, key): whether it is set, its value and its comment in one line."""
    found, section, comment = {}, "", []
    for line in text.splitlines():
        if match := re.fullmatch(r"( *)# (.*)", line):
            comment.append(match[2])
        elif match := re.fullmatch(r"( *)(#?)(\w+):(.*)", line):
            section = section if match[1] else ""
            found[section, match[3]] = not match[2], match[4].strip(), " ".join(comment)
            section = section if match[1] else match[3]
            comment = []
        elif not line:
            comment = []
    return found


def built(settings):
    """What a run makes of its settings: the method, the adapter's config, the training arguments and ScaLoRA's."""
    method = prepare.method_of(settings)
    arguments = training_arguments(settings, method, evaluates=settings.data.eval is not None)
    return (
        method,
        prepare.peft_config_of(settings, method),
        arguments.to_dict(),
        getattr(method, "config", ScaLoraConfig.from_dict(settings.scalora)),
    )


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_the_template_sets_every_key_to_what_it_is_without_it(task, everything, tmp_path):
    full = loaded(tmp_path, config_template(task, everything=everything))
    least = loaded(tmp_path, f"task: {task}")
    sections = {"method_options", "lora", "scalora", "training"}
    assert full.model_dump(exclude=sections) == least.model_dump(exclude=sections)
    assert built(full) == built(least)
    with_data = [loaded(tmp_path, text, "--data.eval", "e.jsonl") for text in (config_template(task), f"task: {task}")]
    assert built(with_data[0]) == built(with_data[1])


@pytest.mark.parametrize("method", METHODS)
def test_the_template_of_a_method_sets_its_own_defaults(method, tmp_path):
    full = loaded(tmp_path, config_template("sft", method))
    least = loaded(tmp_path, f"method: {method}")
    assert built(full) == built(least)
    options = {field.name for field in dataclasses.fields(METHODS[method])} - {"config"}
    assert set(full.method_options) == options
    shown = entries(config_template("sft", method))
    assert all(len(shown["method_options", option][2]) > 40 for option in options)


def test_every_own_key_is_there_with_its_meaning_type_and_default():
    shown = entries(config_template())
    for section, keys in OWN.items():
        for key, description in keys.items():
            is_set, _, comment = shown[section, key]
            assert is_set == ((section, key) != ("scalora", "mode"))  # whose default depends on the optimizer
            assert " ".join(description.replace("``", "`").split()) in comment
            if (section, key) not in {("", name) for name in ("method_options", "lora", "training", *OWN)}:
                assert re.search(r" \[.+; (default: .+|required)\]$", comment), key
    assert shown["", "dtype"][2].endswith("[float32 | bfloat16 | float16; default: float32]")
    assert shown["evaluate", "limit"][2].endswith("[integer > 0 | null; default: null]")
    assert shown["scalora", "merge"][2].endswith("[auto | dense | dense_8bit | stochastic | factored; default: auto]")
    assert shown["", "model"][2].endswith("[text; required]")


@pytest.mark.parametrize("task", TASKS)
def test_all_keys_of_the_libraries_are_there_and_can_be_set(task, tmp_path):
    text = config_template(task, everything=True)
    shown = entries(text)
    for section in ("lora", "training"):
        fields = section_fields(section, task)
        assert {key for where, key in shown if where == section} == set(fields)
        for key, field in fields.items():
            assert field.help.replace("%%", "%").replace("``", "`") in shown[section, key][2]
    everything = yaml.safe_load(re.sub(r"^( *)#(?=\w+:)", r"\1", text, flags=re.MULTILINE))
    assert set(everything["training"]) == set(section_fields("training", task))
    loaded(tmp_path, yaml.safe_dump(everything))  # no key is refused


def test_defaults_that_differ_from_the_librarys_are_said():
    shown = entries(config_template("classification", everything=True))
    assert shown["training", "logging_steps"][2].endswith("[number; default: 10; the library's: 500]")
    assert shown["training", "save_strategy"][2].endswith("default: no; the library's: steps]")
    assert shown["training", "seed"][2].endswith("[integer; default: 42]")
    assert shown["training", "learning_rate"][2].endswith(
        "default of scalora: 0.23 by the model's hidden size: 0.0004 for 576, 5.6e-05 for 4,096]"
    )
    assert shown["lora", "target_modules"][2].endswith("default: all-linear; the library's: null]")
    assert entries(config_template("sft", "full"))["training", "learning_rate"][1] == "2.0e-05"
    assert "[number; default of full: 2.0e-05]" in config_template("sft", "full")
    assert "default of loraplus: 0.00025;" in config_template("sft", "loraplus")
    assert "set by the method galore" in config_template("sft", "galore")


def test_what_the_trainer_is_given_is_declared(monkeypatch):
    monkeypatch.setattr(prepare, "training_class", lambda task: dict)
    settings = Settings(model="base", data={"text": "story"})
    given = training_arguments(settings, Method(), evaluates=True)
    assert set(given) == {"learning_rate", *TRAINING_DEFAULTS, *DEPENDENT_DEFAULTS} - {"task_type"}
    assert given["eval_strategy"] == DEPENDENT_DEFAULTS["eval_strategy"][0]
    assert {key: given[key] for key in TRAINING_DEFAULTS} == TRAINING_DEFAULTS
    assert prepare.peft_config_of(settings, Method()).task_type == DEPENDENT_DEFAULTS["task_type"][0]
    assert not set(LORA_DEFAULTS) & set(DEPENDENT_DEFAULTS)


def test_a_template_fits_80_columns_but_for_long_words():
    for everything in (False, True):
        lines = config_template(everything=everything).splitlines()
        assert [line for line in lines if len(line) > 80 and " " in line.strip("# ")] == []


def test_the_help_of_train_lists_every_own_key_with_type_default_and_meaning():
    result = scalora("train", "--help")
    assert result.exit_code == 0
    assert key_list().rstrip() in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    text = " ".join(result.stdout.split())
    for section, keys in OWN.items():
        for key, description in keys.items():
            assert " ".join(description.replace("``", "`").split()) in text, key
            if key not in ("method_options", "lora", "training", *OWN):
                assert re.search(
                    rf" {section and f'{section}.'}{key} \[[^\]]+; (default: [^\]]+\]?|required)\]", text
                ), key
    for section in ("lora", "training"):
        assert re.search(rf" {section}: Any field of .*? Defaults: .*? see `scalora config --all`\.", text)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sft", "classification", "regression"])
def test_the_command_prints_a_config_that_train_takes(task, causal_folder, encoder_folder, write_jsonl, tmp_path):
    printed = scalora("config", "--task", task)
    assert printed.exit_code == 0
    (tmp_path / "run.yaml").write_text(printed.stdout)
    label = {"classification": lambda i: WORDS[i % 3], "regression": lambda i: i / 7, "sft": lambda i: None}[task]
    rows = pairs(8) if task == "sft" else [{"text": f" {WORDS[i]}", "label": label(i)} for i in range(8)]
    model = causal_folder if task == "sft" else encoder_folder
    words = ["--model", model, "--data.train", write_jsonl("train.jsonl", rows), "--output_dir", tmp_path / "run"]
    result = scalora("train", tmp_path / "run.yaml", *words, "--max_steps", 2, "--scalora.warmup_steps", 1)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "summary.json").is_file()
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_the_options_of_the_command():
    assert scalora("config").stdout == config_template()
    assert scalora("config", "--all", "--method", "relora").stdout == config_template("sft", "relora", everything=True)
    with pytest.raises(InputError, match="method='lorra'"):
        config_template("sft", "lorra")


def test_a_method_that_needs_a_package(monkeypatch):
    monkeypatch.setattr("scalora.rivals.full_weights.find_spec", lambda name: None)
    result = scalora("config", "--method", "galore")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: method='galore': ")
    assert "pip install galore-torch" in result.stderr


@pytest.mark.parametrize(
    ("annotation", "named", "words"),
    [
        ("str", (), "text"),
        ("Optional[Union[list[str], str]]", (), "list of text | text | null"),
        ("typing.Optional[typing.Literal['nf4', 'int8']]", (), "nf4 | int8 | null"),
        ("list[typing.Literal['a', 'b']]", (), "list of a | b"),
        ("None | bool | Literal[False, 3]", (), "true | false | 3 | null"),
        ("IntervalStrategy | str", ("no", "steps"), "no | steps"),
        ("Optional[EvaConfig]", (), "EvaConfig | null"),
        ("dict[str, Any] | float", (), "mapping | number"),
        ("Any", (), "anything"),
    ],
)
def test_a_type_in_words(annotation, named, words):
    assert type_words(annotation, named) == words


def test_the_page_of_the_docs_is_what_the_declarations_give():
    script = runpy.run_path(str(ROOT / "docs" / "config_page.py"))
    page = script["PAGE"].read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    for library in script["LIBRARIES"]:
        assert f"{library} {pinned[library]}" in page, f"run `python docs/config_page.py` with {library}"
    if any(version(library) != pinned[library] for library in script["LIBRARIES"]):
        pytest.skip("the page is of the pinned versions, and others are installed")
    assert page == script["page"](), "run `python docs/config_page.py`"


@pytest.mark.parametrize("fsdp", ["true", "full_shard"])
def test_the_settings_of_shards_are_the_trainers_own_and_stay_as_they_are_written(fsdp, tmp_path):
    settings = loaded(tmp_path, f"task: sft\ntraining: {{fsdp: {fsdp}, fsdp_config: {{fsdp_version: 2}}}}")
    arguments = training_arguments(settings, prepare.method_of(settings), evaluates=False)
    assert (arguments.fsdp, arguments.fsdp_plugin_args["fsdp_version"]) == (True, 2)
    assert settings.training["fsdp_config"] == {"fsdp_version": 2}
