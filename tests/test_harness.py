"""`scalora evaluate --harness`, against lm_eval's own loading of the same models and against our own scorer."""

import copy
import functools
import json
import os
import sys
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
import yaml
from conftest import WORDS
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from models import tiny_llama, trainable
from peft import LoraConfig, get_peft_model
from serving.agreement import (
    NEW_TOKENS,
    PATTERN,
    TASKS,
    completion_tokens,
    of_harness,
    own_config,
    with_choices,
    write_tasks,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from scalora import ScaLora, ScaLoraConfig
from scalora.cli import app
from scalora.runs.harness_settings import harness_settings

TOKENS = torch.randint(5, 60, (6, 12), generator=torch.Generator().manual_seed(0))


def command(*words):
    return CliRunner().invoke(app, ["evaluate", *(str(word) for word in words)])


def likelihoods(samples):
    rows = sorted(samples, key=lambda row: row["doc_id"])
    return [float(answer[0][0]) for row in rows for answer in row["resps"]]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def harness_of_own_tasks():
    """The harness without its index of its own 14,000 tasks, which takes seconds to read."""
    real = lm_eval.tasks.TaskManager
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.tasks, "TaskManager", functools.partial(real, include_defaults=False))
        yield


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    """A random model with positions enough for all that it says."""
    folder = tmp_path_factory.mktemp("model")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "initializer_range": 0.2}
    tiny_llama(**sizes, **ends).save_pretrained(folder)
    longer = copy.deepcopy(tokenizer)
    longer.model_max_length = 256
    longer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, model_folder):
    """The folder of the three tasks, with examples some of which the model gets right."""
    folder = tmp_path_factory.mktemp("tasks")
    model, tokenizer = (kind.from_pretrained(model_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    examples = []
    for index in range(8):
        prompt = f"say: {WORDS[index % 10]} {WORDS[index % 7]}"
        given = tokenizer(prompt, return_tensors="pt")
        answer = tokenizer.decode(
            model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)[0, given["input_ids"].shape[1] :],
            skip_special_tokens=True,
        )
        completion = answer if index % 3 else " red"
        choices = [f" {word}" for word in WORDS[index % 5 : index % 5 + 3]]
        examples.append(
            {"prompt": prompt, "completion": completion, "choices": choices, "answer": index % 3}
            | {"ended": completion + tokenizer.eos_token}
        )
    write_tasks(examples, folder)
    return folder


@pytest.fixture(scope="module")
def forms(model_folder, tmp_path_factory):
    """One trained model as a state, as an ordinary adapter on the base that it names, and merged."""
    folder = tmp_path_factory.mktemp("forms")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-2)
    ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=2, merge="dense"))
    for _ in range(4):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "state")
    for to in ("adapter", "merged"):
        words = ["export", folder / "state", "--to", to, "--output", folder / to]
        if to == "adapter":
            words += ["--rtol", "1e-6"]
        made = CliRunner().invoke(app, [*map(str, words)])
        assert made.exit_code == 0, made.output
    return folder


def scored(model, tasks, output, *settings, names=TASKS):
    """Run the command on some tasks; returns its results and its outputs by task."""
    words = [f"tasks={','.join(names)}", f"include_path={tasks}", "bootstrap_iters=0", *settings]
    result = command(model, *(part for word in words for part in ("--harness", word)), "--output", output)
    assert result.exit_code == 0, result.output
    found = json.loads((output / "results.json").read_text())
    return found, {name: lines(output / f"samples_{name}.jsonl") for name in names}


