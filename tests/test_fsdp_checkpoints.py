"""Sharded checkpoints: every process writes its part; any number of processes goes on from it, whole or not at all."""

import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import tiny_llama, trainable
from peft import PeftModel
from processes import full_disk, results_of, worst
from test_fsdp import Run, adapted, effective, in_a_trainer, sharded, start
from test_fsdp_wrappers import in_sft
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from scalora import ScaLora, ScaLoraConfig, StateError
from scalora.cli import app
from scalora.saving.checkpoints import (
    last_checkpoint,
    last_finite_checkpoint,
    set_broken_checkpoints_aside,
    why_not_resumable,
)
from scalora.saving.state_file import SHARDED_STATE, STATE_FILE, read_state, write_state

pytestmark = pytest.mark.slow

STEPS, HALF = 12, 6

# Ranks of 3 and 1, of which four processes have empty shards; moments of pairs; replicas of shards.
RUNS = {
    "dense": {},
    "replicas of shards": {"hsdp": True},
    "matrix, pairs": {"mode": "matrix", "optimizer": "pairs", "merge": "factored"},
}

# What a Trainer's checkpoints are of, by the names of its folders.
KINDS = {"trainer": "SHARDED_STATE_DICT", "trainer, one file": "FULL_STATE_DICT"}
SFT_KINDS = {"sft": "SHARDED_STATE_DICT", "sft, one file": "FULL_STATE_DICT"}
WITHOUT_REPLICAS = [name for name in RUNS if "hsdp" not in RUNS[name]]


def bits(engine):
    """All that a run goes on from, of this process."""
    tensors = {}
    state = engine.state_dict()
    for key, tensor in state["tensors"].items():
        tensors[key] = tensor
    for number, entries in state["optimizer"]["state"].items():
        tensors |= {f"{number} {key}": value for key, value in entries.items()}
    return {key: (t.to_local() if isinstance(t, DTensor) else t).detach().clone() for key, t in tensors.items()}


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[key], value) for key, value in wanted.items())


def resumed(rank, processes, folder, **settings):
    run = Run(rank, processes, **settings)
    run.engine.load(folder)
    assert run.engine.step == HALF
    return run.steps(HALF, STEPS)


def saved(rank, processes, folder):
    """Saved in the middle of a run, once as shards and once as one file, and gone on from."""
    results = {}
    for name, settings in RUNS.items():
        run = Run(rank, processes, **settings).steps(0, HALF)
        run.engine.save(folder / name, sharded=True)
        assert read_state(folder / name)["step"] == HALF  # for every process, as soon as save() is done
        run.engine.save(folder / f"{name}, one file")
        drawn = torch.rand(3)
        run.steps(HALF, STEPS)
        again = resumed(rank, processes, folder / name, **settings)
        results[name] = {
            "weights": effective(run.engine),
            "same bits": same(bits(again.engine), bits(run.engine)),
            "same random numbers": torch.equal(torch.rand(3), drawn),
        }
    return results


