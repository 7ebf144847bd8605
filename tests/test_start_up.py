"""What the command answers without loading the libraries: help, a config, and everything that is mistyped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"accelerate", "datasets", "matplotlib", "numpy", "pandas", "peft", "scipy", "sklearn"}
HEAVY |= {"tokenizers", "torch", "transformers", "trl"}

# Runs commands one after the other and says of each what it printed and which modules it was the first to load.
DRIVER = """
import json, os, sys
from typer.testing import CliRunner
from scalora.cli import app
known, answers = set(), {}
for name, (folder, words) in json.load(sys.stdin).items():
    os.chdir(folder)
    result = CliRunner().invoke(app, words)
    loaded = {module.partition(".")[0] for module in sys.modules}
    answers[name] = [result.exit_code, result.stdout, result.stderr, sorted(loaded - known)]
    known |= loaded
print(json.dumps(answers))
"""

ANSWERS = {
    "help": (["--help"], "Score a model"),
    "version": (["--version"], "scalora "),
    "help-of-train": (["train", "--help"], "data.train  [text | list of text | mapping | null"),
    "help-of-evaluate": (["evaluate", "--help"], "--output"),
    "help-of-compare": (["compare", "--help"], "CPU cores to use (default: all)."),
    "help-of-export": (["export", "--help"], "--max-rank"),
    "help-of-inspect": (["inspect", "--help"], "--batches"),
    "help-of-estimate": (["estimate", "--help"], "Rank of the adapter."),
    "help-of-bench": (["bench", "--help"], "--rounds"),
    "config": (["config"], "\nscalora:\n"),
    "whole-config": (["config", "--all", "--task", "classification"], "task: classification"),
}

GOOD = "model: base\ndata: {train: train.jsonl}\n"
STUDY = """
output_dir: study
seeds: [1]
baseline: lora
learning_rates: [1e-3]
run: {model: base, data: {train: train.jsonl, eval: eval.jsonl}}
methods: {lora: , scalora: }
"""

# content of the file, words after it, what the error names
RUN_MISTAKES = {
    "no-file": (None, [], "config file 'file.yaml' does not exist"),
    "no-yaml": ("model: [", [], "not valid YAML"),
    "a-list": ("- model", [], "must hold keys and values"),
    "no-model": ("task: sft", [], "'model' is missing from the config"),
    "empty-model": ("model:", [], "'model' is missing from the config"),
    "key": (f"{GOOD}metod: lora", [], "unknown key 'metod': did you mean 'method'?"),
    "key-of-training": (f"{GOOD}learning_rate: 1", [], "did you mean 'training.learning_rate'?"),
    "key-of-lora": (f"{GOOD}r: 4", [], "unknown key 'r': did you mean 'lora.r'?"),
    "data": ("model: base\ndata: {trian: x}", [], "unknown key 'data.trian': did you mean 'train'?"),
    "evaluate": (f"{GOOD}evaluate: {{limits: 3}}", [], "unknown key 'evaluate.limits': did you mean 'limit'?"),
    "training": (f"{GOOD}training: {{max_step: 3}}", [], "unknown key 'training.max_step': did you mean 'max_steps'?"),
    "training-of-another-task": (
        f"{GOOD}task: regression\ntraining: {{max_length: 3}}",
        [],
        "unknown key 'training.max_length'",
    ),
    "lora": (f"{GOOD}lora: {{lora_alfa: 3}}", [], "unknown key 'lora.lora_alfa': did you mean 'lora_alpha'?"),
    "scalora": (f"{GOOD}scalora: {{intervall: 3}}", [], "unknown key 'scalora.intervall': did you mean 'interval'?"),
    "method": (f"{GOOD}method: lorra", [], "method='lorra': the methods are scalora, lora, full"),
    "method-near": (f"{GOOD}method: galor", [], "did you mean 'galore'?"),
    "method-options": (
        f"{GOOD}method: relora\nmethod_options: {{intervall: 3}}",
        [],
        "unknown key 'method_options.intervall': did you mean 'interval'?",
    ),
    "no-such-options": (f"{GOOD}method: lora\nmethod_options: {{intervals: 3}}", [], "there are no keys here"),
    "another-methods-options": (
        f"{GOOD}method: lora\nmethod_options: {{interval: 3}}",
        [],
        "method_options.interval is an option of relora, not of the method lora: delete it",
    ),
    "task": (f"{GOOD}task: poetry", [], "task='poetry'"),
    "number": (f"{GOOD}training: {{weight_decay: heavy}}", [], "training.weight_decay='heavy': write a number"),
    "truth": (f"{GOOD}training: {{bf16: no}}", [], "training.bf16='no': write true or false"),
    "rank": (f"{GOOD}lora: {{r: eight}}", [], "lora.r='eight': write a number"),
    "interval": (f"{GOOD}scalora: {{interval: 0}}", [], "interval must be an integer of at least 1, got 0"),
    "flag": (GOOD, ["--learnin_rate", "1e-3"], "unknown key 'learnin_rate': did you mean 'learning_rate'?"),
    "flag-of-a-section": (GOOD, ["--r", "4"], "unknown key 'r': did you mean 'lora.r'?"),
    "flag-in-a-section": (GOOD, ["--scalora.intervall=4"], "did you mean 'interval'?"),
    "flag-without-value": (GOOD, ["--learning_rate"], "--learning_rate needs a value"),
    "flag-without-value-before-another": (GOOD, ["--max_steps", "--lora.r", "4"], "--max_steps needs a value"),
    "flag-not-yaml": (GOOD, ["--lora.target_modules", "[q"], "--lora.target_modules [q: the value is not valid YAML"),
    "flag-of-no-section": (GOOD, ["--model.name", "x"], "--model.name: 'model' is not a section"),
    "option": (GOOD, ["--overwite"], "unknown option '--overwite': did you mean '--overwrite'?"),
    "option-before-a-flag": (GOOD, ["--resum", "--lora.r", "4"], "unknown option '--resum': did you mean '--resume'?"),
    "option-help": (GOOD, ["--hlep"], "unknown option '--hlep': did you mean '--help'?"),
    "word": (GOOD, ["overwrite"], "expected --key value, got 'overwrite'"),
}
STUDY_MISTAKES = {
    "study-key": (["--seedz=[1]"], "unknown key 'seedz': did you mean 'seeds'?"),
    "study-run": (["--run.training.max_stepz=4"], "run: unknown key 'training.max_stepz': did you mean 'max_steps'?"),
    "study-method": (["--methods.lorra={}"], "methods.lorra: method='lorra'"),
    "study-lora": (["--methods.lora.lora.rnk=4"], "methods.lora: unknown key 'lora.rnk'"),
    "study-option": (["--table-onyl"], "unknown option '--table-onyl': did you mean '--table-only'?"),
}
MISTAKES = {
    **{
        kind: (content, ["train", "file.yaml", *words], named) for kind, (content, words, named) in RUN_MISTAKES.items()
    },
    **{
        f"{kind}-to-evaluate": (content, ["evaluate", "model", "file.yaml", *words], named)
        for kind, (content, words, named) in RUN_MISTAKES.items()
        if kind in ("key", "training", "method", "flag", "option-help")
    },
    **{kind: (STUDY, ["compare", "file.yaml", *words], named) for kind, (words, named) in STUDY_MISTAKES.items()},
    "command": (None, ["trian"], "'trian'"),
    "option-of-all": (None, ["--helpp"], "--helpp"),
    "no-config": (None, ["train"], "'config'"),
    "option-of-config": (None, ["config", "--methd", "lora"], "--methd"),
    "task-of-config": (None, ["config", "--task", "poetry"], "'poetry'"),
    "method-of-config": (None, ["config", "--method", "lorra"], "did you mean 'lora'?"),
    "option-of-export": (None, ["export", "run", "--two", "merged"], "--two"),
    "option-of-bench": (None, ["bench", "--bach", "3"], "--bach"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Exit code, output, errors and loaded modules of every command above, and then of one that has to load torch."""
    commands = {}
    for name, (content, words, _) in {
        **{name: (None, words, shown) for name, (words, shown) in ANSWERS.items()},
        **MISTAKES,
        "train": ("model: base\ndata: {train: nowhere.jsonl}", ["train", "file.yaml"], ""),
    }.items():
        folder = tmp_path_factory.mktemp("start")
        if content is not None:
            (folder / "file.yaml").write_text(content)
        commands[name] = str(folder), words
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps(commands), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ANSWERS)
def test_help_and_config_load_no_library(name, answers):
    code, output, errors, loaded = answers[name]
    assert (code, errors) == (0, "")
    assert ANSWERS[name][1] in output
    assert not HEAVY & set(loaded)


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_named_in_one_line_before_any_library_is_loaded(kind, answers):
    code, output, errors, loaded = answers[kind]
    assert (code, output) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert MISTAKES[kind][2] in errors
    assert not HEAVY & set(loaded)


def test_what_is_loaded_is_seen(answers):
    assert {"scalora", "typer"} <= set(answers["help"][3])
    code, _, errors, loaded = answers["train"]
    assert code == 2
    assert "nowhere.jsonl" in errors
    assert {"torch", "transformers", "peft", "trl"} <= set(loaded)


@pytest.mark.parametrize("module", ["scalora", "scalora.config", "scalora.rivals", "scalora.runs.settings"])
def test_a_light_module_loads_no_library(module):
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "scalora" in loaded
    assert not HEAVY & loaded


def test_a_mistake_ends_the_command_itself(tmp_path):
    (tmp_path / "run.yaml").write_text(GOOD)
    words = [sys.executable, "-m", "scalora", "train", "run.yaml", "--learnin_rate", "1e-3"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: unknown key 'learnin_rate': did you mean 'learning_rate'?\n"
    assert [path.name for path in Path(tmp_path).iterdir()] == ["run.yaml"]
