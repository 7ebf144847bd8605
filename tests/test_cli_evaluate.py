"""`scalora evaluate`, through the command, against scores computed here from the model's own outputs."""

import json
import math

import pytest
import torch
import yaml
from conftest import WORDS
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from scalora.cli import app


def evaluate(model, data, tmp_path, **settings):
    """Run the command on a model; returns its scores."""
    config, output = tmp_path / "evaluate.yaml", tmp_path / "scores.json"
    config.write_text(
        yaml.safe_dump({"model": "unused", "data": {"eval": str(data), **settings.pop("data", {})}} | settings)
    )
    result = CliRunner().invoke(app, ["evaluate", str(model), str(config), "--output", str(output)])
    assert result.exit_code == 0, result.output
    return json.loads(output.read_text())


def loaded(folder, kind=AutoModelForCausalLM):
    return kind.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def log_likelihood(model, prompt, completion):
    """Of a completion's tokens after a prompt's, one token at a time."""
    total = 0.0
    for position, token in enumerate(completion):
        logits = model(input_ids=torch.tensor([prompt + completion[:position]])).logits[0, -1]
        total += logits.log_softmax(-1)[token].item()
    return total


def prompts(count):
    return [f"say: {WORDS[i % 10]} {WORDS[i % 7]}" for i in range(count)]


def test_loss_is_that_of_the_completions_tokens(causal_folder, write_jsonl, tmp_path):
    rows = [{"prompt": p, "completion": " " + " ".join(WORDS[: i + 1])} for i, p in enumerate(prompts(5))]
    model, tokenizer = loaded(causal_folder)
    total, tokens = 0.0, 0
    for row in rows:
        completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        total -= log_likelihood(model, tokenizer(row["prompt"])["input_ids"], completion)
        tokens += len(completion)
    scores = evaluate(causal_folder, write_jsonl("eval.jsonl", rows), tmp_path, evaluate={"batch_size": 2})
    assert scores["loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert scores["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)


@pytest.mark.parametrize("chat", [False, True])
def test_exact_match_counts_the_models_own_greedy_answers(chat, causal_folder, write_jsonl, tmp_path):
    model, tokenizer = loaded(causal_folder)
    rows = []
    for index, prompt in enumerate(prompts(8)):
        text = f"<|user|>{prompt}<eos><|assistant|>" if chat else prompt
        tokens = tokenizer(text)["input_ids"]
        answer = []
        for _ in range(6):
            with torch.no_grad():
                answer.append(int(model(input_ids=torch.tensor([tokens + answer])).logits[0, -1].argmax()))
            if answer[-1] == tokenizer.eos_token_id:
                break
        right = tokenizer.decode(answer, skip_special_tokens=True)
        completion = right if index % 4 else right + " no"
        rows.append(
            {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]}
            if chat
            else {"prompt": prompt, "completion": completion}
        )
    data = write_jsonl("eval.jsonl", rows)
    settings = {"metrics": ["exact_match"], "max_new_tokens": 6, "batch_size": 3}
    assert evaluate(causal_folder, data, tmp_path, evaluate=settings)["exact_match"] == 6 / 8
    limited = evaluate(causal_folder, data, tmp_path, evaluate=settings | {"limit": 4})
    assert (limited["exact_match"], limited["examples"]) == (3 / 4, 4)
    everything = settings | {"answer_pattern": "^"}
    assert evaluate(causal_folder, data, tmp_path, evaluate=everything)["exact_match"] == 1


@pytest.mark.parametrize("answer_as_text", [False, True])
def test_multiple_choice_takes_the_likeliest_option(answer_as_text, causal_folder, write_jsonl, tmp_path):
    model, tokenizer = loaded(causal_folder)
    rows = []
    for index, prompt in enumerate(prompts(6)):
        choices = [f" {word}" for word in WORDS[index : index + 4]]
        likelihoods = [log_likelihood(model, *(tokenizer(t)["input_ids"] for t in (prompt, c))) for c in choices]
        best = max(range(4), key=likelihoods.__getitem__)
        answer = best if index < 4 else (best + 1) % 4
        rows.append({"prompt": prompt, "choices": choices, "answer": choices[answer] if answer_as_text else answer})
    data = write_jsonl("eval.jsonl", rows)
    assert (
        evaluate(causal_folder, data, tmp_path, evaluate={"metrics": ["multiple_choice"]})["multiple_choice"] == 4 / 6
    )


