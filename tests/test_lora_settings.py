"""Settings under ``lora:`` that name or match nothing in the model are refused before training, with what was meant."""

import json

import pytest
import yaml
from conftest import pairs
from typer.testing import CliRunner

from scalora.cli import app


@pytest.fixture
def dry_run(causal_folder, write_jsonl, tmp_path):
    def run(*words):
        content = {
            "model": str(causal_folder),
            "output_dir": str(tmp_path / "run"),
            "data": {"train": str(write_jsonl("train.jsonl", pairs(4)))},
            "training": {"max_steps": 1},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        result = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--dry-run", *words])
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert not (tmp_path / "run").exists()
        return result.exit_code, "".join(errors)

    return run


REFUSED = {
    "target_modules=[q_proj, v_prj]": "lora.target_modules: the model has no module 'v_prj'; did you mean 'v_proj'?",
    "target_modules=q_proj": "a text is a regular expression for whole names, and it matches none; write a list",
    "target_modules=(q_proj": "not a regular expression",
    "exclude_modules=[lm_hed]": "lora.exclude_modules: the model has no module 'lm_hed'; did you mean 'lm_head'?",
    "exclude_modules=.*nothing": "lora.exclude_modules='.*nothing'",
    "modules_to_save=[lm_head, nom]": "lora.modules_to_save: the model has no module 'nom'",
    "modules_to_save=norm": "'norm' would take in 'model.layers.0.input_layernorm' too; write the whole name, such "
    "as 'model.norm'",
    "target_parameters=[q_proj.wight]": "lora.target_parameters: the model has no parameter 'q_proj.wight'",
    "rank_pattern={q_prj: 4}": "lora.rank_pattern: 'q_prj' matches no adapted module; did you mean 'q_proj'?",
    "alpha_pattern={'layers.5.*': 4}": "lora.alpha_pattern: 'layers.5.*' matches no adapted module",
    "rank_pattern={'(q_proj': 4}": "not a regular expression",
    "lora_bias=true": "lora.lora_bias=True: module 'model.layers.0.self_attn.q_proj' has no bias",
    "trainable_token_indices=[5, 100000]": "lora.trainable_token_indices: there is no token 100000",
    "trainable_token_indices={embed: [1]}": "lora.trainable_token_indices: the model has no module 'embed'",
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_names_or_matches_nothing(word, dry_run):
    code, error = dry_run(f"--lora.{word}")
    assert code == 2
    assert REFUSED[word] in error


def test_a_layer_that_is_not_there(dry_run):
    targets = "--lora.target_modules=[q_proj]"
    code, error = dry_run(targets, "--lora.layers_to_transform=[0, 2]", "--method", "lora")
    assert code == 2
    assert error.endswith("lora.layers_to_transform=[0, 2]: there is no layer 2 with adapted modules")
    assert dry_run(targets, "--lora.layers_to_transform=1") == (0, "")


def test_what_matches_is_taken(dry_run):
    words = {
        "target_modules": r".*\.(q|v)_proj",
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 4, "v_proj": 2},
        "alpha_pattern": {"q_proj": 2},
        "modules_to_save": "lm_head",
        "exclude_modules": [r"model.layers.0.self_attn.q_proj"],
    }
    given = [f"--lora.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in words.items()]
    assert dry_run(*given, "--method", "lora") == (0, "")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--method=loraplus", "--optim=sgd"], "training.optim='sgd': the method 'loraplus' brings an optimizer"),
        (["--method=lora", "--optim=adamw_torch", "--optim_args=x"], "training.optim='adamw_torch': "),
        (["--method=lora", "--lr_scheduler_type=cosine_with_min_lr"], "lr_scheduler_type='cosine_with_min_lr'"),
        (["--lr_scheduler_kwargs={num_cycls: 1}", "--lr_scheduler_type=cosine"], "lr_scheduler_kwargs={'num_cycls'"),
    ],
)
def test_an_optimizer_or_schedule_that_could_not_be_built(words, named, dry_run):
    code, error = dry_run(*words)
    assert code == 2
    assert named in error
