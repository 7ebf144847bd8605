"""How the C++ kernels are built and kept, and the command with them."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import NO_COMPILER, pairs
from test_cli_train import logs, run_folder, write_config
from test_cli_train import scalora as command
from test_rescale_cost import Operations

from scalora.bench.case import Case, Contender
from scalora.rescale import native

if NO_COMPILER:
    pytest.skip("no C++ compiler: install one (Debian: apt-get install g++)", allow_module_level=True)


def build_elsewhere(folder, **environment):
    return subprocess.run(
        [sys.executable, "-c", "from scalora.rescale import native; native.build()"],
        env=os.environ | {"XDG_CACHE_HOME": str(folder)} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_without_a_compiler_it_says_what_to_do_and_leaves_nothing(tmp_path):
    result = build_elsewhere(tmp_path, CXX="/nowhere/c++")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "native=True: the C++ can't be compiled" in last
    assert "/nowhere/c++" in last
    assert "install g++ or clang++, and scalora[native]" in last
    assert not list((tmp_path / "scalora" / "native").iterdir())


@pytest.fixture(scope="module")
def built_after_a_kill(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    (folder / "scalora" / "native" / "tmpkilled").mkdir(parents=True, mode=0o700)
    return folder, build_elsewhere(folder, PATH="/usr/bin:/bin")


@pytest.mark.slow
def test_what_a_killed_build_left_is_not_waited_for_and_the_path_stays(built_after_a_kill):
    folder, result = built_after_a_kill
    assert result.returncode == 0, result.stderr
    assert len(list((folder / "scalora" / "native").glob("*.so"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("place", ["scalora", "scalora/native"])
def test_nothing_is_loaded_from_where_others_can_write(built_after_a_kill, tmp_path, place):
    shutil.copytree(built_after_a_kill[0], tmp_path, dirs_exist_ok=True)
    assert build_elsewhere(tmp_path).returncode == 0
    (tmp_path / place).chmod(0o777)
    result = build_elsewhere(tmp_path)
    assert result.returncode == 1
    assert "other users" in result.stderr.strip().splitlines()[-1]
    assert "chmod go-w" in result.stderr.strip().splitlines()[-1]
    (tmp_path / place).chmod(0o700)
    (library,) = (tmp_path / "scalora" / "native").glob("*.so")
    library.chmod(0o666)
    assert "other users" in build_elsewhere(tmp_path).stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_train_takes_the_setting(causal_folder, write_jsonl, tmp_path):
    data = {"train": str(write_jsonl("train.jsonl", pairs(24)))}
    losses = {}
    for use_native in (False, True):
        settings = {"warmup_steps": 1, "native": use_native}
        config = write_config(tmp_path, model=str(causal_folder), data=data, scalora=settings)
        run = run_folder(command("train", config, "--overwrite"), tmp_path)
        losses[use_native] = [row["loss"] for row in logs(run) if "loss" in row]
    assert len(losses[True]) == 4
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


def test_train_refuses_it_without_a_compiler_before_it_loads_the_model(
    monkeypatch, causal_folder, write_jsonl, tmp_path
):
    def build():
        raise native.NativeBuildError("native=True: the C++ can't be compiled")

    monkeypatch.setattr(native, "build", build)
    model = tmp_path / "without-weights"
    shutil.copytree(causal_folder, model, ignore=shutil.ignore_patterns("*.safetensors"))
    data = {"train": str(write_jsonl("train.jsonl", pairs(8)))}
    config = write_config(tmp_path, model=str(model), data=data, scalora={"native": True})
    result = command("train", config)
    assert result.exit_code == 2
    assert result.output.splitlines()[-1].startswith("error: native=True: the C++ can't be compiled")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bench_measures_them(tmp_path):
    small = ["--width", "64", "--layers", "1", "--sequence", "8", "--batch", "1", "--rounds", "1", "--device", "cpu"]
    result = command("bench", *small, "--method", "scalora", "--no-memory", "--native", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "bench.json").read_text())["settings"]["native"] is True
    assert ", native." in result.output
    case = Case(None, 64, 1, 4, 1, 8, "float32", "auto", "cpu", native=True)
    contender = Contender("scalora", case.base(), case)
    contender.backward()
    with Operations() as operations:
        contender.optimizer.step()
    assert operations.count["merge_"] > 0
