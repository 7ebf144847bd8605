"""One training run of a text classifier in plain PyTorch, as a user of PEFT writes it: a model, a loop, an optimizer.

A run is a dict, so that a study can be written as JSON. Its keys:

- ``task``: folder with ``train.jsonl`` and ``eval.jsonl`` (``text`` and ``label``), in the folder given to `Corpora`
- ``method``: ``"lora"``, ``"scalora"``, or ``"full"``, which trains the matrices that LoRA adapts
- ``optimizer``: ``"adamw"`` or ``"pair_adamw"``
- ``r``, ``lora``: the rank (``lora_alpha`` is the same), and further fields of `peft.LoraConfig`
- ``scalora``: fields of `scalora.ScaLoraConfig`; with ``pair_adamw``, ``mode`` is ``"matrix"`` unless it is given
- ``rate``, ``head_rate``, ``warmup``, ``steps``, ``batch``, ``clip``, ``seed``: learning rates of the model and of its
  head, steps of linear warm-up before the linear decay to zero, steps, examples per step, largest norm of a gradient
"""

from __future__ import annotations

import copy
import gc
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    get_linear_schedule_with_warmup,
)

from scalora import PairAdamW, ScaLora, ScaLoraConfig
from scalora.rivals.full_weights import Full
from scalora.runs.head_rate import give_rate, head_parameters

Run = dict[str, Any]

DEFAULTS: Run = {"method": "lora", "optimizer": "adamw", "r": 8, "lora": {}, "scalora": {}, "clip": 1.0}
"""Keys that a run may leave out."""

TOY = "toy"
"""In the place of a model's folder: a tiny BERT with random weights and made-up examples."""

_EVAL_BATCH = 400
_TOY_CLASSES, _TOY_LENGTH = 4, 9


class Examples(NamedTuple):
    """Tokenised texts and their classes.

    Attributes:
        tokens: (examples, tokens), padded at the end, on the device.
        mask: which of them are not padding, on the device.
        labels: (examples,), on the device.
        lengths: tokens of each text, in host memory: a batch is as long as its longest text, which must not take a
            wait for the device.
    """

    tokens: Tensor
    mask: Tensor
    labels: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, texts: list[list[int]], labels: list[int], padding: int, device: str) -> Examples:
        """Pad texts and move them to a device.

        Args:
            texts: the tokens of each text.
            labels: the class of each text.
            padding: token to pad with.
            device: the device.
        """
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], True, padding)
        lengths = torch.tensor([len(text) for text in texts])
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        return cls(tokens.to(device), mask.to(device), torch.tensor(labels).to(device), lengths)

    def batches(self, order: Tensor, size: int) -> Iterator[dict[str, Tensor]]:
        """The model's arguments for examples in batches, each padded to its longest text.

        Args:
            order: numbers of the examples, in host memory.
            size: examples in a batch.
        """
        for rows, chosen in zip(order.split(size), order.to(self.tokens.device).split(size), strict=True):
            longest = int(self.lengths[rows].max())
            yield {
                "input_ids": self.tokens[chosen, :longest],
                "attention_mask": self.mask[chosen, :longest],
                "labels": self.labels[chosen],
            }


class Corpora:
    """The base model and the tokenised examples of each task, read once for all runs of a process.

    Args:
        model: folder of the base model; `TOY` for a tiny random one.
        data: folder with a folder for each task.
        device: device to train on.
    """

    def __init__(self, model: str, data: Path, device: str) -> None:
        self._model, self._data, self._device = model, data, device
        self._bases: dict[int, nn.Module] = {}
        self._tasks: dict[str, tuple[Examples, Examples, int]] = {}

    def of(self, task: str) -> tuple[Examples, Examples, int]:
        """The training and evaluation examples of a task, and its number of classes.

        Args:
            task: name of its folder.
        """
        if task not in self._tasks:
            self._tasks[task] = _toy_examples(self._device) if self._model == TOY else self._read(task)
        return self._tasks[task]

    def base(self, classes: int) -> nn.Module:
        """A copy of the base model in float32 with a head that the global generator draws.

        Args:
            classes: number of classes.
        """
        if classes not in self._bases:
            self._bases[classes] = _toy_base(classes) if self._model == TOY else self._load(classes)
        model = copy.deepcopy(self._bases[classes])
        nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
        nn.init.zeros_(model.classifier.bias)
        return model

    def _load(self, classes: int) -> nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(
            self._model, num_labels=classes, dtype=torch.float32, local_files_only=True
        )

    def _read(self, task: str) -> tuple[Examples, Examples, int]:
        tokenizer = AutoTokenizer.from_pretrained(self._model, local_files_only=True)
        rows = {}
        for part in ("train", "eval"):
            lines = (self._data / task / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
            rows[part] = [json.loads(line) for line in lines]
        numbers = {label: number for number, label in enumerate(sorted({row["label"] for row in rows["train"]}))}
        train, evaluation = (
            Examples.of(
                tokenizer([row["text"] for row in rows[part]])["input_ids"],
                [numbers[row["label"]] for row in rows[part]],
                tokenizer.pad_token_id,
                self._device,
            )
            for part in ("train", "eval")
        )
        return train, evaluation, len(numbers)


def _toy_base(classes: int) -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=_TOY_LENGTH,
            num_labels=classes,
        )
    )


