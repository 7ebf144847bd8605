"""A step's loss and gradient, and an evaluation's loss, are the same however the examples are cut into batches."""

import copy

import pytest
import torch
from datasets import Dataset
from models import tiny_gpt2, tiny_llama
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TrainingArguments,
)
from trl import SFTConfig

from scalora.runs.losses import CausalTrainer, SequenceTrainer
from scalora.runs.scores import classification_scores, regression_scores

LENGTHS = [9, 2, 5, 14, 3, 7, 2, 11, 4, 6, 13]
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def texts(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 60, (n,), generator=generator).tolist() for n in LENGTHS[:count]]


class Plain(LlamaForCausalLM):
    """A causal model whose forward takes no other keywords, as those of many repositories do."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=use_cache)


class PlainClassifier(BertForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def plain():
    torch.manual_seed(0)
    return Plain(LlamaConfig(vocab_size=64, **SMALL))


def without_dropout():
    model = tiny_gpt2()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def tokenised(count):
    return Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in texts(count)])


def bert(labels, cls=BertForSequenceClassification):
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return cls(BertConfig(vocab_size=64, num_labels=labels, problem_type=problem(labels), **dropout, **SMALL))


def llama(labels):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, num_labels=labels, problem_type=problem(labels), pad_token_id=1, **SMALL)
    return LlamaForSequenceClassification(config)


def problem(labels):
    return "regression" if labels == 1 else "single_label_classification"


def labelled(count, labels):
    targets = [float(3 * i % 7) - 2 for i in range(count)] if labels == 1 else [i % labels for i in range(count)]
    if labels == 1:
        targets[1] = -100.0  # the number that marks what is not predicted in a language model
    return Dataset.from_list([{"input_ids": ids, "labels": y} for ids, y in zip(texts(count), targets, strict=True)])


def sequence_trainer(model, data, tokenizer, tmp_path, labels, **training):
    return SequenceTrainer(
        model,
        TrainingArguments(str(tmp_path), **COMMON | training),
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=regression_scores if labels == 1 else classification_scores,
    )


def causal_trainer(model, data, tokenizer, tmp_path, **training):
    training = COMMON | {"dataset_kwargs": {"skip_prepare_dataset": True}} | training
    arguments = SFTConfig(str(tmp_path), bf16=False, gradient_checkpointing=False, **training)
    return CausalTrainer(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)


COMMON = {
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "num_train_epochs": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}

# Batch × accumulation. Of eleven examples the last three are in a batch, or a group of batches, that is incomplete.
CUTS = [(8, 1), (4, 2), (2, 4)]


def steps(make, cut):
    trainer = make(per_device_train_batch_size=cut[0], gradient_accumulation_steps=cut[1])
    trainer.train()
    names = ("loss", "grad_norm", "mean_token_accuracy", "entropy")
    return [[log[name] for name in names if name in log] for log in trainer.state.log_history[:-1]]


def assert_same_steps(make, cuts=CUTS):
    whole, *parts = [steps(make, cut) for cut in cuts]
    for part in parts:
        assert len(part) == len(whole) == 2
        for found, expected in zip(part, whole, strict=True):
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


CLASSIFIERS = {
    "ignores the count": lambda labels: bert(labels),
    "divides by the count": lambda labels: llama(labels),
    "takes no count": lambda labels: bert(labels, PlainClassifier),
}


@pytest.mark.slow
@pytest.mark.parametrize(("labels", "smoothing"), [(1, 0.0), (3, 0.0), (3, 0.2)])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_step_over_labelled_examples(kind, labels, smoothing, tokenizer, tmp_path):
    model, data = CLASSIFIERS[kind](labels), labelled(11, labels)

    def make(**training):
        training |= {"label_smoothing_factor": smoothing}
        return sequence_trainer(copy.deepcopy(model), data, tokenizer, tmp_path, labels, **training)

    assert_same_steps(make)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("model", "training"),
    [
        (tiny_llama, {}),
        (tiny_llama, {"label_smoothing_factor": 0.2}),
        (tiny_llama, {"loss_type": "dft"}),
        (without_dropout, {}),
        (plain, {}),
    ],
    ids=["llama", "smoothed", "dft", "gpt2", "plain"],
)
def test_a_step_over_texts_of_different_lengths(model, training, tokenizer, tmp_path):
    model = model()

    def make(**cut):
        return causal_trainer(copy.deepcopy(model), tokenised(11), tokenizer, tmp_path, **training | cut)

    assert_same_steps(make, CUTS[::2])


def mean_loss(model, data, labels):
    """The mean over all examples, or predicted tokens, one example at a time."""
    total, count = 0.0, 0
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        if labels is None:
            total += float(functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
        elif labels == 1:
            total += float((logits[0, 0] - row["labels"]).square())
            count += 1
        else:
            total += float(functional.cross_entropy(logits, torch.tensor([row["labels"]])))
            count += 1
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize("labels", [None, 1, 3])
def test_an_evaluation_and_the_first_step_are_the_mean_over_all_examples(labels, tokenizer, tmp_path):
    if labels is None:
        model, data = without_dropout(), tokenised(11)
    else:
        model, data = llama(labels).eval(), labelled(11, labels)
    truth = mean_loss(model, data, labels)

    def make(**training):
        copied = copy.deepcopy(model)
        if labels is None:
            return causal_trainer(copied, data, tokenizer, tmp_path, **training)
        return sequence_trainer(copied, data, tokenizer, tmp_path, labels, **training)

    scores = [make(per_device_eval_batch_size=size).evaluate() for size in (1, 3, 4, 16)]
    for name in ("eval_loss", "eval_mean_token_accuracy", "eval_entropy", "eval_accuracy", "eval_mse"):
        found = [score[name] for score in scores if name in score]
        assert found == pytest.approx([found[0]] * len(found), rel=1e-5) if found else True
    assert scores[0]["eval_loss"] == pytest.approx(truth, rel=1e-5)
    ((loss, *_),) = steps(make, (4, 4))
    assert loss == pytest.approx(truth, rel=1e-5)
