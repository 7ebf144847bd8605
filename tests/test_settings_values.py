"""Values of a config: converted where they can mean one thing, else refused by key, before anything is done."""

import math
import re

import pytest
import yaml
from conftest import pairs
from hypothesis import given
from hypothesis import strategies as st
from test_settings_library_fields import CLASSES
from typer.testing import CliRunner

from scalora.cli import app
from scalora.runs.errors import InputError
from scalora.runs.field_values import converted
from scalora.runs.library_fields import dataclass_fields
from scalora.runs.settings import checked_settings, load_settings, run_settings, section_fields
from scalora.runs.yaml_file import yaml_dump
from scalora.studies.study import load_study_file


def settings(**content):
    return checked_settings({"model": "base"} | content)


def refused(section, key, value, task="sft", method="scalora"):
    with pytest.raises(InputError) as caught:
        settings(task=task, method=method, **{section: {key: value}})
    return str(caught.value)


# --- types --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 10**9), st.sampled_from(["max_steps", "per_device_train_batch_size", "save_total_limit"]))
def test_a_whole_number_is_an_integer_where_one_is_wanted(number, key):
    value = settings(training={key: float(number)}).training[key]
    assert type(value) is int
    assert value == number


@pytest.mark.parametrize("text", ["1e1", "10.0", "1_0", "0xA", "+10"])
def test_every_way_to_write_ten_is_ten(text, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"model: base\ntrack_updates: {text}\nevaluate: {{batch_size: {text}}}\nlora: {{r: {text}}}\n"
        f"scalora: {{interval: {text}}}\nmethod_options: {{}}\ntraining: {{max_steps: {text}}}\n"
    )
    read = load_settings(tmp_path / "run.yaml", ["--seed", text])
    found = [read.track_updates, read.evaluate.batch_size, read.lora["r"], read.scalora["interval"]]
    found += [read.training["max_steps"], read.training["seed"]]
    assert found == [10] * 6
    assert {type(value) for value in found} == {int}


WRONG_TYPES = [
    ("training", "max_steps", 10.5, "write a whole number"),
    ("training", "max_steps", True, "write a whole number"),
    ("training", "max_steps", "12:30", "write a number"),
    ("training", "learning_rate", "1e-3", "write a number"),
    ("training", "learning_rate", [1e-3], "write a number"),
    ("training", "learning_rate", False, "write a number"),
    ("training", "max_grad_norm", None, "write a number"),
    ("training", "seed", None, "write a whole number"),
    ("training", "bf16_full_eval", 1, "write true or false"),
    ("training", "packing", "yes", "write true or false"),
    ("training", "run_name", 5, "write a text, in quotes"),
    ("training", "run_name", True, "write a text, in quotes"),
    ("training", "label_names", [5], "write a text, in quotes"),
    ("training", "report_to", {"a": 1}, "write one of: text | list of text | null"),
    ("lora", "r", None, "write a whole number"),
    ("lora", "r", 2.5, "write a whole number"),
    ("lora", "lora_alpha", "8", "write a number"),
    ("lora", "bias", "some", "write one of: none | all | lora_only"),
    ("lora", "use_rslora", "on", "write true or false"),
    ("lora", "rank_pattern", {"q_proj": 2.5}, "write a whole number"),
    ("lora", "rank_pattern", {"q_proj": "eight"}, "write a number"),
    ("lora", "layers_to_transform", [0, True], "write a whole number"),
    ("lora", "target_modules", ["q_proj", 1], "write a text, in quotes"),
    ("scalora", "interval", None, "write a whole number"),
    ("scalora", "native", "yes", "write true or false"),
]


@pytest.mark.parametrize(("section", "key", "value", "named"), WRONG_TYPES)
def test_a_value_of_another_type(section, key, value, named):
    message = refused(section, key, value)
    assert message.startswith(f"{section}.{key}={'null' if value is None else repr(value)}: ")
    assert named in message


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_key_takes_a_number_that_is_not_finite(number):
    for section in ("training", "lora", "scalora"):
        for key in section_fields(section):
            message = refused(section, key, number)
            assert message.startswith(f"{section}.{key}={number!r}: write a finite number")
    assert "finite" in refused("training", "lr_scheduler_kwargs", {"min_lr": number})
    assert "finite" in refused("lora", "alpha_pattern", {"q_proj": number})


