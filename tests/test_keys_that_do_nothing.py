"""Keys of a config, options and files that would do nothing, or something else than they say: one line, before work."""

import json
import re

import pytest
import yaml
from conftest import WORDS, pairs
from test_trl_tasks import refused, scalora, write_config
from transformers import TrainerControl, TrainerState, TrainingArguments

from scalora.runs.errors import InputError
from scalora.runs.progress import TrainingProgress
from scalora.runs.run_folder import check_output, check_place
from scalora.runs.settings import load_settings

UNUSED = {
    "training: {save_steps: 5}": "training.save_steps=5 does nothing with save_strategy 'no'",
    "training: {save_steps: 5, save_strategy: epoch}": "training.save_steps=5 does nothing with save_strategy 'epoch'",
    "training: {eval_steps: 5}": "training.eval_steps=5 does nothing with eval_strategy 'epoch'",
    "training: {load_best_model_at_end: true}": "training.load_best_model_at_end=True does nothing without data.eval",
    "head_learning_rate: 1e-3": "head_learning_rate is for tasks with a new head, and does nothing for 'sft'",
    "data: {label: good}": "data.label is for tasks with labels, and does nothing for 'sft'",
    "data: {text_pair: b}": "data.text_pair is for tasks with labels",
    "data: {similar_labels: merge}": "data.similar_labels is for tasks with labels",
    "task: kto\ndata: {label: good}": "data.label is for tasks with labels, and does nothing for 'kto'",
    "task: regression\nevaluate: {metrics: [exact_match]}": "evaluate.metrics is for task sft",
}


@pytest.mark.parametrize(("config", "message"), UNUSED.items(), ids=UNUSED)
def test_a_key_that_does_nothing_is_named(config, message, tmp_path):
    with pytest.warns(UserWarning, match=re.escape(message)) as warned:
        load_settings_of(tmp_path, f"model: base\n{config}\n")
    assert len(warned) == 1


REFUSED = {
    "training: {dataset_text_field: content}": "training.dataset_text_field='content': leave it out, and set data.text",
    "task: grpo\nmethod: lora_ga": "method 'lora_ga' starts from the gradient of training batches",
    "task: grpo\nmethod_options: {start: oracle}": "method_options.start='oracle': it is of the gradient",
}


@pytest.mark.parametrize(("config", "message"), REFUSED.items(), ids=REFUSED)
def test_what_would_end_in_an_error_later_is_refused(config, message, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        load_settings_of(tmp_path, f"model: base\n{config}\n")


@pytest.mark.filterwarnings("error")
def test_a_config_with_all_values_written_out_is_taken(tmp_path):
    """As a run keeps it."""
    content = load_settings_of(tmp_path, "model: base").model_dump()
    assert load_settings_of(tmp_path, yaml.safe_dump(content)).model_dump() == content


def load_settings_of(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    return load_settings(tmp_path / "run.yaml")


@pytest.mark.parametrize("kind", ["messages", "text"])
def test_a_loss_of_completions_needs_completions(kind, causal_folder, write_jsonl, tmp_path):
    messages = [{"role": "user", "content": "say"}, {"role": "assistant", "content": WORDS[0]}]
    rows = [{"messages": messages} if kind == "messages" else {"text": f"say {WORDS[0]}"}] * 4
    config = write_config(
        tmp_path, "sft", causal_folder, write_jsonl("train.jsonl", rows), training={"completion_only_loss": True}
    )
    assert "the examples of data.train have no completion" in refused("train", config, "--dry-run")


def test_a_run_is_not_both_resumed_and_overwritten(causal_folder, write_jsonl, tmp_path):
    config = write_config(tmp_path, "sft", causal_folder, write_jsonl("train.jsonl", pairs(4)))
    assert "--overwrite trains anew" in refused("train", config, "--overwrite", "--resume")


def test_where_nothing_can_be_written_is_known_before_the_work(causal_folder, tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        check_output(tmp_path, "--output", {"step"})
    with pytest.raises(InputError, match="there is no folder"):
        check_place(tmp_path / "a" / "b.json", "--output")
    check_place(tmp_path / "new.json", "--output")
    assert "there is no folder" in refused("estimate", causal_folder, "--json", tmp_path / "a" / "b.json")


def test_rewards_that_are_none_are_not_printed(tmp_path, capsys):
    progress = TrainingProgress()
    state = TrainerState(global_step=1, max_steps=2, is_world_process_zero=True)
    arguments = TrainingArguments(str(tmp_path), report_to="none")
    with progress:
        progress.on_log(arguments, state, TrainerControl(), logs={"loss": 0.5, "reward": None})
    assert "0.5" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("eval_file", ["gone", "changed"])
def test_a_run_is_exported_without_the_data_that_it_was_evaluated_on(eval_file, causal_folder, write_jsonl, tmp_path):
    data = write_jsonl("eval.jsonl", pairs(4))
    train = write_jsonl("train.jsonl", pairs(12))
    config = write_config(tmp_path, "sft", causal_folder, train, data={"eval": str(data)})
    scalora("train", config)
    words = ["export", tmp_path / "run", "--to", "adapter", "--output", tmp_path / "adapter"]
    if eval_file == "gone":
        data.unlink()
        assert "does not exist; --skip-loss exports without comparing the loss" in refused(*words)
        scalora(*words, "--skip-loss")
    else:
        write_jsonl("eval.jsonl", pairs(3))
        assert "the export's loss is not compared with the run's: data.eval" in scalora(*words)
    report = json.loads((tmp_path / "adapter" / "export.json").read_text())
    assert not any("eval" in key for key in report)


@pytest.mark.slow
def test_the_report_of_a_longer_run_does_not_show_layers_of_the_shorter(causal_folder, write_jsonl, tmp_path):
    pytest.importorskip("matplotlib")
    train = write_jsonl("train.jsonl", pairs(12))
    more = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    config = write_config(tmp_path, "sft", causal_folder, train, training=more)
    scalora("train", config)
    scalora("inspect", tmp_path / "run", "--batches", "0")
    assert "has not been inspected as it is now" not in scalora("report", tmp_path / "run")
    scalora("train", config, "--resume", "--max_steps", "4")
    assert "has not been inspected as it is now" in scalora("report", tmp_path / "run")