def half(processes, folder):
    """A bfloat16 run, with low halves that no backend sends: saved, changed and loaded."""
    model = adapted(torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    engine = ScaLora(
        sharded(model, processes),
        torch.optim.AdamW(trainable(model), lr=1e-2),
        ScaLoraConfig(merge="dense", warmup_steps=0),
    )

    def step():
        for parameter in trainable(model):
            parameter.grad = torch.ones_like(parameter) + parameter.detach()
        engine.optimizer.step()

    step()
    step()
    assert any(pair.remainder.rounded_off.to_local().any() for pair in engine.pairs)
    engine.save(folder / "half", sharded=True)
    engine.save(folder / "half, one file")
    before = bits(engine)
    step()
    assert not same(bits(engine), before)
    engine.load(folder / "half")
    return same(bits(engine), before)


def failures(rank, processes, folder):
    """Of saving, in one process; of loading, where one process sees what is wrong."""
    run = Run(rank, processes).steps(0, 2)
    run.engine.save(folder / "failing", sharded=True)
    before, messages = bits(run.engine), {}
    run.steps(2, 3)
    with full_disk(rank == 1), pytest.raises(OSError, match="shards can't be written") as error:
        run.engine.save(folder / "failing", sharded=True)
    messages["disk full"] = str(error.value)
    dist.barrier()
    messages["left"] = sorted(path.name for path in (folder / "failing").iterdir())
    run.engine.load(folder / "failing")
    messages["earlier"] = same(bits(run.engine), before)
    run.steps(2, 3)
    poisoned = bits(run.engine)
    if rank == 1:
        with torch.no_grad():
            run.engine.pairs[0].weight.to_local()[0, 0] = torch.inf
    run.engine.save(folder / "infinite", sharded=True)
    if rank == 1:
        with torch.no_grad():
            run.engine.pairs[0].weight.to_local().copy_(poisoned[f"weight.{run.engine.pairs[0].name}"])
    with pytest.raises(StateError) as error:
        run.engine.load(folder / "infinite")
    messages["infinite"] = str(error.value)
    messages["untouched"] = same(bits(run.engine), poisoned)
    return messages


def process(rank, processes, folder, port):
    start(rank, processes, port)
    folder = Path(folder)
    results = {}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    batch = 4 // processes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the generators of another number of processes
        if processes == 4:
            results["saved"] = saved(rank, processes, folder)
            results["half"] = half(processes, folder)
            for name, kind in KINDS.items():
                results[name] = in_a_trainer(folder / name, batch=batch, kind=kind)
            for name, kind in SFT_KINDS.items():
                results[name] = in_sft(folder / name, tokenizer, batch, fsdp=True, kind=kind)
            dist.barrier()
            if rank == 0:
                without_merges(folder)
            dist.barrier()
        else:
            results["resumed"] = {
                name: resumed(rank, processes, folder / name, **settings).result()
                for name, settings in RUNS.items()
                if name in WITHOUT_REPLICAS
            }
            for name, kind in {**KINDS, "control": "SHARDED_STATE_DICT"}.items():
                resume = str(folder / name / "checkpoint-3")
                results[name] = in_a_trainer(folder / f"{name}-{processes}", batch=batch, kind=kind, resume=resume)
            for name, kind in SFT_KINDS.items():
                to, resume = folder / f"{name}-{processes}", str(folder / name / "checkpoint-2")
                results[name] = in_sft(to, tokenizer, batch, fsdp=True, kind=kind, resume=resume)
        if processes == 2:
            results["failures"] = failures(rank, processes, folder)
    torch.save(results, folder / f"{processes}-{rank}.pt")
    dist.destroy_process_group()


def without_merges(folder):
    """A Trainer's checkpoint whose weights are the base's."""
    shutil.copytree(folder / "trainer" / "checkpoint-3", folder / "control" / "checkpoint-3")
    shutil.rmtree(folder / "control" / "checkpoint-3" / SHARDED_STATE)
    state = read_state(folder / "trainer" / "checkpoint-3")
    base = dict(tiny_llama().named_parameters())
    for key in state["tensors"]:
        if key.startswith("weight."):
            name = key.removeprefix("weight.base_model.model.")
            state["tensors"][key] = base[f"{name}.weight"].detach()
    write_state(folder / "control" / "checkpoint-3" / STATE_FILE, state)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def of_four(folder):
    return results_of(4, folder, process)


@pytest.fixture(scope="module")
def of_fewer(folder, of_four):
    return {processes: results_of(processes, folder, process) for processes in (2, 1)}


@pytest.mark.parametrize("name", RUNS)
def test_as_many_processes_go_on_to_the_bit(name, of_four):
    for result in of_four:
        assert result["saved"][name]["same bits"]
        assert result["saved"][name]["same random numbers"]


@pytest.mark.parametrize("processes", [2, 1])
@pytest.mark.parametrize("name", WITHOUT_REPLICAS)
def test_fewer_processes_go_on_to_the_same_weights(name, processes, of_four, of_fewer):
    for result in of_fewer[processes]:
        assert worst(result["resumed"][name]["weights"], of_four[0]["saved"][name]["weights"]) <= 1e-12


def test_low_halves_are_restored_to_the_bit(of_four):
    assert all(result["half"] for result in of_four)


@pytest.mark.parametrize("name", [*RUNS, "half"])
def test_shards_hold_what_one_file_holds(name, of_four, folder):
    found, wanted = read_state(folder / name), read_state(folder / f"{name}, one file")
    assert same(found["tensors"], wanted["tensors"])
    for key in ("base", "config", "step", "rescales", "adapter"):
        assert found[key] == wanted[key]
    for number, entries in wanted["optimizer"]["state"].items():
        assert same(found["optimizer"]["state"][number], entries)


def test_there_is_nothing_to_execute(of_four, folder):
    files = [path for path in (folder / "dense").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors"}
    assert len([path for path in files if path.parent.name == "shards"]) == 4  # one of each process


@pytest.mark.parametrize("processes", [2, 1])
@pytest.mark.parametrize("name", [*KINDS, *SFT_KINDS])
def test_a_trainer_goes_on_in_fewer_processes(name, processes, of_four, of_fewer, folder):
    checkpoint = folder / name / ("checkpoint-2" if name in SFT_KINDS else "checkpoint-3")
    assert (checkpoint / STATE_FILE).is_file() == ("one file" in name)
    assert (checkpoint / SHARDED_STATE).is_dir() == ("one file" not in name)
    wanted = of_four[0][name]
    for result in of_fewer[processes]:
        torch.testing.assert_close(result[name]["losses"], wanted["losses"], rtol=1e-5, atol=0)
        assert worst(result[name]["weights"], wanted["weights"]) <= 1e-5


@pytest.mark.parametrize("processes", [2, 1])
def test_a_trainer_that_goes_on_without_the_merges_is_another_run(processes, of_four, of_fewer):
    for result in of_fewer[processes]:
        assert worst(result["control"]["weights"], of_four[0]["trainer"]["weights"]) > 1e-4


def test_a_process_that_cannot_write_leaves_the_earlier_state(of_fewer):
    for found in (result["failures"] for result in of_fewer[2]):
        assert "process 1" in found["disk full"]
        assert "File too large" in found["disk full"]
        assert found["left"] == [SHARDED_STATE]
        assert found["earlier"]


def test_what_one_process_finds_wrong_is_refused_by_all(of_fewer):
    first, second = (result["failures"] for result in of_fewer[2])
    assert "has NaN or infinite entries" in second["infinite"]
    assert first["infinite"].startswith("process 1 of 2 failed: ")
    assert first["untouched"]
    assert second["untouched"]


@pytest.fixture
def trainer(of_four, folder, tmp_path):
    """A Trainer's folder, to be damaged."""
    shutil.copytree(folder / "trainer", tmp_path / "trainer")
    return tmp_path / "trainer"


def shards_of(checkpoint):
    return sorted((checkpoint / SHARDED_STATE / "shards").iterdir())


DAMAGES = {
    "a shard is missing": (lambda c: shards_of(c)[2].unlink(), "files of shards are missing"),
    "a shard is cut short": (lambda c: os.truncate(shards_of(c)[1], 3000), "damaged"),
    "no shards": (lambda c: shutil.rmtree(c / SHARDED_STATE / "shards"), "damaged"),
    "no state": (lambda c: shutil.rmtree(c / SHARDED_STATE), f"has neither {STATE_FILE} nor {SHARDED_STATE}"),
    "not renamed": (lambda c: (c / SHARDED_STATE).rename(c / f".{SHARDED_STATE}.1-ab.partial"), "was cut off"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_set_aside(name, trainer):
    damage, reason = DAMAGES[name]
    assert why_not_resumable(trainer / "checkpoint-6") is None
    damage(trainer / "checkpoint-6")
    assert reason in why_not_resumable(trainer / "checkpoint-6")
    with pytest.warns(UserWarning, match="checkpoint-6' is set aside"):
        set_broken_checkpoints_aside(trainer)
    assert last_checkpoint(trainer) == trainer / "checkpoint-3"
    assert last_finite_checkpoint(trainer) == trainer / "checkpoint-3"


def test_infinite_shards_are_not_gone_on_from(of_fewer, folder, trainer):
    shutil.rmtree(trainer / "checkpoint-6" / SHARDED_STATE)
    shutil.copytree(folder / "infinite" / SHARDED_STATE, trainer / "checkpoint-6" / SHARDED_STATE)
    assert last_finite_checkpoint(trainer) == trainer / "checkpoint-3"


def test_an_export_of_shards_is_that_of_one_process(of_four, trainer, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    wanted = of_four[0]["trainer"]["weights"]
    for to in ("adapter", "merged", "delta"):
        words = ["export", trainer, "--to", to, "--base", tmp_path / "base", "--output", tmp_path / to]
        result = CliRunner().invoke(app, list(map(str, words)))
        assert result.exit_code == 0, result.output
    adapter = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for model in (adapter, merged):
        found = {f"base_model.model.{name.removesuffix('.weight')}": p.detach() for name, p in model.named_parameters()}
        assert worst({name: found[name] for name in wanted}, wanted) <= 1e-5
    assert same(read_state(tmp_path / "delta")["tensors"], read_state(trainer / "checkpoint-6")["tensors"])
