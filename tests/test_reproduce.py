"""`scalora reproduce`: a recipe on stand-ins, the arithmetic of its table, and what is kept, named and refused."""

import json
import math
import os
import re
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import stand_ins
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

from scalora.cli import app
from scalora.runs.prepare import prepare
from scalora.runs.train import train
from scalora.studies.reproduction import RECIPES, load_recipe, reproduction_of
from scalora.studies.reproduction_table import read_reproduction, reproduction_markdown, write_table

GLUE = {
    "CoLA": "cola",
    "SST-2": "sst2",
    "MRPC": "mrpc",
    "STS-B": "stsb",
    "QQP": "qqp",
    "MNLI": "mnli",
    "QNLI": "qnli",
    "RTE": "rte",
}


def scalora(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def one_line(result):
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


# --- GLUE, with the recipe as it ships and nothing replaced but paths ---


@pytest.fixture(scope="module")
def glue_words(tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("glue")
    data, model = stand_ins.glue(root / "data"), stand_ins.deberta(root / "model", tokenizer)
    words = ["--run.model", str(model), "--run.training.use_cpu", "true", "--run.needs.packages", "[]"]
    words += ["--run.training.max_steps", "3", "--run.training.eval_steps", "3"]
    for task, config in GLUE.items():
        for split, name in (("train", "train"), ("eval", "validation_matched" if config == "mnli" else "validation")):
            words += [f"--tasks.{task}.run.data.{split}", f"{data}:{config}@{name}"]
    return [*words, "--output_dir", str(root / "out")]


@pytest.fixture(scope="module")
def glue(glue_words):
    """All tasks with one method, and one task with all: each trained in this process, as `scalora train` would."""
    made = load_recipe("glue", glue_words, smoke=True, only=GLUE)
    for task, study in made.studies.items():
        for cell in study.tuning_cells():
            if task == "RTE" or cell.method == "scalora-I":
                train(cell.settings)
    return made


def test_every_task_and_method_of_glue_goes_from_the_hubs_columns_to_a_score(glue):
    result = write_table(glue)
    assert result.finished == 8 + 11 - 1
    assert not result.failed
    table = result.table.set_index(["method", "column"])
    rte = {method: table["ours"][method, "RTE"] for method in glue.studies["RTE"].methods}
    assert len(rte) == 11
    assert all(0 <= score <= 100 for score in rte.values())
    every = [table["ours"]["scalora-I", task] for task in GLUE]
    assert table["ours"]["scalora-I", "average"] == pytest.approx(statistics.mean(every))
    assert math.isnan(table["ours"]["lora", "average"])  # of one task alone there is no average
    assert table["paper"]["scalora", "CoLA"] == 69.86
    written = (glue.folder / "table.md").read_text()
    assert "| scalora | 88.98 |" in written
    assert reproduction_markdown(read_reproduction(glue)) == written


def test_each_task_of_glue_is_scored_as_glue_does(glue):
    scores = {task: study.metric for task, study in glue.studies.items()}
    others = dict.fromkeys(GLUE, "eval_accuracy")
    assert scores == others | {"CoLA": "eval_matthews", "STS-B": "eval_correlation"}
    ours = read_reproduction(glue).table.set_index(["method", "column"])["ours"]
    for task, name in (("CoLA", "eval_matthews"), ("MNLI", "eval_accuracy"), ("STS-B", "eval_correlation")):
        summary = json.loads((glue.studies[task].tuning_cells()[-2].folder / "summary.json").read_text())
        assert ours["scalora-I", task] == pytest.approx(100 * summary[name])


def test_a_pair_of_sentences_is_one_input(glue):
    settings = glue.studies["RTE"].tuning_cells()[1].settings
    settings = settings.model_copy(update={"output_dir": settings.output_dir + "-again"})
    run = prepare(settings)
    rows = run.examples["train"].rows
    first = run.make_trainer.keywords["train_dataset"][0]
    expected = AutoTokenizer.from_pretrained(settings.model)(rows[0]["sentence1"], rows[0]["sentence2"])
    assert first["input_ids"] == expected["input_ids"]
    assert run.text_limit.tokens == 64  # the stand-in's positions; the recipe asks for 320
    assert settings.data.max_tokens == 320


def test_the_smoke_run_has_one_seed_and_one_rate_and_is_elsewhere(glue_words):
    smoke, whole = (load_recipe("glue", glue_words[:-2], smoke=smoke) for smoke in (True, False))
    assert load_recipe("glue", smoke=True).studies["RTE"].run["training"]["max_steps"] == 12
    assert list(smoke.studies) == ["RTE"]
    cells = smoke.studies["RTE"].tuning_cells()
    assert len(cells) == len(smoke.studies["RTE"].methods) == 11
    assert {cell.settings.training["max_steps"] for cell in cells} == {3}  # the recipe's 12, but for the command line
    assert {cell.settings.data.first for cell in cells} == {64}
    assert smoke.folder == Path(f"{whole.folder}-smoke")
    assert [len(study.tuning_cells()) for study in whole.studies.values()] == [33] * 8


def test_only_takes_tasks_and_methods():
    some = load_recipe("glue", only=["RTE", "STS-B", "scalora", "lora"])
    assert list(some.studies) == ["STS-B", "RTE"]
    assert some.studies["RTE"].baseline == "lora"
    assert load_recipe("glue", only=["scalora"]).studies["RTE"].baseline == "scalora"
    assert list(some.studies["RTE"].methods) == ["lora", "scalora"]
    # Where a task has rates of its own, too.
    some = load_recipe("commonsense", only=["LLaMA3-8B", "lora", "matrix"])
    assert {method: some.studies["LLaMA3-8B"].rates(method) for method in some.studies["LLaMA3-8B"].methods} == {
        "lora": [5e-5, 1e-4, 2e-4],
        "matrix": [5e-6, 1e-5, 2e-5],
    }
    assert "there is no such task or method" in one_line(scalora("reproduce", "glue", "--only", "RTE,dora"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_task_and_method_can_be_named_in_a_list(name):
    made = load_recipe(name)
    methods = {method for study in made.studies.values() for method in study.methods}
    assert not [one for one in (*made.studies, *methods) if "," in one]
    # A smoke run is of one task, and what the recipe makes small is there.
    assert len(load_recipe(name, smoke=True).studies) == 1


@pytest.mark.slow
def test_the_command_itself_on_stand_ins(glue_words):
    out = Path(glue_words[-1]).with_name("by-command")
    words = [*glue_words[:-1], out]
    result = scalora("reproduce", "glue", "--smoke", "--only", "CoLA,lora,scalora", *words)
    assert result.exit_code == 0, result.stderr
    assert "2 of 2 runs finished" in result.stdout
    assert result.stdout.rstrip() == (out / "table.md").read_text().rstrip()


# --- The machinery, with a trainer that takes no time ---

# Stands in for `python -m scalora`. The scores follow from the config: rank 13 fails unless it is mended, 14 is slow.
TRAINER = """#!{python}
import json, pathlib, sys, time, yaml
command, here = sys.argv[3], pathlib.Path({here!r})
with (here / "calls").open("a") as calls:
    calls.write(" ".join(sys.argv[3:]) + "\\n")
if command == "evaluate":
    folder, config, _, output = sys.argv[4:]
    assert (pathlib.Path(folder) / "model").is_dir()
    settings = yaml.safe_load(open(config))
    if settings["data"]["eval"].endswith("hard.jsonl") and not (here / "mended").exists():
        sys.exit("error: no such column")
    seed = settings["training"]["seed"]
    score = settings["evaluate"]["limit"] / 100 + seed / 10
    pathlib.Path(output).mkdir()
    (pathlib.Path(output) / "results.json").write_text(json.dumps({{"exact_match": score, "loss": 9.0}}))
    sys.exit()
config = yaml.safe_load(open(sys.argv[4]))
folder = pathlib.Path(config["output_dir"])
folder.mkdir(parents=True)
(folder / "config.yaml").write_text(yaml.safe_dump(config))
training, rank = config["training"], config["lora"].get("r")
if rank == 13 and not (here / "mended").exists():
    sys.exit("error: no such layer")
if rank == 14 and not (here / "mended").exists():
    time.sleep(600)
if config["save_model"]:
    (folder / "model").mkdir()
score = 0.5 + 0.01 * training["seed"] ** 2 + 10 * training["learning_rate"] * (rank != 2)
score -= 0.1 * ("pair" in config["data"]["train"])
summary = {{"steps": 1, "eval_loss": 1 - score, "eval_accuracy": score}}
(folder / "summary").write_text(json.dumps(summary))
(folder / "summary").rename(folder / "summary.json")
"""


@pytest.fixture
def small(tmp_path, monkeypatch, write_jsonl):
    """A recipe of two tasks with two methods, and a trainer of `TRAINER`."""
    path = tmp_path / "trainer"
    path.write_text(TRAINER.format(python=sys.executable, here=str(tmp_path)))
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.chdir(tmp_path)
    one = str(write_jsonl("one.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]))
    pair = str(write_jsonl("pair.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]))

    def write(**changes):
        recipe = {
            "title": "Two tasks",
            "source": "nowhere",
            "hardware": "none",
            "hours": "none",
            "output_dir": "out",
            "metric": "eval_accuracy",
            "chosen_by": "metric",
            "ceiling": None,
            "tuning_seeds": [0],
            "seeds": [1, 2, 3],
            "learning_rates": [1e-3, 2e-3],
            "run": {"model": "some/model", "task": "classification", "training": {"use_cpu": True}},
            "methods": {"lora": {}, "scalora-I": {"method": "scalora", "lora": {"r": 2}}},
            "tasks": {
                "One-1": {"run": {"data": {"train": one, "eval": one}}},
                "Pair": {"run": {"data": {"train": pair, "eval": pair}}},
            },
            "paper": {"Two tasks": {"lora": {"One-1": 50.0, "average": 40.0}}},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | changes, sort_keys=False))
        return tmp_path / "recipe.yaml"

    return write


def test_means_errors_differences_and_averages(small):
    result = scalora("reproduce", small())
    assert result.exit_code == 0, result.stderr
    table = pd.read_parquet("out/table.parquet").set_index(["method", "column"])
    # lora's larger rate has the larger score: 0.5 + 10 * 2e-3 on both tasks, less 0.1 on the second; plus seed² / 100.
    one = [53.0, 56.0, 61.0]
    mean, error = statistics.mean(one), statistics.stdev(one) / math.sqrt(3)
    assert table["ours"]["lora", "One-1"] == pytest.approx(mean)
    assert table["error"]["lora", "One-1"] == pytest.approx(error)
    assert table["difference"]["lora", "One-1"] == pytest.approx(mean - 50)
    averages = [score - 5 for score in one]
    assert table["ours"]["lora", "average"] == pytest.approx(statistics.mean(averages))
    assert table["error"]["lora", "average"] == pytest.approx(statistics.stdev(averages) / math.sqrt(3))
    assert table["difference"]["lora", "average"] == pytest.approx(mean - 5 - 40)
    assert table["ours"]["scalora-I", "One-1"] == pytest.approx(mean - 2)  # its rate makes no difference
    assert math.isnan(table["difference"]["scalora-I", "average"])
    shown = f"| lora | 40.00 | {mean - 5:.2f} ± {error:.2f} | +{mean - 45:.2f} ± {error:.2f} | 3 of 3 |"
    assert shown in result.stdout
    assert shown in Path("out/table.md").read_text()


def test_what_is_finished_is_kept_after_a_kill(small, tmp_path):
    recipe = small(methods={"lora": {}, "slow": {"method": "lora", "lora": {"r": 14}}})

    def kill_when_one_is_done():
        while not list(tmp_path.glob("out/one-1/cells/lora/*/summary.json")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=kill_when_one_is_done)
    thread.start()
    result = scalora("reproduce", recipe)
    thread.join()
    assert result.exit_code != 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/cells/*/*/summary.json")}
    assert before
    assert not list(tmp_path.glob("out/one-1/cells/slow/*/summary.json"))
    (tmp_path / "mended").touch()
    again = scalora("reproduce", recipe)
    assert again.exit_code == 0, again.stderr
    assert "20 of 20 runs finished" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_cell_that_fails_is_named_and_the_others_go_on(small, tmp_path):
    recipe = small(methods={"lora": {}, "bad": {"method": "lora", "lora": {"r": 13}}})
    result = scalora("reproduce", recipe)
    assert result.exit_code == 1
    assert "failed: bad lr0.001-seed0: error: no such layer" in result.stderr
    assert "4 runs failed" in one_line(result)
    assert "| lora | 40.00 | 51.67 ± 2.33 |" in result.stdout
    assert "- pair/cells/bad/lr0.001-seed0: error: no such layer" in Path("out/table.md").read_text()
    (tmp_path / "mended").touch()
    assert scalora("reproduce", recipe).exit_code == 0


def test_a_task_without_data_does_not_keep_the_others_from_being_run(small):
    result = scalora("reproduce", small(), "--tasks.Pair.run.data.eval", "absent.jsonl")
    assert result.exit_code == 1
    assert "Pair is left out: data file 'absent.jsonl' does not exist" in result.stderr
    assert result.stderr.index("Pair is left out") < result.stderr.index("finished after")
    table = pd.read_parquet("out/table.parquet").set_index(["method", "column"])
    assert table["seeds"]["lora", "One-1"] == 3
    assert table["seeds"]["lora", "average"] == 0


def test_tests_score_each_trained_model_and_weights_go_when_all_are_done(small, tmp_path, write_jsonl):
    answers = [{"prompt": "a", "completion": " b"}] * 2
    easy, hard = (str(write_jsonl(f"{name}.jsonl", answers)) for name in ("easy", "hard"))
    run = {"model": "some/model", "training": {"use_cpu": True}, "data": {"train": easy, "eval": easy}}
    run["evaluate"] = {"metrics": ["exact_match", "loss"]}  # the first counts
    tests = {"E": {"evaluate": {"limit": 20}}, "H-1": {"data": {"eval": hard}, "evaluate": {"limit": 40}}}
    recipe = small(
        run=run,
        tasks={"Model": {"tests": tests}},
        metric="eval_tests",
        chosen_by="eval_loss",
        paper={"Model": {"lora": {"average": 30.0}}},
    )
    result = scalora("reproduce", recipe)
    assert result.exit_code == 1
    assert "failed: lora lr0.002-seed1: error: no such column" in result.stderr
    assert len(list(tmp_path.glob("out/model/cells/*/*/model"))) == 6  # trained, and not yet all scored
    trained = (tmp_path / "calls").read_text().count("train ")
    (tmp_path / "mended").touch()
    again = scalora("reproduce", recipe)
    assert again.exit_code == 0, again.stderr
    calls = (tmp_path / "calls").read_text()
    assert calls.count("train ") == trained == 10
    assert calls.count("/tests/e\n") == 6
    assert not list(tmp_path.glob("out/model/cells/*/*/model"))
    table = pd.read_parquet("out/table.parquet").set_index(["method", "column"])
    assert table["ours"]["lora", "E"] == pytest.approx(20 + 20)
    assert table["ours"]["lora", "H-1"] == pytest.approx(40 + 20)
    assert table["difference"]["lora", "average"] == pytest.approx(50 - 30)
    assert table["error"]["lora", "average"] == pytest.approx(10 / math.sqrt(3))
    changed = scalora("reproduce", recipe, "--tasks.Model.tests.E.evaluate.limit", "30")
    assert "tests.E" in changed.stderr


def test_the_table_of_a_folder_that_was_moved(small, tmp_path):
    assert scalora("reproduce", small()).exit_code == 0
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    moved = reproduction_of(tmp_path / "elsewhere")
    assert read_reproduction(moved).finished == 20
    table = scalora("reproduce", small(output_dir="elsewhere"), "--table-only")
    assert "20 of 20 runs finished" in table.stdout


BAD = {
    "glew": "'glew' is neither one of glue, commonsense, math nor a .yaml file",
    "--methdos.lora={}": "unknown key 'methdos'",
    "--tasks.Cola.run.model=x": "tasks has no 'Cola'; it has One-1, Pair",
    "--tasks.Pair.run.modell=x": "tasks.Pair: run: unknown key 'modell'",
    "--paper={Two tasks: {lora: {Pear: 1}}}": "unknown key 'paper.Two tasks.lora.Pear': did you mean 'Pair'",
    "--paper={Two tasks: {lorra: {Pair: 1}}}": "did you mean 'lora'",
    "--paper={Tow tasks: {lora: {Pair: 1}}}": "did you mean 'Two tasks'",
}


@pytest.mark.parametrize(("word", "message"), BAD.items(), ids=BAD)
def test_what_is_wrong_is_said_in_one_line(word, message, small):
    words = [small(), word] if word.startswith("--") else [word]
    result = scalora("reproduce", *words)
    assert result.exit_code == 2
    assert message in one_line(result)


def test_the_report_has_the_papers_column(small):
    assert scalora("reproduce", small()).exit_code == 0
    assert scalora("report", "out").exit_code == 0
    page = Path("out/report.html").read_text()
    assert "Report of a table" in page
    for column, value in (("paper", "40.00"), ("ours", "51.67 ± 2.33"), ("difference", "+11.67 ± 2.33")):
        assert re.search(rf'data-label="{column}"[^>]*>\s*{re.escape(value)}</td>', page)
    assert "paper: 40.00 %" in page  # a fact at the top
    # A task's own folder is a study's.
    assert scalora("report", "out/one-1").exit_code == 0


def test_there_is_no_table_before_a_run(small):
    assert "nothing was run in 'out' yet" in one_line(scalora("reproduce", small(), "--table-only"))


def test_a_folder_with_something_else_is_refused(small, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").touch()
    assert "not the folder of a table" in one_line(scalora("reproduce", small()))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_written_to_be_changed(name, tmp_path):
    copy = tmp_path / "mine.yaml"
    assert scalora("reproduce", name, "--write", copy).exit_code == 0
    assert load_recipe(str(copy)).content == load_recipe(name).content
    assert "exists already" in one_line(scalora("reproduce", name, "--write", copy))