@pytest.mark.parametrize(("module", "name"), CLASSES[:3])
def test_a_single_value_is_a_list_of_one_where_only_a_list_is_possible(module, name):
    found = []
    for key, field in dataclass_fields(module, name).items():
        if "list[str]" in field.annotation and not re.search(r"\bstr\b", field.annotation.replace("list[str]", "")):
            assert converted("lm_head", field.annotation) == ["lm_head"], key
            found.append(key)
    assert found
    assert converted("q_proj|v_proj", "Optional[Union[list[str], str]]") == "q_proj|v_proj"


def test_a_text_for_modules_to_save_is_one_module(tmp_path):
    (tmp_path / "run.yaml").write_text("model: base\nlora: {modules_to_save: lm_head, target_modules: all-linear}\n")
    read = load_settings(tmp_path / "run.yaml", ["--evaluate.metrics", "exact_match", "--lora.layers_to_transform=1"])
    assert read.lora == {"modules_to_save": ["lm_head"], "target_modules": "all-linear", "layers_to_transform": 1}
    assert read.evaluate.metrics == ["exact_match"]


@pytest.mark.parametrize("text", ["no", "on", "yes", "off", "2024-01-01", "12:30", "n", "null_", "1e", "='"])
def test_texts_stay_texts_where_texts_are_wanted(text, tmp_path):
    quoted = f'"{text}"' if "'" in text else text
    (tmp_path / "run.yaml").write_text(
        f"model: {quoted}\ndata: {{text: {quoted}, label: {quoted}}}\nlora: {{target_modules: [{quoted}]}}\n"
        f"training: {{run_name: {quoted}}}\n"
    )
    read = load_settings(tmp_path / "run.yaml")
    assert {read.model, read.data.text, read.data.label, read.training["run_name"], *read.lora["target_modules"]} == {
        text
    }


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"data": {"label": 5}}, "data.label=5: write a text, in quotes"),
        ({"data": {"train": True}}, "data.train=True: write"),
        ({"model": 7}, "model=7: write a text, in quotes"),
        ({"output_dir": None}, "output_dir"),
        ({"save_model": "no"}, "save_model='no': write true or false"),
        ({"save_model": 1}, "save_model=1: write true or false"),
        ({"evaluate": {"batch_size": True}}, "evaluate.batch_size=True: write a whole number"),
        ({"evaluate": {"batch_size": 0}}, "evaluate.batch_size=0"),
        ({"evaluate": {"limit": math.inf}}, "evaluate.limit=inf: write a finite number"),
        ({"evaluate": {"metrics": ["los"]}}, "evaluate.metrics=['los']: write one of: loss"),
        ({"lora": [1]}, "lora=[1]"),
    ],
)
def test_our_own_keys_follow_the_same_rules(content, named):
    with pytest.raises(InputError, match=re.escape(named)):
        settings(**content)


# --- values that make no sense ------------------------------------------------------------------------------------

SENSELESS = {
    "training": {
        "max_steps": [0, -2],
        "num_train_epochs": [0, -1],
        "gradient_accumulation_steps": [0, -1],
        "per_device_train_batch_size": [0, -8],
        "per_device_eval_batch_size": [0],
        "eval_accumulation_steps": [0],
        "learning_rate": [0, -1e-3],
        "weight_decay": [-0.1],
        "adam_beta1": [1, -0.1],
        "adam_beta2": [1.5],
        "adam_epsilon": [-1e-8],
        "max_grad_norm": [-1],
        "warmup_steps": [-1, 1.5],
        "logging_steps": [0, -1, 2.5],
        "eval_steps": [0],
        "save_steps": [0, -5],
        "save_total_limit": [0],
        "seed": [-1, 2**32],
        "data_seed": [-1],
        "label_smoothing_factor": [1, -0.1],
        "max_length": [0],
        "dataloader_num_workers": [-1],
    },
    "lora": {
        "r": [0, -4],
        "lora_alpha": [0, -8],
        "lora_dropout": [1, -0.1, 1.5],
        "layers_to_transform": [-1, [0, -1]],
        "rank_pattern": [{"q_proj": 0}],
        "alpha_pattern": [{"q_proj": 0}],
        "target_modules": [[], "", ["q_proj", ""]],
        "modules_to_save": [[""]],
        "trainable_token_indices": [[-1], {"embed_tokens": [-1]}],
    },
}


