"""Broken input of every kind: an error in one clear line, nothing lost, nothing executed."""

import errno
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from conftest import WORDS
from models import TwoLayers, tiny_gpt2, trainable, with_lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import get_last_checkpoint
from typer.testing import CliRunner

import scalora
from scalora import ScaLora, ScaLoraConfig, StateError
from scalora.cli import app
from scalora.saving.checkpoints import set_broken_checkpoints_aside
from scalora.saving.state_file import read_state, write_state

STATE = "scalora_state.safetensors"
TRAINING = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": 2,
    "gradient_checkpointing": False,
}


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def contents(folder):
    """Every file of a folder with a digest of what is in it, every folder and every link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "pipe"
    return found


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def assert_one_line(result, named):
    assert result.exit_code not in (0, None)
    assert isinstance(result.exception, SystemExit), result.exception
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == errors[0]
    assert "Traceback" not in result.output
    assert named in errors[0], errors[0]


@contextmanager
def full_disk(free):
    """Files can't grow beyond so many bytes; Python ignores the signal, so that writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def resume(run, trained, *words):
    return command("train", trained / "dense.yaml", "--resume", "--output_dir", run, *words)


def edit_yaml(path, **changes):
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


@pytest.fixture(scope="module")
def trained(causal_folder, tmp_path_factory):
    """A run of each merge kind, with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"prompt": f"say: {WORDS[i % 10]}", "completion": f" {WORDS[i % 7]}"} for i in range(24)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for merge in ("dense", "factored"):
        content = {
            "model": str(causal_folder),
            "output_dir": str(folder / merge),
            "data": {"train": str(folder / "train.jsonl")},
            "scalora": {"warmup_steps": 1, "merge": merge},
            "training": TRAINING,
        }
        (folder / f"{merge}.yaml").write_text(yaml.safe_dump(content))
        result = command("train", folder / f"{merge}.yaml")
        assert result.exit_code == 0, result.stderr[-300:]
    return folder


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained / "dense", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def stopped_run(run):
    """A run that was stopped before it wrote its summary."""
    (run / "summary.json").unlink()
    return run


@pytest.fixture
def factored_run(trained, tmp_path):
    shutil.copytree(trained / "factored", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def own_base(run, causal_folder, tmp_path):
    """The base model of the run in a folder that may be broken."""
    shutil.copytree(causal_folder, tmp_path / "base")
    edit_yaml(run / "config.yaml", model=str(tmp_path / "base"))
    return tmp_path / "base"


def new_engine(
    merge="dense", *, rank=2, features=12, targets=("first", "second"), optimizer=torch.optim.AdamW, **config
):
    torch.manual_seed(0)
    model = with_lora(TwoLayers(features=features), r=rank, target_modules=list(targets))
    settings = {"warmup_steps": 0, "merge": merge} | config
    return model, ScaLora(model, optimizer(trainable(model), lr=1e-2), ScaLoraConfig(**settings))


def trained_engine(merge="dense"):
    model, engine = new_engine(merge)
    for _ in range(2):
        model(torch.randn(5, 12)).square().sum().backward()
        engine.optimizer.step()
        engine.optimizer.zero_grad()
    return model, engine


def frozen(engine):
    """A copy of all that an engine could lose."""
    buffer = io.BytesIO()
    torch.save(engine.state_dict(), buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


# --- state files that are no state files --------------------------------------------------------------------------


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path, change):
    """Write a state file anew with other metadata."""
    tensors = load_file(path)
    metadata = metadata_of(path)
    save_file(tensors, path, metadata=change(metadata))


def redescribe(**changes):
    def change(metadata):
        return metadata | {"scalora": json.dumps(json.loads(metadata["scalora"]) | changes)}

    return change


def make_directory(path, marker):
    path.unlink()
    path.mkdir()


def make_pickle(path, marker):
    path.write_bytes(pickle.dumps({"tensors": Bomb(marker)}))


def make_torch_zip(path, marker):
    torch.save({"tensors": Bomb(marker)}, path)


def overstate_header(path, marker):
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def point_beyond_the_end(path, marker):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    last = max((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"][1])
    header[last]["data_offsets"][1] += 4096
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def dangle(path, marker):
    path.unlink()
    path.symlink_to(path.parent / "nothing.safetensors")


def make_pipe(path, marker):
    path.unlink()
    os.mkfifo(path)


def nest(path, marker):
    deep = '{"list": [' * 100_000 + "]}" * 100_000
    rewrite(path, lambda m: {"scalora": f'{{"format_version": 1, "content": {deep}}}'})


STATE_FILES = {
    "missing": (lambda path, marker: path.unlink(), "does not exist"),
    "empty": (lambda path, marker: path.write_bytes(b""), "not a complete safetensors file"),
    "cut-in-the-length": (
        lambda path, marker: path.write_bytes(path.read_bytes()[:5]),
        "not a complete safetensors file",
    ),
    "cut-in-the-header": (lambda path, marker: path.write_bytes(path.read_bytes()[:200]), "not a complete safetensors"),
    "cut-in-the-tensors": (lambda path, marker: truncate(path, 0.7), "not a complete safetensors file"),
    "one-byte-short": (
        lambda path, marker: path.write_bytes(path.read_bytes()[:-1]),
        "not a complete safetensors file",
    ),
    "one-byte-too-many": (
        lambda path, marker: path.write_bytes(path.read_bytes() + b"x"),
        "not a complete safetensors",
    ),
    "random-bytes": (
        lambda path, marker: path.write_bytes(bytes(range(7, 256)) * 40),
        "not a complete safetensors file",
    ),
    "json-text": (lambda path, marker: path.write_text('{"step": 3}'), "not a complete safetensors file"),
    "folder-in-its-place": (make_directory, "is not a file"),
    "pipe-in-its-place": (make_pipe, "is not a file"),
    "pickle-in-its-place": (make_pickle, "not a complete safetensors file"),
    "torch-file-in-its-place": (make_torch_zip, "not a complete safetensors file"),
    "header-longer-than-the-file": (overstate_header, "not a complete safetensors file"),
    "tensor-beyond-the-end": (point_beyond_the_end, "not a complete safetensors file"),
    "link-to-nothing": (dangle, "does not exist"),
    "other-safetensors-file": (
        lambda path, marker: rewrite(path, lambda m: {"format": "pt"}),
        "was not written by scalora",
    ),
    "description-not-json": (
        lambda path, marker: rewrite(path, lambda m: {"scalora": "{"}),
        "was not written by scalora",
    ),
    "description-a-list": (
        lambda path, marker: rewrite(path, lambda m: {"scalora": "[1]"}),
        "was not written by scalora",
    ),
    "description-nested-too-deeply": (nest, "was not written by scalora"),
    "later-format-version": (lambda path, marker: rewrite(path, redescribe(format_version=2)), "format version 2"),
    "no-format-version": (lambda path, marker: rewrite(path, redescribe(format_version=None)), "format version None"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", STATE_FILES)
def test_a_broken_state_file(kind, run, trained, tmp_path):
    damage, named = STATE_FILES[kind]
    marker = tmp_path / "executed"

    damage(run / "delta" / STATE, marker)
    before = contents(tmp_path)
    for to in ("adapter", "delta"):
        assert_one_line(command("export", run, "--to", to), named)

    checkpoint = run / "trainer" / "checkpoint-4"
    damage(checkpoint / STATE, marker)
    between = contents(tmp_path)
    if kind == "missing":  # then it is a checkpoint of a run without ScaLoRA
        assert scalora.last_checkpoint(run / "trainer") == checkpoint
    else:
        with pytest.warns(UserWarning, match=named.replace("(", r"\(")):
            assert scalora.last_checkpoint(run / "trainer") == run / "trainer" / "checkpoint-2"
    assert contents(tmp_path) == between
    assert {name: before[name] for name in before if "checkpoint-4" not in name}.items() <= between.items()

    _, engine = trained_engine()
    engine.save(tmp_path / "saved")
    damage(tmp_path / "saved" / STATE, marker)
    live = frozen(engine)
    with pytest.raises(StateError, match=named.replace("(", r"\(")):
        engine.load(tmp_path / "saved")
    assert_same(frozen(engine), live)
    assert not marker.exists()


def test_the_bomb_of_these_tests_is_live(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def refer_to_no_tensor(content):
    """The description names a tensor that the file lacks."""
    content["table"] = [[key, {"tensor": "nowhere"} if key == "step" else value] for key, value in content["table"]]


DESCRIPTIONS = {
    "names-a-tensor-that-is-not-there": refer_to_no_tensor,
    "has-an-entry-of-an-unknown-kind": lambda content: content["table"].append(["more", {"object": "os.system"}]),
    "has-an-entry-of-two-kinds": lambda content: content["table"].append(["more", {"value": 1, "list": []}]),
    "has-a-list-for-a-key": lambda content: content["table"].append([[1], {"value": 1}]),
    "is-not-a-table": lambda content: content.update(list=content.pop("table") and []),
}


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_a_broken_description_in_a_state_file(kind, run, tmp_path):
    path = run / "delta" / STATE
    described = json.loads(metadata_of(path)["scalora"])["content"]
    DESCRIPTIONS[kind](described)
    rewrite(path, redescribe(content=described))
    before = contents(tmp_path)
    assert_one_line(command("export", run), "is damaged")
    assert contents(tmp_path) == before


# --- whole state files with something wrong in them ---------------------------------------------------------------


def first(state, prefix):
    return next(name for name in state["tensors"] if name.startswith(prefix))


def drop(key):
    return lambda state: state.pop(key)


def put(**entries):
    return lambda state: state.update(entries)


def put_setting(**settings):
    return lambda state: state["config"].update(settings)


def put_adapter(**settings):
    return lambda state: state["adapter"].update(settings)


def drop_tensor(prefix):
    return lambda state: state["tensors"].pop(first(state, prefix))


def change_tensor(prefix, change):
    def apply(state):
        name = first(state, prefix)
        state["tensors"][name] = change(state["tensors"][name])

    return apply


def spoiled(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


# kind: (merge, edit of the state, what the error names)
STATES = {
    "no-tensors": ("dense", drop("tensors"), "it lacks tensors"),
    "no-base": ("dense", drop("base"), "it lacks base"),
    "no-step": ("dense", drop("step"), "it lacks step"),
    "tensors-a-text": ("dense", put(tensors="all"), "its 'tensors' is 'all'"),
    "tensor-a-number": ("dense", change_tensor("trained.", lambda t: 3), "is 3, not a tensor"),
    "base-a-number": ("dense", put(base=7), "its 'base' is 7"),
    "other-base": ("dense", put(base="f" * 64), "belongs to a base model with fingerprint ffffffffffff"),
    "step-a-text": ("dense", put(step="three"), "its 'step' is 'three'"),
    "step-negative": ("dense", put(step=-1), "its 'step' is -1, not a non-negative integer"),
    "step-a-fraction": ("dense", put(step=1.5), "its 'step' is 1.5"),
    "rescales-negative": ("dense", put(rescales=-2), "its 'rescales' is -2, not a non-negative integer"),
    "settings-a-list": ("dense", put(config=[1]), "its 'config' is [1]"),
    "unknown-setting": ("dense", put_setting(smoothnes=1), "unknown ScaLoRA setting 'smoothnes'"),
    "setting-out-of-range": ("dense", put_setting(interval=0), "interval must be an integer of at least 1"),
    "setting-of-another-type": (
        "dense",
        put_setting(target_norm="big"),
        "target_norm must be a positive finite number",
    ),
    "unknown-merge": ("dense", put(merge="both"), "its 'merge' is 'both'"),
    "trained-tensor-missing": ("dense", drop_tensor("trained."), "the state lacks 'trained."),
    "weight-missing": ("dense", drop_tensor("weight."), "the state lacks 'weight."),
    "tensor-too-many": (
        "dense",
        lambda s: s["tensors"].update(more=torch.zeros(2)),
        "the state has 'more' (1 unknown)",
    ),
    "tensor-of-another-shape": ("dense", change_tensor("weight.", lambda t: t[:-1].clone()), "in the model"),
    "tensor-transposed": ("dense", change_tensor("trained.", lambda t: t.mT.contiguous()), "in the model"),
    "tensor-of-another-dtype": ("dense", change_tensor("trained.", lambda t: t.half()), "is torch.float16"),
    "nan": ("dense", change_tensor("weight.", spoiled(float("nan"))), "NaN or infinite entries"),
    "infinity": ("dense", change_tensor("trained.", spoiled(float("inf"))), "NaN or infinite entries"),
    "factor-missing": ("factored", drop_tensor("right."), "the state lacks 'right."),
    "factors-of-different-columns": (
        "factored",
        change_tensor("left.", lambda t: t[:, 1:].clone()),
        "numbers of columns",
    ),
    "factor-without-columns": ("factored", change_tensor("left.", lambda t: t[:, 0].clone()), "in the model"),
    "factor-of-other-rows": ("factored", change_tensor("right.", lambda t: t[1:].clone()), "in the model"),
    "nan-in-a-factor": ("factored", change_tensor("left.", spoiled(float("nan"))), "NaN or infinite entries"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", STATES)
def test_a_state_with_something_wrong_in_it(kind, trained, tmp_path):
    merge, edit, named = STATES[kind]
    run = tmp_path / "run"
    shutil.copytree(trained / merge, run)
    _, engine = trained_engine(merge)
    engine.save(tmp_path / "saved")
    for folder in (run / "delta", tmp_path / "saved"):
        state = read_state(folder)
        edit(state)
        (folder / STATE).unlink()
        write_state(folder / STATE, state)
    before = contents(tmp_path)
    assert_one_line(command("export", run, "--to", "adapter"), named)
    assert contents(tmp_path) == before
    live = frozen(engine)
    with pytest.raises(StateError) as caught:
        engine.load(tmp_path / "saved")
    assert named in str(caught.value)
    assert_same(frozen(engine), live)


def drop_group(state):
    state["optimizer"]["param_groups"][0]["params"].pop()


ENGINE_STATES = {
    "optimizer-a-text": (put(optimizer="AdamW"), "optimizer does not fit"),
    "optimizer-without-groups": (lambda s: s["optimizer"].pop("param_groups"), "optimizer does not fit"),
    "optimizer-of-fewer-parameters": (drop_group, "optimizer does not fit"),
    "random-a-number": (put(random=3), "random number generators in the state can't be restored"),
    "random-without-python's": (
        lambda s: s["random"].pop("python"),
        "random number generators in the state can't be restored",
    ),
    "random-of-torch-cut": (lambda s: s["random"].update(torch=torch.zeros(3, dtype=torch.uint8)), "can't be restored"),
    "random-of-numpy-a-text": (lambda s: s["random"].update(numpy="MT19937"), "can't be restored"),
}


@pytest.mark.parametrize("kind", ENGINE_STATES)
def test_an_engine_state_with_something_wrong_in_it(kind, tmp_path):
    edit, named = ENGINE_STATES[kind]
    _, engine = trained_engine()
    engine.save(tmp_path)
    state = read_state(tmp_path)
    edit(state)
    write_state(tmp_path / STATE, state)
    _, other = new_engine()
    live = frozen(other)
    with pytest.raises(StateError, match=named):
        other.load(tmp_path)
    assert_same(frozen(other), live)


ENGINES = {
    "other-rank": (lambda: new_engine(rank=3), "in the model"),
    "other-target-modules": (lambda: new_engine(targets=["first"]), "fingerprint"),
    "other-base-shape": (lambda: new_engine(features=13), "fingerprint"),
    "other-interval": (lambda: new_engine(interval=3), "use the same settings"),
    "other-merge": (lambda: new_engine("factored"), "use the same settings"),
    "other-optimizer-groups": (lambda: new_engine(optimizer=two_groups), "optimizer does not fit"),
}


def two_groups(parameters, lr):
    return torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=lr)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_state_of_another_engine(kind, tmp_path):
    make, named = ENGINES[kind]
    trained_engine()[1].save(tmp_path)
    _, engine = make()
    live = frozen(engine)
    with pytest.raises(StateError, match=named):
        engine.load(tmp_path)
    assert_same(frozen(engine), live)


ADAPTERS = {
    "r-zero": (put_adapter(r=0), "adapter does not fit this base model"),
    "r-a-text": (put_adapter(r="eight"), "adapter does not fit this base model"),
    "r-another": (put_adapter(r=4), "in the model"),
    "target-modules-of-another-model": (put_adapter(target_modules=["c_attn"]), "not found in the base model"),
    "target-modules-fewer": (put_adapter(target_modules=["q_proj"]), "adapt the same modules"),
    "dora": (put_adapter(use_dora=True), "set use_dora=False"),
    "a-list": (put(adapter=["r", 8]), "its 'adapter' is ['r', 8]"),
    "none": (put(adapter=None), "the state"),
    "merge-of-the-other-kind": (put(merge="factored"), "the state lacks"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_edited_adapter_settings_in_a_state(kind, run, tmp_path):
    edit, named = ADAPTERS[kind]
    state = read_state(run / "delta")
    edit(state)
    (run / "delta" / STATE).unlink()
    write_state(run / "delta" / STATE, state)
    before = contents(tmp_path)
    assert_one_line(command("export", run, "--to", "merged"), named)
    assert contents(tmp_path) == before


def test_adapter_settings_that_would_import_a_module(run, tmp_path, monkeypatch):
    marker = tmp_path / "executed"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    state = read_state(run / "delta")
    state["adapter"] |= {"megatron_config": {"a": 1}, "megatron_core": "evil"}
    (run / "delta" / STATE).unlink()
    write_state(run / "delta" / STATE, state)
    assert_one_line(command("export", run), "megatron_config")
    assert not marker.exists()


# --- run folders --------------------------------------------------------------------------------------------------


def config_text(text):
    return lambda run: (run / "config.yaml").write_text(text)


def config(**changes):
    return lambda run: edit_yaml(run / "config.yaml", **changes)


RUNS = {
    "gone": (shutil.rmtree, "does not exist"),
    "config-missing": (lambda run: (run / "config.yaml").unlink(), "holds no config.yaml"),
    "config-empty": (config_text(""), "is not the config of a run"),
    "config-not-yaml": (config_text("model: ["), "config.yaml' can't be read"),
    "config-a-list": (config_text("- model"), "is not the config of a run"),
    "config-not-text": (
        lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\x00model"),
        "config.yaml' can't be read",
    ),
    "config-a-folder": (lambda run: (run / "config.yaml").unlink() or (run / "config.yaml").mkdir(), "config.yaml"),
    "config-with-python-code": (
        config_text("model: !!python/object/apply:builtins.open [executed, w]"),
        "config.yaml' can't be read",
    ),
    "unknown-method": (config(method="lorra"), "method='lorra'"),
    "method-lora": (config(method="lora"), "'lora'"),
    "unknown-key": (config(metod="scalora"), "unknown key 'metod': did you mean 'method'?"),
    "unknown-dtype": (config(dtype="float8"), "dtype='float8'"),
    "model-gone": (config(model="./nowhere"), "model './nowhere' does not exist"),
    "other-dtype": (config(dtype="bfloat16"), "bfloat16"),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_broken_run_folder(kind, run, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # As people have it: the config that the run was started with is beside the run folder.
    shutil.copyfile(trained / "dense.yaml", tmp_path / "config.yaml")
    damage, named = RUNS[kind]
    damage(run)
    before = contents(tmp_path)
    result = command("export", run)
    assert_one_line(result, "fingerprint" if kind == "other-dtype" else named)
    result = command("train", "config.yaml", "--resume", "--output_dir", run)
    assert_one_line(result, {"gone": "holds no config.yaml", "model-gone": "model="}.get(kind, named))
    assert contents(tmp_path) == before


def test_a_run_folder_without_its_state(run, tmp_path):
    shutil.rmtree(run / "delta")
    before = contents(tmp_path)
    assert_one_line(command("export", run), "does not exist")
    assert contents(tmp_path) == before


def test_an_unfinished_run_folder_is_not_scored(run, write_jsonl, tmp_path):
    for name in ("model", "delta"):
        shutil.rmtree(run / name)
    data = write_jsonl("eval.jsonl", [{"prompt": "say:", "completion": " red"}])
    before = contents(tmp_path)
    assert_one_line(command("evaluate", run, run / "config.yaml", "--data.eval", data), "not a saved model or finished")
    assert contents(tmp_path) == before


# --- base models --------------------------------------------------------------------------------------------------


def sharded(change):
    def damage(base, marker):
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="40KB")
        (base / "model.safetensors").unlink(missing_ok=True)
        shards = sorted(base.glob("model-*.safetensors"))
        assert len(shards) > 1
        change(base, shards)

    return damage


def misname_shard(base, shards):
    index = json.loads((base / "model.safetensors.index.json").read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "model-of-nobody.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled_weights(save):
    def damage(base, marker):
        weights = load_file(base / "model.safetensors")
        (base / "model.safetensors").unlink()
        save(weights | {"more": Bomb(marker)}, base / "pytorch_model.bin")

    return damage


def plain_pickle(content, path):
    path.write_bytes(pickle.dumps({key: Bomb(value.marker) for key, value in content.items() if key == "more"}))


def bring_code(base, marker):
    (base / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own:\n    pass\n")
    auto_map = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    edit_json(base / "config.json", model_type="own", auto_map=auto_map)


def lose_tokenizer(base, marker):
    for path in base.glob("tokenizer*"):
        path.unlink()


BASES = {
    "weights-missing": (lambda base, marker: (base / "model.safetensors").unlink(), "can't be loaded"),
    "weights-cut": (lambda base, marker: truncate(base / "model.safetensors", 0.5), "can't be loaded"),
    "weights-empty": (lambda base, marker: (base / "model.safetensors").write_bytes(b""), "can't be loaded"),
    "shard-missing": (sharded(lambda base, shards: shards[1].unlink()), "can't be loaded"),
    "shard-cut": (sharded(lambda base, shards: truncate(shards[1], 0.5)), "can't be loaded"),
    "index-names-another-file": (sharded(misname_shard), "can't be loaded"),
    "index-not-json": (
        sharded(lambda base, shards: truncate(base / "model.safetensors.index.json", 0.5)),
        "can't be loaded",
    ),
    "pickle-for-weights": (pickled_weights(plain_pickle), "can't be loaded"),
    "torch-file-with-code-for-weights": (pickled_weights(torch.save), "can't be loaded"),
    "config-not-json": (lambda base, marker: truncate(base / "config.json", 0.5), "config"),
    "config-of-an-unknown-model": (lambda base, marker: edit_json(base / "config.json", model_type="nil"), "nil"),
    "config-missing": (lambda base, marker: (base / "config.json").unlink(), "holds no config.json"),
    "config-of-another-size": (lambda base, marker: edit_json(base / "config.json", hidden_size=16), "can't be loaded"),
    "code-of-its-own": (bring_code, "trust_remote_code"),
    "tokenizer-missing": (lose_tokenizer, "tokenizer"),
    "tokenizer-not-json": (lambda base, marker: truncate(base / "tokenizer.json", 0.5), "tokenizer"),
}

# An export carries the run's own tokenizer.
NOT_EXPORTED = ("tokenizer-missing", "tokenizer-not-json")


@pytest.mark.parametrize("kind", BASES)
def test_a_broken_base_model(kind, run, own_base, write_jsonl, tmp_path):
    damage, named = BASES[kind]
    marker = tmp_path / "executed"
    data = write_jsonl("eval.jsonl", [{"prompt": "say:", "completion": " red"}])
    damage(own_base, marker)
    before = contents(tmp_path)
    if kind not in NOT_EXPORTED:
        assert_one_line(command("export", run), named)
    assert_one_line(command("evaluate", own_base, run / "config.yaml", "--data.eval", data), named)
    assert_one_line(command("train", run / "config.yaml", "--output_dir", tmp_path / "new"), named)
    assert contents(tmp_path) == before
    assert not marker.exists()


def change_weights(base):
    weights = load_file(base / "model.safetensors")
    save_file({k: v * 1.001 for k, v in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})


def change_architecture(base):
    model = tiny_gpt2()
    model.resize_token_embeddings(512)  # as many as the tokenizer has, and more
    model.save_pretrained(base)


@pytest.mark.parametrize(
    ("change", "named"),
    [(change_weights, "fingerprint"), (change_architecture, "not found in the base model")],
    ids=["other-weights", "other-architecture"],
)
def test_the_wrong_base_model(change, named, run, own_base, tmp_path):
    change(own_base)
    before = contents(tmp_path)
    for to in ("adapter", "merged", "delta"):
        assert_one_line(command("export", run, "--to", to), named)
    assert_one_line(
        command("train", run / "config.yaml", "--resume", "--output_dir", run, "--max_steps", 6),
        "fingerprint",
    )
    assert contents(tmp_path) == before


# --- places to write to -------------------------------------------------------------------------------------------


def a_file(tmp_path):
    (tmp_path / "out").write_text("precious")
    return tmp_path / "out"


def a_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thing").write_text("precious")
    return tmp_path / "out"


def a_link(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    return tmp_path / "out"


def below_a_file(tmp_path):
    return a_file(tmp_path) / "deeper"


OUTPUTS = {
    "a-file": (a_file, "exists: choose another with --output"),
    "a-folder": (a_folder, "exists: choose another with --output"),
    "a-link-to-nothing": (a_link, "exists: choose another with --output"),
    "below-a-file": (below_a_file, "Not a directory"),
    "where-nothing-can-be-made": (lambda tmp_path: Path("/proc/out"), "/proc/"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("to", ["adapter", "delta"])
def test_an_output_that_cannot_be_written(kind, to, run, tmp_path):
    make, named = OUTPUTS[kind]
    output = make(tmp_path)
    before = contents(tmp_path)
    assert_one_line(command("export", run, "--to", to, "--output", output), named)
    assert contents(tmp_path) == before


def test_a_read_only_folder(run, tmp_path, monkeypatch):
    make_folder = Path.mkdir

    def mkdir(self, *args, **settings):
        if tmp_path in self.parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        make_folder(self, *args, **settings)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    before = contents(tmp_path)
    assert_one_line(command("export", run), "Read-only file system")
    assert_one_line(command("train", run / "config.yaml", "--output_dir", tmp_path / "new"), "Read-only file system")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("to", ["adapter", "merged", "delta"])
def test_a_full_disk_while_exporting(to, run, tmp_path):
    before = contents(tmp_path)
    with full_disk(20_000):
        result = command("export", run, "--to", to, "--output", tmp_path / "out")
    assert_one_line(result, str(tmp_path / "out"))
    assert contents(tmp_path) == before


def test_a_full_disk_for_the_tokenizer_of_a_merged_model(run, tmp_path, monkeypatch):
    def save_pretrained(self, folder, **settings):
        (Path(folder) / "tokenizer.json").write_text("{")
        raise Exception("No space left on device (os error 28)")  # tokenizers' own words

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", save_pretrained)
    before = contents(tmp_path)
    result = command("export", run, "--to", "merged", "--output", tmp_path / "out")
    assert_one_line(result, "No space left on device")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_a_full_disk_while_saving(merge, tmp_path):
    model, engine = trained_engine(merge)
    engine.save(tmp_path / "engine")
    model.save_pretrained(tmp_path / "model")
    before = contents(tmp_path)
    with full_disk(100):
        with pytest.raises(OSError, match=r"engine/scalora_state\.safetensors"):
            engine.save(tmp_path / "engine")
        with pytest.raises(OSError, match=r"model"):
            model.save_pretrained(tmp_path / "model")
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_a_full_disk_for_the_result_of_training(trained, tmp_path):
    with full_disk(20_000):
        result = command(
            "train", trained / "dense.yaml", "--output_dir", tmp_path / "run", "--save_strategy", "no", "--max_steps", 1
        )
    assert_one_line(result, str(tmp_path / "run" / "delta"))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".scalora-run",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "updates.jsonl",
        "trainer",
    }


@pytest.mark.slow
def test_a_full_disk_for_a_checkpoint(run, trained, tmp_path):
    before = contents(run)
    metrics = (run / "metrics.jsonl").read_text()
    with full_disk(20_000):
        result = resume(run, trained, "--max_steps", 5, "--save_steps", 5)
    assert_one_line(result, "checkpoint-5")
    after = contents(run)
    changed = {name for name in before if before[name] != after.get(name)}
    moved = {name for name in changed if name.startswith(("delta", "model", "summary.json"))}
    assert changed - moved == {"config.yaml", "environment.json", "metrics.jsonl", "updates.jsonl"}
    assert {name: before[name] for name in moved}.items() <= contents(run / "results.earlier-1").items()
    whole_steps = [line for line in metrics.splitlines() if "loss" in json.loads(line)]
    assert set(whole_steps) <= set((run / "metrics.jsonl").read_text().splitlines())
    assert not [name for name in after if name.endswith(".partial")]
    with pytest.warns(UserWarning, match=r"checkpoint-5' is skipped"):
        assert scalora.last_checkpoint(run / "trainer") == run / "trainer" / "checkpoint-4"


def test_a_full_disk_keeps_the_earlier_scores(run, write_jsonl, tmp_path):
    data = write_jsonl("eval.jsonl", [{"prompt": "say:", "completion": " red"}])
    (tmp_path / "scores.json").write_text("{}")
    before = contents(tmp_path)
    words = ["evaluate", run, run / "config.yaml", "--data.eval", data, "--output", tmp_path / "scores.json"]
    command(*words[:-2])  # leaves the data in the library's cache, so that only the scores are written
    with full_disk(20):
        assert_one_line(command(*words), "scores.json")
    assert contents(tmp_path) == before


def test_scores_to_a_folder(run, write_jsonl, tmp_path):
    data = write_jsonl("eval.jsonl", [{"prompt": "say:", "completion": " red"}])
    before = contents(tmp_path)
    words = ["evaluate", run, run / "config.yaml", "--data.eval", data, "--output", run]
    assert_one_line(command(*words), str(run))
    assert contents(tmp_path) == before


OPTIONS = {
    "rtol-zero": (["--rtol", "0"], "--rtol 0.0: must be between 0 and 1"),
    "rtol-two": (["--rtol", "2"], "--rtol 2.0: must be between 0 and 1"),
    "rtol-nan": (["--rtol", "nan"], "--rtol nan"),
    "rtol-a-text": (["--rtol", "tight"], "--rtol"),
    "rtol-of-a-merged-model": (["--rtol", "0.1", "--to", "merged"], "for --to adapter, not for --to merged"),
    "max-rank-zero": (["--max-rank", "0"], "--max-rank 0: must be at least 1"),
    "max-rank-a-fraction": (["--max-rank", "1.5"], "--max-rank"),
    "unknown-target": (["--to", "gguf"], "'gguf'"),
    "unknown-dtype": (["--dtype", "int8"], "'int8'"),
    "unknown-option": (["--ranks", "4"], "--ranks"),
    "option-without-value": (["--output"], "--output"),
    "second-run": (["another"], "another"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_bad_option(kind, run, tmp_path):
    words, named = OPTIONS[kind]
    before = contents(tmp_path)
    result = command("export", run, *words)
    assert result.exit_code == 2
    assert_one_line(result, named)
    assert contents(tmp_path) == before


def test_an_unknown_command():
    assert_one_line(command("exprot"), "exprot")


# --- going on with a run ------------------------------------------------------------------------------------------


CHECKPOINTS = {
    "trainer-state-missing": (lambda folder, marker: (folder / "trainer_state.json").unlink(), "has no trainer_state"),
    "trainer-state-cut": (lambda folder, marker: truncate(folder / "trainer_state.json", 0.5), "is cut short"),
    "trainer-state-a-list": (lambda folder, marker: (folder / "trainer_state.json").write_text("[]"), "no global_step"),
    "optimizer-missing": (lambda folder, marker: (folder / "optimizer.pt").unlink(), "has no optimizer.pt"),
    "optimizer-cut": (lambda folder, marker: truncate(folder / "optimizer.pt", 0.5), "optimizer.pt is cut short"),
    "optimizer-a-pickle": (lambda folder, marker: make_pickle(folder / "optimizer.pt", marker), "optimizer.pt"),
    "optimizer-with-code": (lambda folder, marker: make_torch_zip(folder / "optimizer.pt", marker), "optimizer.pt"),
    "scheduler-missing": (lambda folder, marker: (folder / "scheduler.pt").unlink(), "has no scheduler.pt"),
    "random-state-with-code": (lambda folder, marker: make_torch_zip(folder / "rng_state.pth", marker), "rng_state"),
    "adapter-cut": (lambda folder, marker: truncate(folder / "adapter_model.safetensors", 0.5), "adapter_model"),
    "state-cut": (lambda folder, marker: truncate(folder / STATE, 0.5), STATE),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_broken_checkpoint_is_skipped_and_kept(kind, run, trained, tmp_path):
    damage, named = CHECKPOINTS[kind]
    marker = tmp_path / "executed"
    broken = run / "trainer" / "checkpoint-4"
    damage(broken, marker)
    before = contents(broken)
    with pytest.warns(UserWarning, match=named):
        assert scalora.last_checkpoint(run / "trainer") == run / "trainer" / "checkpoint-2"
    with pytest.warns(UserWarning, match=rf"set aside as 'incomplete-checkpoint-4': .*{named}"):
        set_broken_checkpoints_aside(run / "trainer")
    assert contents(broken.with_name("incomplete-checkpoint-4")) == before
    assert get_last_checkpoint(run / "trainer") == str(run / "trainer" / "checkpoint-2")
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:checkpoint:UserWarning")
@pytest.mark.parametrize("kind", ["optimizer-with-code", "state-cut"])
def test_resuming_past_a_broken_checkpoint(kind, stopped_run, trained, tmp_path):
    run = stopped_run
    marker = tmp_path / "executed"
    broken = run / "trainer" / "checkpoint-4"
    CHECKPOINTS[kind][0](broken, marker)
    before = contents(broken)
    result = resume(run, trained)
    assert result.exit_code == 0, result.stderr[-300:]
    assert contents(broken.with_name("incomplete-checkpoint-4")) == before
    assert not marker.exists()
    # Steps 3 and 4 were taken again, from the same state.
    resumed = load_file(run / "model" / "model.safetensors")
    for name, tensor in load_file(trained / "dense" / "model" / "model.safetensors").items():
        torch.testing.assert_close(resumed[name], tensor)


def break_all(run):
    for folder in (run / "trainer").glob("checkpoint-*"):
        (folder / "trainer_state.json").unlink()


@pytest.mark.filterwarnings("ignore:checkpoint:UserWarning")
@pytest.mark.parametrize(
    "damage",
    [
        lambda run: shutil.rmtree(run / "trainer"),
        lambda run: [shutil.rmtree(folder) for folder in (run / "trainer").glob("checkpoint-*")],
        break_all,
    ],
    ids=["no-trainer-folder", "no-checkpoint", "only-broken-ones"],
)
def test_nothing_to_resume_from(damage, stopped_run, trained, tmp_path):
    run = stopped_run
    damage(run)
    before = contents(tmp_path)
    assert_one_line(resume(run, trained), "there is no ")
    assert contents(tmp_path) == before


OTHER_SETTINGS = {
    "rank": ("--lora.r=4", "lora="),
    "interval": ("--scalora.interval=2", "scalora="),
    "method": ("--method=lora", "method='lora'"),
    "dtype": ("--dtype=bfloat16", "dtype='bfloat16'"),
    "data": ("--data.text=story", "data="),
}


@pytest.mark.parametrize("kind", OTHER_SETTINGS)
def test_resuming_with_another(kind, run, trained, tmp_path):
    word, named = OTHER_SETTINGS[kind]
    before = contents(tmp_path)
    result = resume(run, trained, word)
    assert_one_line(result, named)
    assert "resume with its own settings" in result.stderr
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_a_checkpoint_of_another_run(run, factored_run_checkpoint, trained, tmp_path):
    before = contents(tmp_path)
    assert_one_line(resume(run, trained, "--max_steps", 6), "use the same settings")
    assert contents(tmp_path) == before


@pytest.fixture
def factored_run_checkpoint(run, trained):
    shutil.rmtree(run / "trainer" / "checkpoint-4")
    shutil.copytree(trained / "factored" / "trainer" / "checkpoint-4", run / "trainer" / "checkpoint-4")


@pytest.mark.slow
def test_a_cut_last_line_of_metrics_is_dropped(stopped_run, trained):
    run = stopped_run
    metrics = run / "metrics.jsonl"
    whole = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= 2]
    metrics.write_bytes("\n".join([*whole, '{"step": 3, "lo']).encode() + b"\xe2\x82")
    shutil.rmtree(run / "trainer" / "checkpoint-4")
    result = resume(run, trained)
    assert result.exit_code == 0, result.stderr[-300:]
    after = metrics.read_text().splitlines()
    assert after[: len(whole)] == whole
    assert [json.loads(line)["step"] for line in after if "loss" in json.loads(line)] == [1, 2, 3, 4]


# --- data ---------------------------------------------------------------------------------------------------------


def rows_of(*rows):
    return lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def cut_parquet(path):
    import pandas

    pandas.DataFrame({"prompt": ["say:"] * 50, "completion": [" red"] * 50}).to_parquet(path)
    truncate(path, 0.5)


GOOD = {"prompt": "say:", "completion": " red"}

DATA = {
    "broken-line.jsonl": (lambda path: path.write_text(json.dumps(GOOD) + '\n{"prompt": "say:", \n'), "can't be read"),
    "binary.jsonl": (lambda path: path.write_bytes(bytes(range(256)) * 4), "can't be read as json"),
    "pickle.parquet": (lambda path: make_pickle(path, path.parent / "executed"), "can't be read as parquet"),
    "cut.parquet": (cut_parquet, "can't be read as parquet"),
    "header-only.csv": (lambda path: path.write_text("prompt,completion\n"), "no data"),
    "white-space.jsonl": (lambda path: path.write_text("\n\n"), "data"),
    "a-number.json": (lambda path: path.write_text("3"), "can't be read as json"),
    "no-file.jsonl": (lambda path: path.mkdir(), "does not exist"),
    "messages-a-text.jsonl": (rows_of({"messages": "hello"}, {"messages": "there"}), "messages"),
    "messages-without-roles.jsonl": (rows_of({"messages": [{"content": "hello"}]}), "messages"),
    "no-messages.jsonl": (rows_of({"messages": []}), "messages"),
    "prompt-a-number.jsonl": (rows_of({"prompt": 3, "completion": " red"}), "prompt"),
    "completion-missing-once.jsonl": (rows_of(GOOD, {"prompt": "say:", "completion": None}), "completion"),
    "prompt-and-completion-of-two-kinds.jsonl": (
        rows_of({"prompt": "say:", "completion": [{"role": "assistant", "content": "red"}]}),
        "completion",
    ),
    "text-a-list.jsonl": (rows_of({"text": ["red", "blue"]}), "text"),
}


@pytest.mark.parametrize("name", DATA)
def test_broken_training_data(name, run, trained, tmp_path):
    make, named = DATA[name]
    make(tmp_path / name)
    before = contents(tmp_path)
    words = ["train", trained / "dense.yaml", "--data.train", tmp_path / name, "--overwrite", "--output_dir", run]
    assert_one_line(command(*words), named)
    assert contents(tmp_path) == before


LABELS = {
    "label-missing-once": (
        ({"text": "red", "label": "a"}, {"text": "blue", "label": None}),
        "classification",
        "'label'",
    ),
    "label-a-list": (({"text": "red", "label": ["a"]}, {"text": "blue", "label": ["b"]}), "classification", "['a']"),
    "text-missing-once": (({"text": "red", "label": "a"}, {"text": None, "label": "b"}), "classification", "'text'"),
    "text-a-number": (({"text": 1, "label": "a"}, {"text": 2, "label": "b"}), "classification", "'text'"),
    "target-a-word": (({"text": "red", "label": "high"}, {"text": "blue", "label": "low"}), "regression", "'high'"),
    "target-missing-once": (({"text": "red", "label": 0.5}, {"text": "blue", "label": None}), "regression", "None"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_broken_labelled_data(kind, encoder_folder, write_jsonl, tmp_path):
    rows, task, named = LABELS[kind]
    data = write_jsonl("train.jsonl", rows)
    content = {
        "model": str(encoder_folder),
        "task": task,
        "output_dir": str(tmp_path / "run"),
        "data": {"train": str(data)},
        "training": {"max_steps": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    before = contents(tmp_path)
    assert_one_line(command("train", tmp_path / "config.yaml"), named)
    assert contents(tmp_path) == before