@pytest.mark.usefixtures("harness_of_own_tasks")
def test_the_harness_and_our_own_scorer_agree_on_every_example(model_folder, tasks, tmp_path):
    found, samples = scored(model_folder, tasks, tmp_path / "harness", "batch_size=3")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own_config(tasks / "examples.jsonl")))
    result = command(model_folder, tmp_path / "own.yaml", "--output", tmp_path / "own")
    assert result.exit_code == 0, result.output
    own = json.loads((tmp_path / "own" / "results.json").read_text())
    examples = lines(tasks / "examples.jsonl")
    tokens = completion_tokens(AutoTokenizer.from_pretrained(model_folder), examples)
    scores, each = of_harness(found["results"], samples, tokens)
    assert 0 < scores["exact_match"] < 1
    assert 0 < scores["acc"] < 1
    assert {name: own[name] for name in ("exact_match", "acc", "acc_norm")} == {
        name: scores[name] for name in ("exact_match", "acc", "acc_norm")
    }
    assert own["loss"] == pytest.approx(scores["loss"], rel=1e-4)
    kept = lines(tmp_path / "own" / "samples_multiple_choice.jsonl")
    assert [value for row in kept for value in row["log_likelihoods"]] == pytest.approx(each, abs=1e-4)
    ours = {row["prompt"]: row for row in lines(tmp_path / "own" / "samples_exact_match.jsonl")}
    for row in samples["agreement_answers"]:
        assert ours[row["doc"]["prompt"]]["answer"] == row["resps"][0][0]
        assert ours[row["doc"]["prompt"]]["right"] == bool(row["exact_match"])
    assert own["weights"] == found["weights"]
    assert str(model_folder) in own["weights"]
    assert not list((tmp_path / "own").glob("unfinished*"))
    assert not list((tmp_path / "harness").glob("unfinished*"))


@pytest.mark.usefixtures("harness_of_own_tasks")
def test_states_adapters_and_merged_models_are_scored_as_the_harness_loads_them(forms, model_folder, tasks, tmp_path):
    names = ["agreement_choices"]
    by_form, weights = {}, set()
    for form in ("state", "adapter", "merged"):
        found, samples = scored(forms / form, tasks, tmp_path / form, names=names)
        by_form[form] = likelihoods(samples["agreement_choices"])
        weights.add(found["weights"])
        assert str(forms / form) in found["weights"]
    assert len(weights) == 3
    for arguments in (
        {"pretrained": str(model_folder), "peft": str(forms / "adapter")},
        {"pretrained": str(forms / "merged")},
    ):
        theirs = simple_evaluate(
            "hf",
            arguments | {"dtype": "float32", "device": "cpu"},
            names,
            task_manager=lm_eval.tasks.TaskManager(include_path=tasks),
            bootstrap_iters=0,
        )
        expected = likelihoods(theirs["samples"]["agreement_choices"])
        for form, values in by_form.items():
            assert values == pytest.approx(expected, abs=2e-3), form
    _, samples = scored(model_folder, tasks, tmp_path / "base", names=names)
    base = likelihoods(samples["agreement_choices"])
    assert max(abs(a - b) for a, b in zip(base, by_form["state"], strict=True)) > 0.1


@pytest.mark.usefixtures("harness_of_own_tasks")
def test_a_killed_evaluation_goes_on_and_other_weights_begin_anew(model_folder, forms, tasks, tmp_path, monkeypatch):
    names, output = ["agreement_choices"], tmp_path / "killed"
    calls = []
    real = HFLM._model_call

    def counting(self, inputs, **options):
        calls.append(len(inputs))
        return real(self, inputs, **options)

    def dying(self, inputs, **options):
        if len(calls) == 3:
            os._exit(9)  # as SIGKILL would: nothing is cleaned up
        return counting(self, inputs, **options)

    def computed(model, folder):
        calls.clear()
        monkeypatch.setattr(HFLM, "_model_call", counting)
        found, samples = scored(model, tasks, folder, "batch_size=2", names=names)
        return sum(calls), found["results"], likelihoods(samples["agreement_choices"])

    def killed():
        calls.clear()
        child = os.fork()
        if not child:
            monkeypatch.setattr(HFLM, "_model_call", dying)
            scored(model_folder, tasks, output, "batch_size=2", names=names)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert list(output.glob("unfinished-*.db"))
        assert not (output / "results.json").exists()

    contexts, results, values = computed(model_folder, tmp_path / "whole")
    killed()
    rest, same_results, same_values = computed(model_folder, output)
    assert contexts - 6 <= rest < contexts  # the last answers may not have come to the disk
    assert same_results == results
    assert same_values == pytest.approx(values, abs=1e-4)
    assert not list(output.glob("unfinished-*.db"))
    (output / "results.json").unlink()
    killed()
    assert computed(forms / "merged", output)[0] == contexts  # nothing of the other weights' answers