def _toy_examples(device: str) -> tuple[Examples, Examples, int]:
    """Texts whose second token says which class they are of."""
    draw = random.Random(0)

    def drawn(count: int) -> Examples:
        labels = [draw.randrange(_TOY_CLASSES) for _ in range(count)]
        texts = [[1, 4 + label, *draw.choices(range(8, 64), k=draw.randrange(3, _TOY_LENGTH - 1))] for label in labels]
        return Examples.of(texts, labels, 0, device)

    return drawn(512), drawn(64), _TOY_CLASSES


def train(run: Run, corpora: Corpora, device: str) -> dict[str, Any]:
    """Train one classifier and evaluate it at the end.

    Args:
        run: the run, whose keys the module describes.
        corpora: models and examples.
        device: device to train on.

    Returns:
        ``accuracy`` and ``loss`` on the evaluation examples, ``train_loss``, the mean over the last quarter of the
        steps, ``seconds`` of training, ``parameters`` trained, and the engine's ``metrics``.
    """
    run = DEFAULTS | run
    training, evaluation, classes = corpora.of(run["task"])
    gc.collect()  # the models of earlier runs are in cycles
    torch.manual_seed(run["seed"])
    model = _adapted(corpora.base(classes), run).to(device).train()
    optimizer = _optimizer(model, run, device)
    engine = ScaLora(model, optimizer, _config(run)) if run["method"] == "scalora" else None
    scheduler = get_linear_schedule_with_warmup(optimizer, run["warmup"], run["steps"])
    trained = [p for p in model.parameters() if p.requires_grad]
    order = _order(len(training.lengths), run["steps"] * run["batch"], run["seed"])
    losses = []
    start = time.perf_counter()
    for batch in training.batches(order, run["batch"]):
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, run["clip"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    logged = torch.stack(losses).tolist()  # waits for the device
    seconds = time.perf_counter() - start
    last = logged[-max(1, len(logged) // 4) :]
    return {
        **_evaluate(model, evaluation),
        "train_loss": sum(last) / len(last),
        "seconds": seconds,
        "parameters": sum(p.numel() for p in trained),
        "metrics": {} if engine is None else engine.metrics(),
    }


def _adapted(base: nn.Module, run: Run) -> nn.Module:
    settings = {"r": run["r"], "lora_alpha": run["r"], "target_modules": "all-linear", "task_type": "SEQ_CLS"}
    config = LoraConfig(**settings | run["lora"])
    if run["method"] == "full":
        return Full(matrices="adapted").adapt(base, config, lambda model: None)
    return get_peft_model(base, config)


def _optimizer(model: nn.Module, run: Run, device: str) -> Optimizer:
    if run["optimizer"] == "pair_adamw":
        optimizer: Optimizer = PairAdamW(model, lr=run["rate"])
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = AdamW(trained, lr=run["rate"], weight_decay=0.0, fused=device.startswith("cuda"))
    give_rate(optimizer, head_parameters(model), run["head_rate"])
    return optimizer


def _config(run: Run) -> ScaLoraConfig:
    mode = {"mode": "matrix"} if run["optimizer"] == "pair_adamw" else {}
    return ScaLoraConfig.from_dict(mode | run["scalora"])


def _order(examples: int, count: int, seed: int) -> Tensor:
    """The examples of a run in order: the same for all methods and batch sizes."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(examples, generator=generator) for _ in range(math.ceil(count / examples))]
    return torch.cat(passes)[:count]


@torch.no_grad()
def _evaluate(model: nn.Module, examples: Examples) -> dict[str, float]:
    model.eval()
    right, loss, count = 0.0, 0.0, len(examples.lengths)
    for batch in examples.batches(torch.arange(count), _EVAL_BATCH):
        logits = model(**batch).logits
        loss += nn.functional.cross_entropy(logits, batch["labels"], reduction="sum").item()
        right += (logits.argmax(-1) == batch["labels"]).sum().item()
    return {"accuracy": right / count, "loss": loss / count}