@pytest.mark.parametrize(("section", "key"), [(section, key) for section, keys in SENSELESS.items() for key in keys])
def test_a_value_that_makes_no_sense(section, key):
    for value in SENSELESS[section][key]:
        assert re.match(rf"{section}\.{key}={re.escape(repr(value))}: must ", refused(section, key, value))


def test_values_that_make_sense_are_taken():
    training = {"max_steps": -1, "max_grad_norm": 0, "warmup_steps": 0.1, "logging_steps": 0.5, "seed": 2**32 - 1}
    training |= {"weight_decay": 0, "adam_beta1": 0, "eval_steps": None, "pad_to_multiple_of": "auto"}
    lora = {"lora_alpha": 0.5, "lora_dropout": 0, "rank_pattern": {"q_proj": 4}, "layers_to_transform": [0, 1]}
    taken = settings(training=training, lora=lora)
    assert (taken.training, taken.lora) == (training, lora)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "PiSSA", "olora", "corda", "loftq", "lora_ga", "eva"])
@pytest.mark.parametrize("method", ["scalora", "lora", "rslora", "no_transport"])
def test_a_start_that_changes_the_base_is_only_its_own_methods(start, method):
    message = refused("lora", "init_lora_weights", start, method=method)
    assert message.startswith(f"lora.init_lora_weights={start!r}: ")
    if "pissa" in start.lower():
        assert message.endswith("use method: pissa")


def test_other_starts():
    assert settings(method="pissa", lora={"init_lora_weights": "pissa"}).lora == {"init_lora_weights": "pissa"}
    for start in (True, False, "gaussian", "orthogonal"):
        assert settings(lora={"init_lora_weights": start}).lora["init_lora_weights"] is start
    assert "must be one of true, false, gaussian" in refused("lora", "init_lora_weights", "gausian")


def test_settings_that_would_have_no_effect_or_none_for_the_task():
    assert "in its own output_dir with --resume" in refused("training", "resume_from_checkpoint", "checkpoint-3")
    assert "nothing would be trained" in refused("lora", "inference_mode", True)
    message = refused("training", "label_smoothing_factor", 0.1, task="regression")
    assert message.startswith("training.label_smoothing_factor=0.1: a regression has no classes")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--max_steps", "3", "--max_steps", "4"], "--training.max_steps is given twice"),
        (["--max_steps=3", "--training.max_steps=3"], "--training.max_steps is given twice"),
        (["--lora.r", "3", "--lora", "{lora_alpha: 4}"], "--lora replaces --lora.r"),
        (["--lora", "{r: 1, r: 2}"], "the key 'r' is there twice"),
        (["--learning_rate", "0"], "training.learning_rate=0: must be above 0"),
        (["--seed", "012"], "--seed 012: the value is 012, which is octal to some"),
        (["--output_dir", ""], "--output_dir needs a value"),
    ],
)
def test_the_command_line_follows_the_same_rules(words, named, tmp_path):
    (tmp_path / "run.yaml").write_text("model: base\n")
    with pytest.raises(InputError, match=re.escape(named)):
        load_settings(tmp_path / "run.yaml", words)


def test_a_section_and_then_a_key_of_it(tmp_path):
    (tmp_path / "run.yaml").write_text("model: base\n")
    words = ["--lora", "{lora_alpha: 4}", "--lora.r", "3"]
    assert load_settings(tmp_path / "run.yaml", words).lora == {"lora_alpha": 4, "r": 3}


# --- paths --------------------------------------------------------------------------------------------------------