@pytest.mark.usefixtures("harness_of_own_tasks")
def test_names_and_settings_that_are_wrong_are_said_in_one_line(model_folder, tasks, tmp_path, monkeypatch):
    def refused(*words, model=model_folder):
        result = command(model, *words)
        assert result.exit_code == 2, result.output
        assert result.stderr.count("\n") == 1
        return result.stderr

    assert "unknown setting 'num_fewshots': did you mean 'num_fewshot'?" in refused("--harness", "num_fewshots=2")
    assert "unknown setting 'use_cache'" in refused("--harness", "use_cache=x")  # the command keeps answers itself
    assert "tasks is missing" in refused("--harness", "num_fewshot=2")
    assert "'arc_easy': give a setting and its value" in refused("--harness", "arc_easy")
    assert "it is given twice" in refused("--harness", "tasks=a", "--harness", "tasks=b")
    assert "num_fewshot='two'" in refused("--harness", "tasks=a", "--harness", "num_fewshot=two")
    assert "batch_size=0" in refused("--harness", "tasks=a", "--harness", "batch_size=0")
    assert "unknown key 'dtyp'" in refused("--dtyp", "float32", "--harness", "tasks=a")
    assert "CONFIG is missing" in refused("--dtype", "float32")
    (tmp_path / "results.json").write_text('{"mine": 1}')
    assert "has not written" in refused("--harness", "tasks=arc_easy", "--output", tmp_path)
    near = refused("--harness", "tasks=agreement_choice", "--harness", f"include_path={tasks}")
    assert "there is no task 'agreement_choice': did you mean 'agreement_choices'?" in near
    with monkeypatch.context() as patch:
        patch.setattr("scalora.runs.harness.process_count", lambda: 2)
        assert "--harness runs in one process" in refused("--harness", "tasks=a")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'scalora[harness]'" in refused("--harness", "tasks=a")


def test_settings_reach_the_harness_as_they_are_written():
    words = ["tasks=a, b", "limit=0.5", "apply_chat_template=true", "gen_kwargs=temperature=0,top_p=1", "num_fewshot=0"]
    read = harness_settings(words)
    assert read.task_names == ["a", "b"]
    given = read.given(frozenset(type(read).model_fields) - {"tasks"})
    assert given == {
        "limit": 0.5,
        "apply_chat_template": True,
        "gen_kwargs": "temperature=0,top_p=1",
        "num_fewshot": 0,
    }


@pytest.mark.usefixtures("harness_of_own_tasks")
def test_a_model_is_loaded_in_its_own_dtype_unless_told_otherwise(model_folder, tasks, tmp_path):
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(half)
    words = ["--harness", f"tasks={tasks / 'agreement_choices.yaml'}", "--harness", "limit=1"]
    words += ["--harness", "bootstrap_iters=0"]
    for override, dtype in (((), "bfloat16"), (("--dtype", "float32"), "float32")):
        output = tmp_path / dtype
        result = command(half, *override, *words, "--output", output)
        assert result.exit_code == 0, result.output
        assert json.loads((output / "results.json").read_text())["config"]["model_dtype"] == f"torch.{dtype}"
        assert len(lines(output / "samples_agreement_choices.jsonl")) == 1


def test_the_choices_are_orders_of_the_words_with_the_right_one_at_changing_places():
    rows = [{"prompt": "p", "completion": f"\n{words}"} for words in ("c, a, b", "b, a", "d, b, c, a")]
    examples = with_choices(rows, "<eos>")
    assert [row["choices"][row["answer"]] for row in examples] == ["\nc, a, b", "\nb, a", "\nd, b, c, a"]
    assert [row["answer"] for row in examples] == [0, 1, 2]
    assert examples[1]["choices"] == ["\na, b", "\nb, a"]
    assert len(examples[2]["choices"]) == len(set(examples[2]["choices"])) == 4
    assert examples[0]["ended"] == "\nc, a, b<eos>"


def test_the_pattern_is_that_of_the_demo():
    demo = Path(__file__).parents[1] / "recipes" / "demo" / "demo.yaml"
    evaluate = yaml.safe_load(demo.read_text())["evaluate"]
    assert (evaluate["answer_pattern"], evaluate["max_new_tokens"]) == (PATTERN, NEW_TOKENS)
