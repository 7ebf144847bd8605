"""`scalora compare`: what a study file may say, what is run and what is kept, and one line for whatever goes wrong."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import WORDS
from typer.testing import CliRunner

from scalora.cli import app
from scalora.saving.checkpoints import last_checkpoint
from scalora.studies.study import load_study_file

# Stands in for `python -m scalora train CONFIG`, in no time: the figures follow from the config alone. What a method's
# lora.r asks for it does: 12 stops because it diverges, 13 fails, 14 never ends, 15 has a loss of NaN, 16 is killed, 17
# learns faster.
TRAINER = """#!{python}
import json, os, pathlib, signal, sys, time, yaml
resumes = sys.argv[-1] == "--resume"
config = yaml.safe_load(open(sys.argv[-2 if resumes else -1]))
folder = pathlib.Path(config["output_dir"])
assert folder.exists() == resumes, "must be run from the start"
folder.mkdir(parents=True, exist_ok=resumes)
(folder / "config.yaml").write_text(yaml.safe_dump(config))
training, rank = config["training"], config["lora"].get("r")
(folder / "started.json").write_text(json.dumps({{
    "arguments": sys.argv[1:-1], "threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid(),
    "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "began": time.monotonic()}}))
print("resumed" if resumes else "training", flush=True)
if rank == 12:
    (folder / "metrics.jsonl").write_text(json.dumps({{"step": 1, "loss": None}}))
    (folder / "diverged.json").write_text(json.dumps({{"step": 1, "error": "training diverged"}}))
    sys.exit("error: training diverged")
if rank == 13:
    sys.exit("error: no such layer")
if rank == 14:
    time.sleep(600)
if rank == 16:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.2)
(folder / "ended.json").write_text(json.dumps(time.monotonic()))
loss = float("nan") if rank == 15 else abs(training["learning_rate"] - 2e-3) * 100 + training["seed"] / 100
loss += (4 - training["max_steps"]) / 10 - 0.25 * (rank == 17)
lines = [{{"step": 1, "seconds": 1.0, "loss": loss}}, {{"step": 2, "seconds": 2.0, "eval_loss": loss}}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
summary = {{"steps": training["max_steps"], "eval_loss": loss, "eval_accuracy": 0.9 - loss - 0.1 * (rank == 17)}}
(folder / "summary.json").write_text(json.dumps(summary))
"""


def scalora(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def errors(result):
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    path = tmp_path / "trainer"
    path.write_text(TRAINER.format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


@pytest.fixture
def write_study(tmp_path, write_jsonl, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f" {WORDS[i % 10]} {WORDS[i % 3]}", "label": WORDS[i % 3]} for i in range(12)]
    data = str(write_jsonl("data.jsonl", rows))
    run = {"model": "some/model", "task": "classification", "data": {"train": data, "eval": data}}
    run["training"] = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1}

    def write(**settings):
        study = {"output_dir": "study", "seeds": [1, 2], "learning_rates": [1e-3, 2e-3], "run": run}
        study |= {"ceiling": None, "methods": {"lora": {}, "scalora": {"scalora": {"interval": 2}}}} | settings
        Path("study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
        return Path("study.yaml")

    return write


def cell(method, rate, seed, share=None):
    return Path("study", "cells", method, f"lr{rate}-seed{seed}" + ("" if share is None else f"-share{share}"))


def finished():
    return {path.parent for path in Path("study", "cells").glob("*/*/summary.json")}


def test_a_row_that_never_rescales_is_named_before_it_runs(write_study):
    with pytest.warns(UserWarning, match=r"methods.scalora: its runs of 4 steps never rescale.* at step 12"):
        load_study_file(write_study())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_study_file(write_study(methods={"lora": {}, "scalora": {"scalora": {"warmup_steps": 1}}}))


def test_a_cell_is_the_run_with_the_methods_overrides_and_the_seed_for_weights_and_data(write_study):
    methods = {"lora": None, "LoRA r=32": {"method": "lora", "lora": {"r": 32}, "learning_rates": [1e-4, 5e-5]}}
    study = load_study_file(write_study(methods=methods), ["--run.lora.lora_alpha", "16", "--seeds=[7]"])
    cells = study.tuning_cells()
    assert [(c.method, c.learning_rate, c.seed) for c in cells] == [
        ("lora", 1e-3, 7),
        ("LoRA r=32", 5e-5, 7),
        ("lora", 2e-3, 7),
        ("LoRA r=32", 1e-4, 7),
    ]
    settings = cells[1].settings
    assert settings.output_dir == "study/cells/lora-r-32/lr5e-05-seed7"
    assert settings.method == "lora"
    assert settings.lora == {"r": 32, "lora_alpha": 16}
    assert not settings.save_model
    expected = {"learning_rate": 5e-5, "seed": 7, "data_seed": 7}
    assert settings.training.items() >= {**expected, "max_steps": 4}.items()
    assert cells[0].settings.lora == {"lora_alpha": 16}
    assert study.reported_cells({"lora": 2e-3}) == [cells[2]]


def test_the_command_line_reaches_methods_whose_names_have_hyphens(write_study):
    methods = {"lora": None, "scalora-I": {"method": "scalora", "scalora": {"interval": 10}}}
    words = ["--methods.scalora-I.scalora.interval", "5", "--run.lora.lora-alpha=16"]
    study = load_study_file(write_study(methods=methods), words)
    settings = {cell.method: cell.settings for cell in study.tuning_cells()}
    assert settings.keys() == {"lora", "scalora-I"}
    assert settings["scalora-I"].scalora["interval"] == 5
    assert settings["lora"].lora == {"lora_alpha": 16}


def test_the_study_may_keep_the_models(write_study):
    study = load_study_file(write_study(), ["--run.save_model", "true"])
    assert all(c.settings.save_model for c in study.tuning_cells())


BAD_STUDIES = {
    "--seedz=[1]": "unknown key 'seedz': did you mean 'seeds'?",
    "--baseline=dora": "baseline='dora' is none of the methods lora, scalora",
    "--methods.lorra={}": "methods.lorra: method='lorra'",
    "--methods.lora.lora.rnk=4": "methods.lora: unknown key 'lora.rnk'",
    "--run.training.max_stepz=4": "run: unknown key 'training.max_stepz': did you mean 'max_steps'",
    "--run.modell=x": "run: unknown key 'modell'",
    "--run.method=lora": "run.method",
    "--run.output_dir=x": "run.output_dir: the study sets it",
    "--methods.lora.training.seed=3": "methods.lora.training.seed: the study sets it",
    "--run.training.learning_rate=3": "run.training.learning_rate: the study sets it",
    "--methods.lora.learning_rates=[1e-3]": "lora 1, scalora 2",
    "--methods.lora.learning_rates=1e-3": "methods.lora: there is no list of learning_rates",
    "--learning_rates=null": "methods.lora: there is no list of learning_rates",
    "--learning_rates=[1e-3, 0.001]": "learning rate 0.001 is listed twice",
    "--methods.lora.learning_rates=[fast, 1]": "'fast' is not a number above 0",
    "--methods.lora.learning_rates=[0, 1]": "0 is not a number above 0",
    "--methods.LORA={method: lora}": "methods 'lora' and 'LORA' would share the folder 'lora'",
    "--methods.++={method: lora}": "'++' has no letter or digit",
    "--seeds=[]": "seeds=[]",
    "--seeds=[1, 1]": "seeds: 1 is listed twice",
    "--tuning_seeds=[0, 0]": "tuning_seeds: 0 is listed twice",
    "--run.data.train=nowhere.csv": "data file 'nowhere.csv' does not exist",
    "--methods.scalora.data.eval=nowhere.csv": "data file 'nowhere.csv' does not exist",
    "--run.data.eval=null": "data.eval is missing",
    "--seeds.x=1": "'seeds' is not a section",
    "--step_shares=[0.5, 0.5]": "step_shares: 0.5 is listed twice",
    "--step_shares=[0.5, 1.0]": "1.0 must be above 0 and below 1",
    "--step_shares=[0]": "0.0 must be above 0 and below 1",
    "--step_shares=[]": "step_shares=[]",
    "--step_shares=[0.1]": "step_shares: 0.1 of 4 steps is 0, but each share must be another number",
    "--step_shares=[0.9]": "step_shares: 0.9 of 4 steps is 4,",
    "--step_shares=[0.5, 0.55]": "step_shares: 0.5 of 4 steps is 2,",
    "--threads=9999": "--threads 9999: must be from 1 to the",
    "--cores=0": "'--cores'",
    "--jobs=9999": "--jobs 9999: must be from 1 to the",
    "--gpus=0,,1": "--gpus '0,,1': write the numbers of GPUs with commas between them",
    "--gpus=": "--gpus '': write the numbers of GPUs",
}


@pytest.mark.parametrize("override", BAD_STUDIES)
def test_a_bad_study_is_one_line_and_leaves_nothing_behind(override, write_study, trainer):
    result = scalora("compare", write_study(), override)
    assert result.exit_code == 2
    assert len(errors(result)) == 1
    assert BAD_STUDIES[override] in errors(result)[0]
    assert not Path("study").exists()


def test_a_study_file_that_is_none_is_named(tmp_path):
    for content, named in {
        "methods: [": "not valid YAML",
        "- a": "must hold keys",
        "seeds: [1]": "'output_dir'",
    }.items():
        (tmp_path / "study.yaml").write_text(content)
        result = scalora("compare", tmp_path / "study.yaml")
        assert result.exit_code == 2
        assert named in errors(result)[0]
    assert "does not exist" in errors(scalora("compare", tmp_path / "nowhere.yaml"))[0]


def test_without_tuning_seeds_the_whole_grid_is_run_on_all_seeds(write_study, trainer):
    result = scalora("compare", write_study())
    assert result.exit_code == 0, result.output
    assert finished() == {cell(m, r, s) for m in ("lora", "scalora") for r in (1e-3, 2e-3) for s in (1, 2)}
    assert len([line for line in result.stderr.splitlines() if line.startswith("[")]) == 8
    table = pd.read_parquet("study/table.parquet")
    assert list(table["learning_rate"]) == [2e-3, 2e-3]
    assert "## Against lora" in result.stdout
    folder = cell("lora", 1e-3, 1)
    assert {path.name for path in folder.parent.iterdir()} == {
        cell("", r, s).name for r in (1e-3, 2e-3) for s in (1, 2)
    }
    assert (folder / "log.txt").read_text() == "training\n"
    started = json.loads((folder / "started.json").read_text())
    assert started["arguments"] == ["-m", "scalora", "train"]
    assert started["threads"] == "1"


@pytest.mark.slow
def test_tuning_seeds_choose_the_rate_that_is_then_run_and_share_cells_with_the_seeds(write_study, trainer):
    study = write_study()
    result = scalora("compare", study, "--tuning_seeds", "[0, 1]")
    assert result.exit_code == 0, result.output
    tuning = {cell(m, r, s) for m in ("lora", "scalora") for r in (1e-3, 2e-3) for s in (0, 1)}
    assert finished() == tuning | {cell(m, 2e-3, 2) for m in ("lora", "scalora")}
    counts = [line.split()[0] for line in result.stderr.splitlines() if line.startswith("[")]
    assert counts == [f"[{i}/10]" for i in range(1, 11)]
    assert scalora("compare", study, "--tuning_seeds", "[0, 1]", "--cores", 2, "--threads", 2).exit_code == 0
    assert json.loads(Path("study/environment.json").read_text())["threads"] == [1]  # nothing was run with two


@pytest.mark.slow
def test_as_many_runs_at_a_time_as_cores_hold(write_study, trainer, monkeypatch):
    study = write_study(learning_rates=[1e-3])
    for cores, threads, expected in ((3, 1, 3), (5, 2, 2), (1, 1, 1)):
        processes, at_once, seen = [], [], []

        class Watched(subprocess.Popen):
            def __init__(self, *arguments, processes=processes, at_once=at_once, seen=seen, **keywords):
                super().__init__(*arguments, **keywords)
                processes.append(self)
                at_once.append(sum(process.returncode is None for process in processes))
                seen.append(keywords["env"]["OMP_NUM_THREADS"])

        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", Watched)
            folder = f"study-{cores}"
            result = scalora("compare", study, "--output_dir", folder, "--cores", cores, "--threads", threads)
        assert result.exit_code == 0, result.output
        assert max(at_once) == expected
        assert seen == [str(threads)] * 4


def test_jobs_divide_the_cores(write_study, trainer):
    study = write_study(learning_rates=[1e-3])
    assert scalora("compare", study, "--cores", 5, "--jobs", 2).exit_code == 0
    assert {started["threads"] for started in started_cells()} == {"2"}
    contradiction = scalora("compare", study, "--jobs", 2, "--threads", 2)
    assert contradiction.exit_code == 2
    assert "--jobs 2 with --threads 2: each says how the cores are divided; give one" in errors(contradiction)[0]


GPUS = {
    "named": (["--gpus", "0,3"], None, [["0"], ["3"]]),
    "several runs on one": (["--gpus=5, 5"], None, [["5"], ["5"]]),
    "those that are seen": ([], "1,GPU-3ab", [["1"], ["GPU-3ab"]]),
    "none are seen": ([], "", [[""]]),
    "runs that use the CPU": (["--run.training.use_cpu", "true"], "1,2", [["1,2"]]),
}


@pytest.mark.parametrize("name", GPUS)
def test_each_gpu_executes_one_run_at_a_time(name, write_study, trainer, monkeypatch):
    words, visible, expected = GPUS[name]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    result = scalora("compare", write_study(), "--cores", 1, *words)
    assert result.exit_code == 0, result.output
    cells = started_cells()
    assert len(cells) == 8
    assert {started["gpu"] for started in cells} == {gpu for (gpu,) in expected}
    for gpu in {started["gpu"] for started in cells}:
        at_once = most_at_once([started for started in cells if started["gpu"] == gpu])
        assert at_once <= expected.count([gpu])
    assert most_at_once(cells) == len(expected)


def test_a_cell_that_fails_leaves_its_gpu_to_the_next(write_study, trainer):
    methods = {"lora": {}, "broken": {"method": "lora", "lora": {"r": 13}}}
    result = scalora("compare", write_study(methods=methods), "--gpus", "0,1")
    assert result.exit_code == 1
    assert finished() == {cell("lora", r, s) for r in (1e-3, 2e-3) for s in (1, 2)}
    assert result.output.count("broken") >= 4
    assert "no such layer" in result.output


def test_gpus_are_not_for_runs_on_the_cpu(write_study, trainer):
    result = scalora("compare", write_study(), "--gpus", "0", "--run.training.use_cpu", "true")
    assert result.exit_code == 2
    assert "--gpus 0 with run.training.use_cpu=true: leave one of them out" in errors(result)[0]


def started_cells():
    """What each run of the study noted when it began, and when it ended."""
    return [
        json.loads(path.read_text()) | {"ended": json.loads((path.parent / "ended.json").read_text())}
        for path in Path("study", "cells").glob("*/*/started.json")
    ]


def most_at_once(cells):
    return max(sum(other["began"] <= one["began"] < other["ended"] for other in cells) for one in cells)


@pytest.mark.slow
def test_a_finished_study_is_not_run_again_and_a_longer_one_only_where_it_is_longer(write_study, trainer):
    study = write_study(learning_rates=[1e-3])
    assert scalora("compare", study).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in Path("study").glob("cells/*/*/summary.json")}
    result = scalora("compare", study, "--seeds", "[1, 2, 3]", "--methods.no_transport", "{}")
    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(finished()) == 3 * 3
    assert result.stderr.count("kept") == 4


def test_a_finished_cell_of_another_config_is_an_error_and_nothing_is_run(write_study, trainer):
    study = write_study(learning_rates=[1e-3], seeds=[1])
    assert scalora("compare", study).exit_code == 0
    content = {path: path.read_bytes() for path in Path("study").rglob("*") if path.is_file()}
    result = scalora("compare", study, "--methods.scalora.scalora.interval", 3, "--seeds", "[1, 5]")
    assert result.exit_code == 2
    (error,) = errors(result)
    assert "study/cells/scalora/lr0.001-seed1" in error
    assert "scalora.interval=2" in error
    assert "now has 3" in error
    assert "choose another output_dir" in error
    assert {path: path.read_bytes() for path in Path("study").rglob("*") if path.is_file()} == content


@pytest.mark.slow
def test_a_failed_run_does_not_stop_the_others_and_is_tried_again(write_study, trainer):
    methods = {"bad": {"method": "lora", "lora": {"r": 13}}, "lora": {}}
    study = write_study(methods=methods, learning_rates=[1e-3])
    for _ in range(2):
        result = scalora("compare", study)
        assert result.exit_code == 1
        assert errors(result) == ["error: 2 of 4 runs failed; the same command tries them again"]
        assert "failed: bad lr0.001-seed1: error: no such layer" in result.stderr
        assert len(finished()) == 2
        assert "| bad | — | 0 (2 not finished) |" in result.stdout
        assert "- cells/bad/lr0.001-seed1: error: no such layer" in Path("study/table.md").read_text()
    assert scalora("compare", study, "--methods.bad.lora.r", 8).exit_code == 0
    assert len(finished()) == 4


def test_a_run_that_was_killed_says_so(write_study, trainer):
    study = write_study(methods={"lora": {"lora": {"r": 16}}}, learning_rates=[1e-3], seeds=[1])
    result = scalora("compare", study)
    assert result.exit_code == 1
    assert "ended by SIGKILL (out of memory?)" in result.stderr


def test_a_run_that_diverged_is_finished(write_study, trainer):
    result = scalora("compare", write_study(methods={"lora": {}, "wild": {"method": "lora", "lora": {"r": 15}}}))
    assert result.exit_code == 0, result.output
    assert "| wild | 0.001* | 2 | inf" in result.stdout


def test_a_run_that_stopped_because_it_diverged_is_finished_and_the_worst(write_study, trainer):
    methods = {"lora": {}, "wild": {"method": "lora", "lora": {"r": 12}}}
    study = write_study(methods=methods, learning_rates=[1e-3], metric="eval_accuracy")
    for how in ("diverged after", "kept"):
        result = scalora("compare", study)
        assert result.exit_code == 0, result.output
        assert len([line for line in result.stderr.splitlines() if "wild" in line and how in line]) == 2
        assert "| wild | 0.001* | 2 | -inf | — | inf" in result.stdout
    assert "4 of 4 runs finished" in Path("study/table.md").read_text()


def test_what_an_earlier_try_left_is_kept(write_study, trainer):
    study = write_study(methods={"lora": {"lora": {"r": 13}}}, learning_rates=[1e-3], seeds=[1])
    assert scalora("compare", study).exit_code == 1
    folder = cell("lora", 1e-3, 1)
    (folder / "notes.txt").write_text("mine")
    result = scalora("compare", study, "--methods.lora.lora.r", 8)
    assert result.exit_code == 0, result.output
    aside = folder.with_name(f"{folder.name}.earlier-1")
    assert f"what an earlier try left is now in '{aside}'" in result.stderr
    assert (aside / "notes.txt").read_text() == "mine"
    assert "no such layer" in (aside / "log.txt").read_text()


def test_a_checkpoint_with_other_settings_is_not_gone_on_from(write_study, trainer, monkeypatch):
    study = write_study(methods={"lora": {"lora": {"r": 13}}}, learning_rates=[1e-3], seeds=[1])
    assert scalora("compare", study).exit_code == 1
    monkeypatch.setattr("scalora.studies.compare.last_checkpoint", lambda folder: folder / "checkpoint-1")
    again = scalora("compare", study)
    assert "goes on from its last checkpoint" in again.stderr
    assert "resumed" in (cell("lora", 1e-3, 1) / "log.txt").read_text()
    changed = scalora("compare", study, "--methods.lora.lora.r", 8)
    assert changed.exit_code == 0, changed.output
    assert "goes on" not in changed.stderr
    assert "what an earlier try left" in changed.stderr


def test_a_study_file_of_the_user_s_is_not_replaced(write_study, trainer):
    study = write_study(learning_rates=[1e-3], seeds=[1])
    before = study.read_text()
    result = scalora("compare", study, "--output_dir", ".")
    assert result.exit_code == 2
    assert "is not empty and not the folder of a study" in errors(result)[0]
    assert study.read_text() == before
    Path("own").mkdir()
    study.rename("own/study.yaml")
    assert scalora("compare", "own/study.yaml", "--output_dir", "own").exit_code == 2
    assert [path.name for path in Path("own").iterdir()] == ["study.yaml"]


def test_a_metric_that_the_evaluations_do_not_give_stops_at_the_first_run(write_study, trainer):
    result = scalora("compare", write_study(), "--metric", "eval_acuracy", "--cores", 1)
    assert result.exit_code == 2
    assert errors(result) == [
        "error: metric 'eval_acuracy' is not among the scores of the evaluations, which are eval_loss, eval_accuracy"
    ]
    assert len(finished()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_the_running_and_keeps_the_finished(which, write_study, trainer):
    study = write_study(methods={"lora": {}, "slow": {"method": "lora", "lora": {"r": 14}}})
    slow = cell("slow", 1e-3, 1) / "started.json"

    def stop():
        while not (slow.exists() and finished()):
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), which)

    stopper = threading.Thread(target=stop)
    stopper.start()
    result = scalora("compare", study, "--cores", 2)
    stopper.join()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert result.exit_code == 1
    (error,) = errors(result)
    assert error.startswith("error: stopped; what is finished is kept (")
    with pytest.raises(ProcessLookupError):
        os.kill(json.loads(slow.read_text())["pid"], 0)
    kept = finished()
    assert kept
    result = scalora("compare", study, "--cores", 2, "--methods.slow.lora.r", 8)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("kept") == len(kept)
    assert len(finished()) == 8


def test_a_stop_while_a_run_is_being_started_leaves_it_not_behind(write_study, trainer, monkeypatch):
    processes = []

    class Stopped(subprocess.Popen):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            processes.append(self)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Stopped)
    result = scalora("compare", write_study(), "--run.lora.r", 14, "--cores", 1)
    assert result.exit_code == 1
    assert errors(result)[0].startswith("error: stopped")
    assert [process.returncode for process in processes] == [-signal.SIGTERM]


def test_two_at_once_in_one_folder_are_refused(write_study, trainer):
    study = write_study(learning_rates=[1e-3], seeds=[1])
    assert scalora("compare", study).exit_code == 0
    with Path("study/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = scalora("compare", study, "--seeds", "[1, 2]")
    assert result.exit_code == 2
    assert "is being run by another" in errors(result)[0]
    assert len(finished()) == 2


def test_a_folder_with_something_else_in_it_is_refused(write_study, trainer):
    Path("study").mkdir()
    Path("study/thesis.tex").write_text("years of work")
    result = scalora("compare", write_study())
    assert result.exit_code == 2
    assert "is not empty and not the folder of a study" in errors(result)[0]
    assert [path.name for path in Path("study").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--run.training.max_steps=-1",), "step_shares: they are shares of run.training.max_steps, which is missing"),
        (("--run.training={num_train_epochs: 2}",), "shares of run.training.max_steps, which is missing"),
        (
            ("--methods.scalora.training.max_steps=8",),
            "methods.scalora.training.max_steps=8: step_shares need the same for all methods, and lora has 4",
        ),
    ],
)
def test_shares_need_a_number_of_steps_that_is_the_same_for_all(changes, message, write_study, trainer):
    result = scalora("compare", write_study(step_shares=[0.5]), *changes)
    assert result.exit_code == 2
    assert len(errors(result)) == 1
    assert message in errors(result)[0]
    assert not Path("study").exists()


FASTER = {"lora": {}, "fast": {"method": "lora", "lora": {"r": 17}}, "full": {}}
SHARES = [0.75, 0.5]


@pytest.mark.slow
def test_shares_of_the_steps_are_run_at_the_best_rate_by_all_but_the_baseline(write_study, trainer):
    study = write_study(methods=FASTER, step_shares=SHARES, tuning_seeds=[0], seeds=[1])
    result = scalora("compare", study, "--run.training.warmup_steps", 2)
    assert result.exit_code == 0, result.output
    full = {cell(m, r, 0) for m in FASTER for r in (1e-3, 2e-3)} | {cell(m, 2e-3, 1) for m in FASTER}
    shares = {cell(m, 2e-3, 1, share) for m in ("fast", "full") for share in SHARES}
    assert finished() == full | shares
    counts = [line.split()[0] for line in result.stderr.splitlines() if line.startswith("[")]
    assert counts == [f"[{i}/13]" for i in range(1, 14)]
    whole, half = (yaml.safe_load((cell("fast", 2e-3, 1, s) / "config.yaml").read_text()) for s in (None, 0.5))
    assert (half["training"]["max_steps"], half["training"]["warmup_steps"]) == (2, 1)
    half["training"] |= {"max_steps": 4, "warmup_steps": 2}
    assert half | {"output_dir": whole["output_dir"]} == whole


@pytest.mark.slow
def test_the_table_says_at_which_share_of_the_steps_a_method_is_level(write_study, trainer):
    study = write_study(methods=FASTER, step_shares=SHARES, learning_rates=[2e-3], metric="eval_accuracy")
    result = scalora("compare", study)
    assert result.exit_code == 0, result.output
    # fast is ahead by 0.25 in loss, by 0.15 in accuracy, and loses 0.1 of either with each step that it does not take.
    section = result.stdout.split("## Fewer steps")[1].split("##")[0]
    assert "| lora | 100 % | 4 | 2 | 0.8850 ± 0.0050 | 0.0150 ± 0.0050 |" in section
    assert "| lora | 75 %" not in section
    assert "| fast | 50 % | 2 | 2 | 0.8350 ± 0.0050 | -0.0350 ± 0.0050 |" in section
    assert "| fast | level with lora at 75 % of its steps | level with lora at 50 % of its steps |" in section
    assert "| full | level with lora at 100 % of its steps | level with lora at 100 % of its steps |" in section
    assert scalora("compare", study, "--table-only").stdout == result.stdout
    other = result.stdout.replace("## Fewer steps" + section, "").split("## Scores")[1]
    before = scalora("compare", study, "--step_shares", "null")
    assert before.exit_code == 0, before.output
    assert "Fewer steps" not in before.stdout
    assert before.stdout.split("## Scores")[1] == other


@pytest.mark.slow
def test_shares_can_be_added_to_a_finished_study_and_one_that_is_missing_is_run_again(write_study, trainer):
    study = write_study(learning_rates=[1e-3])
    assert scalora("compare", study).exit_code == 0
    result = scalora("compare", study, "--step_shares", "[0.5]")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("kept") == 4
    assert finished() > {cell("scalora", 1e-3, seed, 0.5) for seed in (1, 2)}
    assert len(finished()) == 6
    (cell("scalora", 1e-3, 2, 0.5) / "summary.json").unlink()
    unfinished = scalora("compare", study, "--table-only").stdout
    assert "| scalora | 50 % | 2 | 1 (1 not finished) |" in unfinished
    assert "| scalora | level with lora at 100 % of its steps so far |" in unfinished
    assert "5 of 6 runs finished" in unfinished
    result = scalora("compare", study, "--step_shares", "[0.5]")
    assert result.stderr.count("kept") == 5
    assert len(finished()) == 6


def test_a_finished_cell_of_a_share_that_was_run_otherwise_is_an_error(write_study, trainer):
    study = write_study(learning_rates=[1e-3], seeds=[1], step_shares=[0.5])
    assert scalora("compare", study).exit_code == 0
    path = cell("scalora", 1e-3, 1, 0.5) / "config.yaml"
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(config | {"training": config["training"] | {"max_steps": 3}}))
    (error,) = errors(scalora("compare", study))
    assert "lr0.001-seed1-share0.5' was run with training.max_steps=3, but the study now has 2" in error


def test_the_ceiling_may_train_the_matrices_that_the_adapters_have(write_study):
    full = {"method_options": {"matrices": "adapted"}, "learning_rates": [1e-4, 2e-4]}
    path = write_study(methods={"lora": {}, "full": full}, ceiling="full")
    study = load_study_file(path, ["--run.lora.target_modules", "[q_proj]"])
    settings = study.cell("full", 1e-4, 1).settings
    assert settings.method == "full"
    assert settings.method_options == {"matrices": "adapted"}
    assert settings.lora == study.cell("lora", 1e-3, 1).settings.lora == {"target_modules": ["q_proj"]}


def test_the_table_is_made_anew_without_running_anything(write_study, trainer):
    study = write_study(learning_rates=[1e-3])
    assert scalora("compare", study).exit_code == 0
    wanted = Path("study/table.md").read_text()
    Path("study/table.md").unlink()
    (cell("lora", 1e-3, 1) / "summary.json").unlink()
    result = scalora("compare", study, "--table-only")
    assert result.exit_code == 0, result.output
    assert "3 of 4 runs finished" in Path("study/table.md").read_text()
    assert len(finished()) == 3
    assert "4 of 4 runs finished" in wanted


def test_the_table_made_anew_is_that_of_the_file_and_options_that_are_given(write_study, trainer):
    study = write_study(learning_rates=[1e-3], seeds=[1, 2])
    assert scalora("compare", study).exit_code == 0
    result = scalora("compare", study, "--table-only", "--baseline", "scalora", "--seeds", "[1]")
    assert result.exit_code == 0, result.output
    assert "## Against scalora" in result.stdout
    assert "2 of 2 runs finished" in result.stdout
    result = scalora("compare", study, "--table-only", "--run.training.max_steps", 3)
    assert result.exit_code == 2
    assert "was run with training.max_steps=4, but the study now has 3" in errors(result)[0]


def test_runs_on_examples_that_have_changed_are_not_compared(write_study, trainer):
    study = write_study(learning_rates=[1e-3], seeds=[1])
    assert scalora("compare", study).exit_code == 0
    record = {"versions": {}, "data": {"train": {"examples": 12, "sha256": "a"}}}
    for method in ("lora", "scalora"):
        (cell(method, 1e-3, 1) / "environment.json").write_text(json.dumps(record))
    result = scalora("compare", study)
    assert result.exit_code == 0, result.output
    record["data"]["train"]["sha256"] = "b"
    (cell("scalora", 1e-3, 1) / "environment.json").write_text(json.dumps(record))
    for flags in ([], ["--table-only"]):
        result = scalora("compare", study, *flags)
        assert result.exit_code == 2
        assert "data.train has changed between them" in errors(result)[0]


@pytest.mark.slow
def test_real_runs_killed_after_the_first_go_on_from_there(write_study, encoder_folder):
    study = write_study(learning_rates=[1e-3], seeds=[1])
    command = [sys.executable, "-m", "scalora", "compare", str(study), "--cores", "1", "--metric", "eval_accuracy"]
    command += ["--run.model", str(encoder_folder), "--run.training.max_steps", "60"]
    command += ["--run.training.save_strategy", "steps", "--run.training.save_steps", "5"]
    killed = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    first, second = (cell(method, 1e-3, 1) for method in ("lora", "scalora"))
    first /= "summary.json"
    while not (first.exists() and last_checkpoint(second / "trainer")):
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    written = first.stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[1/2] lora lr0.001-seed1: kept" in done.stderr
    assert first.stat().st_mtime_ns == written
    assert finished() == {cell("lora", 1e-3, 1), cell("scalora", 1e-3, 1)}
    assert "scalora lr0.001-seed1: goes on from its last checkpoint" in done.stderr
    losses = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in losses if "loss" in row] == list(range(1, 61))
    assert json.loads((second / "environment.json").read_text())["resumed"]
    table = pd.read_parquet("study/table.parquet").set_index("method")
    assert table.loc["scalora", "metric_mean"] <= 1
    assert table["eval_loss_mean"].gt(0).all()
    assert table["seeds"].tolist() == [1, 1]
    assert table["seconds_per_step"].gt(0).all()
    assert not (first.parent / "model").exists()
    assert "2 of 2 runs finished" in Path("study/table.md").read_text()
