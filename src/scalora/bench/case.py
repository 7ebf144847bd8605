"""`Case`: one setting that is measured, and the models of the methods in it, ready to step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerControl, TrainerState, TrainingArguments

from scalora.config import LORA_DEFAULTS, Merge, ScaLoraConfig
from scalora.rescale.remainder import FactoredRemainder
from scalora.rivals import METHODS
from scalora.rivals.method import Method
from scalora.rivals.scalora import ScaLoraMethod

# Of the Llama that is made where no model is given: SmolLM2-135M's proportions, with a vocabulary small enough that the
# logits don't drown the layers.
_HEAD_SIZE = 64
_VOCABULARY = 8192

# Any rate that trains is as good as another: only the time is looked at.
_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Case:
    """What is the same for all methods that are compared.

    Attributes:
        model: folder or hub id of a causal language model; None makes a Llama of `width` and `layers`, with random
            weights.
        width: its hidden size.
        layers: its number of layers.
        rank: r of the adapter on all linear layers.
        batch: sequences per step.
        sequence: tokens of each.
        dtype: of the base weights; half precision is trained under autocast, with a float32 adapter, as the Trainer
            does.
        merge: where ScaLoRA's remainder goes.
        device: to train on.
        native: whether ScaLoRA rescales in C++.
    """

    model: str | None
    width: int
    layers: int
    rank: int
    batch: int
    sequence: int
    dtype: str
    merge: Merge
    device: str
    native: bool = False

    def base(self) -> nn.Module:
        """The model that every method starts from."""
        dtype = getattr(torch, self.dtype)
        if self.model is not None:
            return AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype)  # type: ignore[no-any-return]
        heads = max(1, self.width // _HEAD_SIZE)
        config = LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=self.width,
            intermediate_size=8 * self.width // 3,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            # A third of the heads as SmolLM2 has, or the next fewer that divides them.
            num_key_value_heads=next(few for few in range(max(1, heads // 3), 0, -1) if heads % few == 0),
            max_position_embeddings=max(2048, self.sequence),
        )
        return AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-any-return]

    def tokens(self, vocabulary: int) -> torch.Tensor:
        """A batch of random tokens, (batch, sequence)."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, (self.batch, self.sequence), generator=generator).to(self.device)


class Contender:
    """A method's model and optimizer, which take a step when asked.

    Args:
        name: of a method in `scalora.rivals.METHODS`; ``scalora:10`` rescales at every tenth step.
        base: to start from; it is changed.
        case: the setting.

    Raises:
        ValueError: as `method_and_interval`.
    """

    def __init__(self, name: str, base: nn.Module, case: Case) -> None:
        self.name = name
        self._case = case
        method = _method(name, case)
        settings = LORA_DEFAULTS | {"r": case.rank, "lora_alpha": case.rank, "task_type": "CAUSAL_LM"}
        self._tokens = case.tokens(base.config.vocab_size)  # type: ignore[union-attr, arg-type]
        self.model = method.adapt(
            base.to(case.device), method.peft_config(settings), lambda model: self._backward(model)
        )
        self.model.train()
        self.optimizer: Optimizer = AdamW([p for p in self.model.parameters() if p.requires_grad], lr=_LEARNING_RATE)
        arguments = TrainingArguments(output_dir="unused", max_steps=1_000_000, report_to="none")
        for callback in method.callbacks():
            callback.on_train_begin(
                arguments, TrainerState(), TrainerControl(), model=self.model, optimizer=self.optimizer
            )
        _fill_remainders(self.model)

    def _backward(self, model: nn.Module) -> None:
        half = self._case.dtype != "float32"
        with torch.autocast(torch.device(self._case.device).type, getattr(torch, self._case.dtype), enabled=half):
            loss = model(input_ids=self._tokens, labels=self._tokens).loss
        loss.backward()

    def backward(self) -> None:
        """Compute the gradients of a batch."""
        self._backward(self.model)

    def step(self) -> float:
        """Forward, backward and the optimizer's step; returns the seconds."""
        start = now(self._case.device)
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return now(self._case.device) - start


def method_and_interval(name: str) -> tuple[str, int]:
    """What a contender's name says: ``("scalora", 10)`` for ``scalora:10``, ``("lora", 1)`` for ``lora``.

    Raises:
        ValueError: no method has that name, or the interval is none.
    """
    method, _, interval = name.partition(":")
    if method not in METHODS:
        raise ValueError(f"the methods are {', '.join(METHODS)}")
    if interval and (not interval.isdigit() or int(interval) < 1):
        raise ValueError("after the colon comes an interval of at least 1")
    return method, int(interval or 1)


def interval_of(name: str) -> int:
    """How many steps of a contender are alike."""
    return method_and_interval(name)[1]


def now(device: str) -> float:
    """Seconds, when the device has done all that it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _method(name: str, case: Case) -> Method:
    method, interval = method_and_interval(name)
    kind = METHODS[method]
    if not issubclass(kind, ScaLoraMethod):
        return kind()
    config = ScaLoraConfig(interval=interval, merge=case.merge, warmup_steps=0, native=case.native)
    return kind(config=config)


def _fill_remainders(model: nn.Module) -> None:
    """Give factored remainders the columns that they have in a long run, as after a compression."""
    for module in model.modules():
        if isinstance(module, FactoredRemainder):
            module.left = 1e-4 * module.left.new_empty(len(module.left), module.max_rank).normal_()
            module.right = 1e-4 * module.right.new_empty(len(module.right), module.max_rank).normal_()
