"""What `--dry-run` says that runs need before anything is downloaded, and how they stop where it is not there."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from models import tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from scalora.bench import hub as hub_module
from scalora.bench import machine as machine_module
from scalora.bench import needs as needs_module
from scalora.bench.hub import Hub
from scalora.bench.machine import Machine, missing
from scalora.bench.needs import Job, Needs, needs_of
from scalora.cli import app, needs_output
from scalora.runs.settings import checked_settings

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 1000,
}
GB = 10**9
TODAY = Path(__file__).parents[1] / "recipes" / "today"


def scalora(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def one_line(result):
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def settings(**changes):
    training = {"max_steps": 100, "per_device_train_batch_size": 4, "max_length": 32} | changes.pop("training", {})
    needs = {"model": SHAPE, "tokens": 20} | changes.pop("needs", {})
    content = {"model": "some/model", "data": {"train": "a/b"}, "training": training, "needs": needs}
    return checked_settings(content | changes)


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """A hub that answers what a test wants; by default nothing, as without a network."""
    answers = {}
    monkeypatch.setattr(needs_module, "ask", lambda model: answers.get(model, Hub()))
    return answers


@pytest.fixture
def there(monkeypatch):
    """A machine that has everything but what a test takes away."""
    having = Machine("Big", 80 * GB, 1, Path("/cache"), 900 * GB, Path("/out"), 900 * GB, True)

    def have(**changes):
        monkeypatch.setattr(needs_output, "machine", lambda output: having._replace(**changes))

    have()
    return have


def test_memory_without_activations_is_that_of_weights_gradients_and_adams_moments():
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    weights = sum(p.numel() for p in base.parameters())
    full = needs_of([Job("full", settings(method="full", training={"per_device_train_batch_size": 1}))])
    larger = needs_of([Job("full", settings(method="full", training={"per_device_train_batch_size": 3}))])
    activations = (larger.gpu - full.gpu) / 2
    # TRL recomputes activations, so that one layer's, each layer's input and the logits are kept.
    tokens = 32
    by_hand = tokens * (4 * 64 * 2 + 2 * (9 * 64 + 4 * 160) + 10 * 1000)
    assert activations == by_hand
    assert full.gpu == 4 * 4 * weights + by_hand
    lora = needs_of([Job("lora", settings(method="lora", lora={"r": 2, "target_modules": ["q_proj"]}))])
    trained = 2 * 2 * (64 + 64)
    assert lora.gpu == 4 * (weights + 4 * trained) + 4 * by_hand
    assert lora.models["some/model"].startswith(f"{weights / 1e6:.0f} million")
    assert needs_of([Job("scalora", settings())]).gpu > needs_of([Job("lora", settings(method="lora"))]).gpu
    assert needs_of([Job("cpu", settings(training={"use_cpu": True}))]).gpu == 0
    sharded = {"fsdp": True, "fsdp_config": {"fsdp_version": 2}}
    assert needs_of([Job("fsdp", settings(training=sharded))]).gpu == 0


def test_hours_grow_with_steps_examples_and_runs():
    one = needs_of([Job("a", settings())]).hours
    assert needs_of([Job("a", settings(), 5)]).hours == pytest.approx(5 * one)
    epochs = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2}
    # 2 epochs of 50 steps of 4 · 2 examples; a step is two passes.
    by_examples = needs_of([Job("a", settings(training=epochs, needs={"examples": 400}))]).hours
    assert by_examples == pytest.approx(2 * one, rel=0.01)
    assert needs_of([Job("a", settings(training=epochs))]).hours is None


def test_the_results_that_stay_and_those_that_go():
    weights = 4 * sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**SHAPE)).parameters())
    trained = 4 * 2 * 2 * 128
    small = {"method": "lora", "lora": {"r": 2, "target_modules": ["q_proj"]}}
    assert needs_of([Job("a", settings(**small), 3)]).kept == 3 * (weights + trained)
    assert needs_of([Job("a", settings(**small, save_model=False), 3)]).kept == 0
    scored = needs_of([Job("a", settings(**small), 3, [settings(**small)], 3)])
    assert (scored.kept, scored.passing) == (0, weights + trained)
    every = {"save_strategy": "steps", "save_steps": 30}
    assert needs_of([Job("a", settings(**small, training=every))]).kept == weights + trained + 4 * 3 * trained
    limited = every | {"save_total_limit": 2}
    assert needs_of([Job("a", settings(**small, training=limited))]).kept == weights + trained + 2 * 3 * trained


def test_the_hub_is_believed_before_the_recipe(hub):
    hub["some/model"] = Hub(SHAPE | {"num_hidden_layers": 4}, size=7 * GB, gated=True)
    asked, stated = needs_of([Job("a", settings())]), None
    hub.clear()
    stated = needs_of([Job("a", settings())])
    assert asked.gpu > stated.gpu
    assert (asked.gated, stated.gated) == (["some/model"], [])
    assert asked.downloads == 7 * GB
    assert "(by the hub's config)" in asked.models["some/model"]
    assert "(by the recipe's figures)" in stated.models["some/model"]
    # A gated model's config can't be read without a token: then the recipe's figures serve again.
    hub["some/model"] = Hub(None, size=7 * GB, gated=True)
    assert needs_of([Job("a", settings())]).gpu == stated.gpu
    unknown = needs_of([Job("a", settings(needs={"model": {}, "gated": True}))])
    assert (unknown.unknown, unknown.gpu, unknown.hours) == (["some/model"], 0, None)


def test_a_model_that_is_downloaded_needs_no_token(tmp_path, monkeypatch, hub):
    hub["some/model"] = Hub(SHAPE, size=1000, gated=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    half, all_of_it = (tmp_path / "models--some--model" / "blobs" / name for name in ("a", "b"))
    half.parent.mkdir(parents=True)
    half.write_bytes(b"." * 400)
    begun = needs_of([Job("a", settings())])
    assert (begun.downloads, begun.gated) == (600, ["some/model"])
    all_of_it.write_bytes(b"." * 600)
    done = needs_of([Job("a", settings())])
    assert (done.downloads, done.gated) == (0, [])


def test_what_the_hub_says_of_a_model(tmp_path, monkeypatch):
    files = {
        "model-1.safetensors": 600,
        "model-2.safetensors": 400,
        "original/x.safetensors": 9,
        "pytorch_model.bin": 7,
        "a.txt": 5,
    }
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    monkeypatch.setattr(hub_module, "model_info", lambda *_, **__: SimpleNamespace(siblings=siblings, gated="manual"))
    monkeypatch.setattr(hub_module, "hf_hub_download", lambda *_, **__: str(tmp_path / "config.json"))
    hub_module.ask.cache_clear()
    assert hub_module.ask("x/y") == Hub(SHAPE, 1000, True)

    def refuse(*_, **__):
        raise OSError("401")

    monkeypatch.setattr(hub_module, "hf_hub_download", refuse)
    hub_module.ask.cache_clear()
    assert hub_module.ask("x/y") == Hub(None, 1000, True)
    monkeypatch.setattr(hub_module, "model_info", refuse)
    hub_module.ask.cache_clear()
    assert hub_module.ask("x/y") == Hub()
    hub_module.ask.cache_clear()


def test_a_model_that_is_here_needs_no_download_and_no_token(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    local = needs_of([Job("a", settings(model=str(tmp_path), needs={"gated": True}))])
    assert (local.gated, local.downloads) == ([], 0)
    assert "(by its folder)" in local.models[str(tmp_path)]


LACKS = {
    "gpu": ({"gpu": None, "memory": 0}, "a GPU with 60 GB: torch sees none"),
    "memory": ({"memory": 24 * GB}, "a GPU with 60 GB for full on QNLI: Big has 24 GB (set training.per_device"),
    "downloads": ({"cache_free": 3 * GB}, "20 GB for models and data in '/cache': 3 GB are free"),
    "token": ({"token": False}, "a token of the hub for x/gated: accept the licence"),
}


@pytest.mark.parametrize("lack", LACKS)
def test_what_is_missing_is_said_with_what_to_do(lack, monkeypatch):
    monkeypatch.setattr(machine_module, "_device", str)  # the folders are on disks of their own
    needs = Needs(gpu=60 * GB, hungriest="full on QNLI", downloads=20 * GB, kept=5 * GB, gated=["x/gated"])
    having = Machine("Big", 80 * GB, 1, Path("/cache"), 900 * GB, Path("/out"), 900 * GB, True)
    changes, words = LACKS[lack]
    assert missing(needs, having) == []
    (found,) = missing(needs, having._replace(**changes))
    assert words in found


def test_results_of_each_gpu_and_downloads_share_a_disk(monkeypatch):
    needs = Needs(downloads=20 * GB, kept=5 * GB, passing=10 * GB)
    having = Machine("Big", 80 * GB, 2, Path("/cache"), 40 * GB, Path("/out"), 40 * GB, True)
    monkeypatch.setattr(machine_module, "_device", lambda folder: 1)
    (found,) = missing(needs, having)
    assert "45 GB for models and data" in found
    monkeypatch.setattr(machine_module, "_device", str)
    assert missing(needs, having) == []


def test_packages_that_are_not_installed():
    having = Machine(None, 0, 0, Path("/cache"), GB, Path("/out"), GB, False)
    assert missing(Needs(packages=["torch", "no-such-package"]), having) == ["packages: pip install no-such-package"]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("glue", ["--only", "RTE,lora,scalora", "--run.needs.packages", "[]"]),
        ("commonsense", ["--only", "LLaMA3-8B,lora,scalora"]),
        ("math", ["--only", "Gemma-3-12B,lora,scalora"]),
    ],
)
def test_a_table_says_what_it_needs(table, words, there, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = scalora("reproduce", table, *words, "--dry-run")
    assert plan.exit_code == 0, plan.stderr
    assert "nothing but a model's config is downloaded, nothing trained or written" in plan.stdout
    for label in ("model", "GPU memory", "downloads", "results", "time"):
        assert f"\n{label} " in plan.stdout
    assert ("\ngated" in plan.stdout) == (table != "glue")
    assert "for 12 runs" in plan.stdout  # 2 methods · (3 rates + 3 seeds)
    there(gpu=None, memory=0, token=False)
    for dry in (["--dry-run"], []):  # the runs themselves stop at the same place
        stopped = scalora("reproduce", table, *words, *dry)
        assert stopped.exit_code == 2
        line = one_line(stopped)
        assert "torch sees none" in line
        assert ("token of the hub" in line) == (table != "glue")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", sorted(TODAY.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_short_recipe_says_what_it_needs(recipe, there):
    there(gpu=None, memory=0)
    result = scalora("train", recipe, "--dry-run")
    for label in ("model", "GPU memory", "downloads", "results", "time"):
        assert f"{label} " in result.stdout
    assert "unknown" not in result.stdout
    assert ("gated" in result.stdout) == (recipe.stem in ("gemma3", "llama3.2"))
    assert result.exit_code == 2
    assert "torch sees none" in one_line(result)


def test_a_run_without_needs_is_not_checked(there, tmp_path):
    there(gpu=None, memory=0, cache_free=0)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"model": "some/model", "data": {"train": "absent.jsonl"}}))
    assert "absent.jsonl" in one_line(scalora("train", config))


def test_a_run_that_is_resumed_may_know_its_needs_better():
    first, then = settings(), settings(needs={"examples": 7, "gated": True})
    assert json.loads(then.model_dump_json())["needs"]["examples"] == 7
    from scalora.runs.resume import settings_changes

    assert set(settings_changes(first, then)) == {"needs"}
    assert math.isfinite(needs_of([Job("a", then)]).hours)