def test_classification_and_regression_scores(encoder_folder, write_jsonl, tmp_path):
    texts = [f"{WORDS[i % 10]} {WORDS[i % 3]} {WORDS[i % 4]}" for i in range(20)]
    labels = [i * i % 3 % 2 for i in range(20)]
    data = write_jsonl("eval.jsonl", [{"text": t, "label": f"LABEL_{k}"} for t, k in zip(texts, labels, strict=True)])
    model, tokenizer = loaded(encoder_folder, AutoModelForSequenceClassification)
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    predicted = logits.argmax(-1).tolist()
    scores = evaluate(encoder_folder, data, tmp_path, task="classification")
    assert scores["accuracy"] == sum(p == k for p, k in zip(predicted, labels, strict=True)) / 20
    assert scores["f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert scores["matthews"] == pytest.approx(matthews_corrcoef(labels, predicted))
    assert scores["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item(), 1e-4)

    torch.manual_seed(0)
    regressor = type(model).from_pretrained(encoder_folder, num_labels=1, ignore_mismatched_sizes=True).eval()
    regressor.save_pretrained(tmp_path / "regressor")
    tokenizer.save_pretrained(tmp_path / "regressor")
    targets = [i % 5 / 4 for i in range(20)]
    data = write_jsonl("eval.jsonl", [{"text": t, "label": y} for t, y in zip(texts, targets, strict=True)])
    with torch.no_grad():
        outputs = torch.cat([regressor(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts])
    scores = evaluate(tmp_path / "regressor", data, tmp_path, task="regression")
    assert scores["mse"] == pytest.approx((outputs - torch.tensor(targets)).square().mean().item(), rel=1e-4)
    both = torch.stack([outputs, torch.tensor(targets)])
    assert scores["pearson"] == pytest.approx(torch.corrcoef(both)[0, 1].item(), rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_a_run_folder_is_scored_as_the_model_in_it(causal_folder, write_jsonl, tmp_path):
    rows = [{"prompt": p, "completion": " red"} for p in prompts(16)]
    data = write_jsonl("data.jsonl", rows)
    config = tmp_path / "train.yaml"
    training = {"max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    config.write_text(
        yaml.safe_dump(
            {
                "model": str(causal_folder),
                "output_dir": str(tmp_path / "run"),
                "data": {"train": str(data), "eval": str(data)},
                "training": training,
            }
        )
    )
    assert CliRunner().invoke(app, ["train", str(config)]).exit_code == 0
    before = evaluate(causal_folder, data, tmp_path)
    run, model = (evaluate(folder, data, tmp_path) for folder in (tmp_path / "run", tmp_path / "run" / "model"))
    assert run == model
    assert run["weights"] != before["weights"]
    assert run["loss"] < before["loss"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert run["loss"] == pytest.approx(summary["eval_loss"], rel=1e-3)


@pytest.mark.slow
def test_checkpoints_that_hold_a_part_of_the_update_are_refused(causal_folder, write_jsonl, tmp_path):
    """Those of LoRA hold all of it; ReLoRA's leave out what has been merged, LoRA-GA's what its start took away."""
    data = write_jsonl("data.jsonl", [{"prompt": p, "completion": " " + p} for p in prompts(8)])
    for method, wrong in {"lora": False, "relora": True, "lora_ga": True}.items():
        run, config = tmp_path / method, tmp_path / f"{method}.yaml"
        training = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "use_cpu": True}
        content = {
            "model": str(causal_folder), "method": method, "data": {"train": str(data), "eval": str(data)},
            "output_dir": str(run), "training": training,
        }  # fmt: skip
        config.write_text(yaml.safe_dump(content))
        result = CliRunner().invoke(app, ["train", str(config)])
        assert result.exit_code == 0, result.output
        checkpoint = run / "trainer" / "checkpoint-2"
        if wrong:
            result = CliRunner().invoke(app, ["evaluate", str(checkpoint), str(config)])
            assert result.exit_code == 2
            assert f"is a checkpoint of '{method}' without the total update: score the finished run" in result.stderr
        else:
            assert evaluate(checkpoint, data, tmp_path)["loss"] == pytest.approx(evaluate(run, data, tmp_path)["loss"])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"evaluate": {"metrics": ["multiple_choice"]}}, "no column 'choices'"),
        ({"evaluate": {"metrics": ["bleu"]}}, "evaluate.metrics=['bleu']: write one of: loss | exact_match"),
        ({"evaluate": {"metrics": []}}, "evaluate.metrics=[]: "),
        (
            {"evaluate": {"answer_pattern": "(red"}},
            "evaluate.answer_pattern='(red': not a regular expression: missing )",
        ),
        ({"data": {}}, "data.eval is missing"),
        ({"task": "classification"}, "no head for classification"),
    ],
)
def test_bad_input_is_one_line(settings, named, causal_folder, write_jsonl, tmp_path):
    data = write_jsonl("eval.jsonl", [{"prompt": "say: red", "completion": " red", "text": "red", "label": "LABEL_0"}])
    config = tmp_path / "evaluate.yaml"
    config.write_text(yaml.safe_dump({"model": "unused", "data": {"eval": str(data)}} | settings))
    result = CliRunner().invoke(app, ["evaluate", str(causal_folder), str(config)])
    assert result.exit_code == 2
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert named in error[0]