def test_home_and_variables_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", "deep/down")
    (tmp_path / "run.yaml").write_text(
        "model: ~/base\noutput_dir: $HOME/${WHERE}/run\ndata: {train: ~/train.jsonl, eval: ~/$WHERE/eval.jsonl}\n"
        'training: {chat_template_path: ~/chat.jinja, accelerator_config: \'{"a": "~/x"}\', run_name: ~/name}\n'
    )
    read = load_settings(tmp_path / "run.yaml")
    assert read.model == f"{tmp_path}/base"
    assert read.output_dir == f"{tmp_path}/deep/down/run"
    assert (read.data.train, read.data.eval) == (f"{tmp_path}/train.jsonl", f"{tmp_path}/deep/down/eval.jsonl")
    assert read.training["chat_template_path"] == f"{tmp_path}/chat.jinja"
    assert read.training["accelerator_config"] == '{"a": "~/x"}'
    assert read.training["run_name"] == "~/name"
    (tmp_path / "config.yaml").write_text(yaml_dump(read.model_dump()))
    assert run_settings(tmp_path) == read


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("~nobody-of-this-name/run", "there is no user 'nobody-of-this-name'"),
        ("$NO_SUCH_VARIABLE/run", "the environment has no variable NO_SUCH_VARIABLE"),
        ("${NO_SUCH_VARIABLE}/run", "the environment has no variable NO_SUCH_VARIABLE"),
    ],
)
def test_a_path_that_stands_for_nothing(path, named, monkeypatch):
    for content in ({"output_dir": path}, {"data": {"train": path}}, {"training": {"chat_template_path": path}}):
        with pytest.raises(InputError, match=re.escape(f"{path!r}: {named}")):
            settings(**content)


def test_an_existing_file_with_a_dollar_sign(tmp_path):
    (tmp_path / "in $US.jsonl").touch()
    assert settings(data={"train": f"{tmp_path}/in $US.jsonl"}).data.train == f"{tmp_path}/in $US.jsonl"


# --- studies ------------------------------------------------------------------------------------------------------

STUDY = {
    "output_dir": "~/study",
    "seeds": [1],
    "learning_rates": [1e-3],
    "run": {"model": "base", "data": {"train": "a.jsonl", "eval": "b.jsonl"}},
    "methods": {"lora": None},
}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seeds": [True]}, "seeds=[True]: write a whole number"),
        ({"seeds": [-1]}, "-1 must be from 0 to 4294967295"),
        ({"tuning_seeds": [2**32]}, "4294967296 must be from 0"),
        ({"seeds": [1.5]}, "write a whole number"),
        ({"learning_rates": [math.inf]}, "write a finite number"),
        ({"learning_rates": [0]}, "must be above 0"),
        ({"methods": {"lora": {"learning_rates": [True]}}}, "True is not a number above 0"),
        ({"methods": {"lora": {"training": {"max_steps": 0}}}}, "methods.lora: training.max_steps=0: must be"),
        ({"methods": {"lora": {"lora": {"rr": 1}}}}, "methods.lora: unknown key 'lora.rr': did you mean 'r'?"),
        ({"run": STUDY["run"] | {"evaluate": {"limit": 0}}}, "run: evaluate.limit=0"),
        ({"basline": "lora"}, "unknown key 'basline': did you mean 'baseline'?"),
        ({"metric": 3}, "metric=3: write a text, in quotes"),
    ],
)
def test_a_study_follows_the_same_rules(changes, named, tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | changes))
    with pytest.raises(InputError, match=re.escape(named)):
        load_study_file(tmp_path / "study.yaml")


def test_the_folder_and_the_numbers_of_a_study(tmp_path, monkeypatch, write_jsonl):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(name, pairs(2))
    text = yaml.safe_dump(STUDY).replace("a.jsonl", "~/a.jsonl").replace("b.jsonl", "~/b.jsonl")
    (tmp_path / "study.yaml").write_text(text.replace("- 1\n", "- 1e0\n- 0x10\n"))
    study = load_study_file(tmp_path / "study.yaml")
    assert study.folder == tmp_path / "study"
    assert study.seeds == [1, 16]


# --- nothing is done ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_senseless_value_leaves_an_earlier_run_alone(causal_folder, write_jsonl, tmp_path):
    content = {
        "model": str(causal_folder),
        "output_dir": str(tmp_path / "run"),
        "data": {"train": str(write_jsonl("train.jsonl", pairs(8)))},
        "training": {"max_steps": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    assert CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml")]).exit_code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for word in (
        "max_grad_norm=null",
        "gradient_accumulation_steps=0",
        "lora.modules_to_save=lm_hed",
        "lora.lora_bias=true",
        "lora.layers_to_transform=[7]",
        "lr_scheduler_type=cosine_with_min_lr",
        "optim_args=nonsense",
    ):
        for dry in ([], ["--dry-run"]):
            result = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--overwrite", f"--{word}", *dry])
            assert result.exit_code == 2, word
            errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1
            key = word.partition("=")[0].removeprefix("lora.").replace("optim_args", "optim")
            assert key in errors[0]
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
