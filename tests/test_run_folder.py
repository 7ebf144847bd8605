"""The run folder: nothing of the user's is deleted, one run at a time, and an earlier run is moved aside."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
import yaml
from conftest import pairs
from hypothesis import HealthCheck, given, settings, strategies
from kills import killed_everywhere
from test_broken_input import contents
from typer.testing import CliRunner

from scalora.cli import app
from scalora.runs import train as training
from scalora.runs.claim import claimed
from scalora.runs.errors import InputError
from scalora.runs.settings import Settings, load_settings
from scalora.saving import files

RUN = ("config.yaml", "environment.json", "metrics.jsonl", "summary.json", "trainer/checkpoint-2/optimizer.pt")


def begin(folder, *, overwrite=False):
    """As a run does that has passed all its checks."""
    wanted = Settings(model="x", output_dir=str(folder))
    with claimed(wanted, overwrite=overwrite, resume=False) as claim:
        claim.begin(wanted, {"command": "now"})


def fill(folder, names, text="earlier"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("model: x\n" if name == "config.yaml" else text)


def finished_run(folder, *more):
    begin(folder)
    fill(folder, [*RUN[2:], *more])
    return folder


NAMES = [*RUN, "model/model.safetensors", "thesis.tex", "notes/of mine.txt", ".git/HEAD", "trainer/main.py", ".hidden"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=strategies.sets(strategies.sampled_from(NAMES)),
    marker=strategies.sampled_from([None, "scalora: the folder of a run", "", "something else"]),
    overwrite=strategies.booleans(),
)
def test_no_file_is_ever_lost(names, marker, overwrite, tmp_path_factory):
    home = tmp_path_factory.mktemp("any")
    folder = home / "run"
    folder.mkdir()
    fill(folder, names)
    if marker is not None:
        (folder / ".scalora-run").write_text(marker)
    before = contents(folder)
    begun = False
    with contextlib.suppress(InputError):
        begin(folder, overwrite=overwrite)
        begun = True
    foreign = bool(names - set(NAMES[:6])) or not {"config.yaml", "environment.json"} <= names
    ours = marker in ("scalora: the folder of a run", "") or (marker is None and not foreign)
    may = not (names or marker == "something else") or (overwrite and ours and ".git/HEAD" not in names)
    assert begun == may
    if not begun:
        assert contents(home) == {"run": "folder", **{f"run/{name}": kind for name, kind in before.items()}}
    elif names:
        before.pop(".scalora-run", None)
        assert before.items() <= contents(home / "run.earlier-1").items()
        assert set(contents(folder)) == {".scalora-run", "config.yaml", "environment.json", "trainer"}
        assert yaml.safe_load((folder / "config.yaml").read_text())["output_dir"] == str(folder)


def test_earlier_runs_are_kept_each_under_a_name_of_its_own(tmp_path, capsys):
    finished_run(tmp_path / "run", "notes.txt")
    for number in (1, 2):
        begin(tmp_path / "run", overwrite=True)
        assert (
            f"the earlier run in '{tmp_path}/run' is now '{tmp_path}/run.earlier-{number}'" in capsys.readouterr().err
        )
    assert (tmp_path / "run.earlier-1" / "notes.txt").read_text() == "earlier"
    assert not (tmp_path / "run.earlier-2" / "notes.txt").exists()
    begin(tmp_path / "run.earlier-1", overwrite=True)
    assert (tmp_path / "run.earlier-1.earlier-1" / "notes.txt").exists()


def at_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))


def above_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "trainer"))


def at_work(folder, monkeypatch):
    monkeypatch.chdir(folder)


def below_work(folder, monkeypatch):
    monkeypatch.chdir(folder / "trainer")


def a_repository(folder, monkeypatch):
    (folder / ".git").write_text("gitdir: elsewhere")


STAYS = {
    "the home folder": at_home,
    "above the home folder": above_home,
    "the working directory": at_work,
    "above the working directory": below_work,
    "a repository": a_repository,
}


@pytest.mark.parametrize("kind", STAYS)
def test_some_folders_stay_where_they_are(kind, tmp_path, monkeypatch):
    folder = finished_run(tmp_path / "run")
    STAYS[kind](folder, monkeypatch)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="can't be moved aside"):
        begin(folder, overwrite=True)
    with pytest.raises(InputError, match="can't be moved aside"):
        begin(Path(os.path.relpath(folder)), overwrite=True)
    assert contents(tmp_path) == before


def test_a_link_is_followed_for_writing_and_never_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    finished_run(tmp_path / "run")
    assert (tmp_path / "disk" / "config.yaml").exists()
    before = contents(tmp_path)
    with pytest.raises(InputError, match="it is a link to"):
        begin(tmp_path / "run", overwrite=True)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"a link to .*which does not exist"):
        begin(tmp_path / "nowhere")
    assert contents(tmp_path) == before | {"nowhere": f"link to {tmp_path / 'gone'}"}
    begin(tmp_path / "disk", overwrite=True)  # by its own name
    assert (tmp_path / "disk.earlier-1" / "summary.json").exists()


@pytest.mark.parametrize("key", ["model", "data"])
def test_what_the_new_run_needs_is_not_moved_away_under_it(key, tmp_path):
    folder = finished_run(tmp_path / "run", "model/config.json", "data.jsonl")
    given = {"model": str(folder / "model")} if key == "model" else {"data": {"train": str(folder / "data.jsonl")}}
    wanted = Settings(**{"model": "x", "output_dir": str(folder)} | given)
    with (
        pytest.raises(InputError, match=rf"{key}.*is in output_dir, which --overwrite moves aside"),
        claimed(wanted, overwrite=True, resume=False),
    ):
        pass


def test_an_empty_name_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="output_dir is empty"):
        begin("")


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False])
def test_a_process_killed_at_any_moment_loses_neither_run(exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)

    def prepare(number):
        return finished_run(tmp_path / str(number) / "run", "notes.txt")

    def overwrite(folder):
        begin(folder, overwrite=True)

    for folder, finished in killed_everywhere(prepare, overwrite):
        runs = [path for path in folder.parent.iterdir() if (path / "notes.txt").exists()]
        assert [set(contents(path)) >= {"summary.json", "trainer/checkpoint-2/optimizer.pt"} for path in runs] == [True]
        if finished:
            assert runs == [folder.with_name("run.earlier-1")]
            assert "now" in (folder / "environment.json").read_text()
        elif folder.exists():  # the next try goes on from here
            begin(folder, overwrite=True)
            assert sum((path / "notes.txt").exists() for path in folder.parent.iterdir()) == 1
        else:
            assert not exchange


@pytest.mark.slow
def test_a_new_folder_of_a_killed_process_can_be_used(tmp_path):
    for folder, finished in killed_everywhere(lambda number: tmp_path / str(number) / "run", begin):
        if not finished:
            begin(folder, overwrite=True)
        assert "now" in (folder / "environment.json").read_text()


# --- through the command ------------------------------------------------------------------------------------------


def scalora(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def error_of(result):
    return next((line for line in result.stderr.splitlines() if line.startswith("error: ")), None)


@pytest.fixture
def config(causal_folder, write_jsonl, tmp_path):
    path = tmp_path / "config.yaml"
    content = {
        "model": str(causal_folder),
        "output_dir": str(tmp_path / "runs" / "run"),
        "data": {"train": str(write_jsonl("train.jsonl", pairs(16)))},
        "scalora": {"warmup_steps": 0},
        "track_updates": 0,
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1},
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_a_second_run_into_a_folder_is_refused_until_the_first_ends_however_it_ends(config, tmp_path):
    first = os.fork()
    if not first:
        with claimed(load_settings(config), overwrite=False, resume=False):
            (tmp_path / "taken").touch()
            time.sleep(600)
    while not (tmp_path / "taken").exists():
        time.sleep(0.01)
    for flags in ([], ["--overwrite"], ["--dry-run"]):
        refused = scalora("train", config, *flags)
        assert refused.exit_code == 2
        assert "is in use by another run" in error_of(refused)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    result = scalora("train", config)
    assert result.exit_code == 0, result.output


def fail_in_training(monkeypatch):
    make = training._adapt

    def adapt(run, base):
        trainer = make(run, base)

        def training_step(*arguments):
            raise RuntimeError("out of memory")

        trainer.training_step = training_step
        return trainer

    monkeypatch.setattr(training, "_adapt", adapt)


def fail_in_loading(monkeypatch):
    def load(*arguments):
        raise InputError("no such model")

    monkeypatch.setattr(training, "load_base", load)


@pytest.mark.slow
@pytest.mark.parametrize("failure", [fail_in_training, fail_in_loading])
def test_a_run_that_takes_no_step_leaves_everything_as_it_was(failure, config, tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "run"
    with monkeypatch.context() as patch:
        failure(patch)
        assert scalora("train", config).exit_code in (1, 2)
    assert not folder.parent.exists()
    assert scalora("train", config).exit_code == 0
    before = contents(folder.parent)
    with monkeypatch.context() as patch:
        failure(patch)
        assert scalora("train", config, "--overwrite").exit_code in (1, 2)
    assert contents(folder.parent) == before
    result = scalora("train", config, "--overwrite", "--max_steps", 3)
    assert result.exit_code == 0
    assert "is now" in result.stderr
    kept = contents(folder.with_name("run.earlier-1"))
    assert kept == {name.removeprefix("run/"): kind for name, kind in before.items() if name != "run"}


@pytest.mark.slow
def test_the_home_folder_is_meant_wherever_a_folder_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = scalora("train", config, "--output_dir=~/runs/run", "--save_strategy", "steps", "--save_steps", 1)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "runs" / "run" / "trainer" / "checkpoint-2").is_dir()
    assert not list((tmp_path / "here").iterdir())
    page = scalora("report", "~/runs/run", "--output=~/page")
    assert page.exit_code == 0, page.output
    assert (tmp_path / "page" / "report.html").is_file()


@pytest.mark.parametrize("key", ["output_dir", "resume_from_checkpoint"])
def test_what_the_run_sets_itself_is_refused_by_name(key, config, tmp_path):
    for flags in ([], ["--dry-run"]):
        result = scalora("train", config, f"--training.{key}", tmp_path, *flags)
        assert result.exit_code == 2
        assert error_of(result).startswith(f"error: training.{key}={str(tmp_path)!r}: leave it out, and ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["evaluate", "model", "CONFIG", "--output"], "config.yaml"),
        (["evaluate", "model", "CONFIG", "--output"], "train.jsonl"),
        (["inspect", "RUN", "--output"], "train.jsonl"),
        (["estimate", "MODEL", "--json"], "config.yaml"),
        (["report", "RUN", "--output"], "site"),
        (["bench", "--output"], "site"),
    ],
)
def test_an_output_replaces_only_what_the_command_has_written(words, name, config, causal_folder, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "report.html").write_text("<title>My own report</title>")
    (tmp_path / "site" / "bench.json").write_text("[1]")
    run = finished_run(tmp_path / "run")
    before = contents(tmp_path)
    places = {"CONFIG": config, "RUN": run, "MODEL": causal_folder}
    result = scalora(*(places.get(word, word) for word in words), tmp_path / name)
    assert result.exit_code == 2
    assert "has not written" in error_of(result) or "no report has written" in error_of(result)
    assert contents(tmp_path) == before
