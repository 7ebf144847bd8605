"""`Case`: one setting to measure, and `Contender`: the model of one method in it, ready to train."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerControl, TrainerState, TrainingArguments

from scalora.bench.settings import ContenderName, parse_contender
from scalora.config import LORA_DEFAULTS, Dtype, Merge, ScaLoraConfig
from scalora.maths.mode import Mode
from scalora.pair_adamw import PairAdamW
from scalora.rescale.remainder import FactoredRemainder
from scalora.rivals import METHODS
from scalora.rivals.method import Method
from scalora.rivals.scalora import ScaLoraMethod

# The random Llama has the proportions of SmolLM2-135M, with a smaller vocabulary, so that the logits do not dominate
# the cost of the layers.
_HEAD_SIZE = 64
_VOCABULARY = 8192

# Any rate at which training does not diverge will do: only time is measured.
_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Case:
    """A setting that is the same for all methods compared.

    Attributes:
        model: folder or hub id of a causal language model; None: a Llama of `width` and `layers` with random weights.
        width: hidden size of the random Llama.
        layers: number of layers of the random Llama.
        rank: rank of the adapter, which is on all linear layers.
        batch: sequences per step.
        sequence: tokens per sequence.
        dtype: dtype of the base weights. In half precision, training uses autocast and a float32 adapter, as the
            Trainer does.
        merge: where ScaLoRA's remainder goes.
        device: device to train on.
        native: whether ScaLoRA rescales in C++.
    """

    model: str | None
    width: int
    layers: int
    rank: int
    batch: int
    sequence: int
    dtype: Dtype
    merge: Merge
    device: str
    native: bool = False

    def base(self) -> nn.Module:
        """Load or create the model that every method starts from."""
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
            # A third of the heads, as in SmolLM2, or the largest smaller number that divides them.
            num_key_value_heads=next(few for few in range(max(1, heads // 3), 0, -1) if heads % few == 0),
            max_position_embeddings=max(2048, self.sequence),
        )
        return AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-any-return]

    def tokens(self, vocabulary: int) -> torch.Tensor:
        """A batch of random tokens, (batch, sequence), the same in every call.

        Args:
            vocabulary: number of different tokens.
        """
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, (self.batch, self.sequence), generator=generator).to(self.device)


class Contender:
    """The model and optimizer of one method.

    Args:
        name: a key of `scalora.rivals.METHODS`; ``scalora:10`` is ScaLoRA with an interval of 10,
            ``scalora+pair_adamw`` with matrix scaling.
        base: the base model, which is modified.
        case: the setting.

    Attributes:
        name: the name given.
        model: the adapted model.
        optimizer: AdamW or PairAdamW over the model's trainable parameters, with the method's hooks attached.

    Raises:
        ValueError: there is no such method or optimizer, or the interval is not a positive integer.
    """

    def __init__(self, name: str, base: nn.Module, case: Case) -> None:
        self.name = name
        self._case = case
        parsed = parse_contender(name)
        method = _method(parsed, case)
        settings = LORA_DEFAULTS | {"r": case.rank, "lora_alpha": case.rank, "task_type": "CAUSAL_LM"}
        self._tokens = case.tokens(base.config.vocab_size)  # type: ignore[union-attr, arg-type]
        self.model = method.adapt(
            base.to(case.device), method.peft_config(settings), lambda model: self._backward(model)
        )
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer: Optimizer = (
            PairAdamW(self.model, lr=_LEARNING_RATE) if parsed.pair_adamw else AdamW(trained, lr=_LEARNING_RATE)
        )
        arguments = TrainingArguments(output_dir="unused", max_steps=1_000_000, report_to="none")
        for callback in method.callbacks():
            callback.on_train_begin(
                arguments,
                TrainerState(max_steps=arguments.max_steps),
                TrainerControl(),
                model=self.model,
                optimizer=self.optimizer,
            )
        fill_remainders(self.model)

    def _backward(self, model: nn.Module) -> None:
        half = self._case.dtype != "float32"
        with torch.autocast(torch.device(self._case.device).type, getattr(torch, self._case.dtype), enabled=half):
            loss = model(input_ids=self._tokens, labels=self._tokens).loss
        loss.backward()

    def backward(self) -> None:
        """Compute the gradients for the case's batch."""
        self._backward(self.model)

    def step(self) -> float:
        """Take one training step, from the forward pass to clearing the gradients.

        Returns:
            The seconds it took.
        """
        start = now(self._case.device)
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return now(self._case.device) - start


def now(device: str) -> float:
    """The clock in seconds, read after the device has finished all work queued on it.

    Args:
        device: name of a torch device.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _method(name: ContenderName, case: Case) -> Method:
    kind = METHODS[name.method]
    if not issubclass(kind, ScaLoraMethod):
        return kind()
    mode: Mode = "matrix" if name.pair_adamw else "auto"
    config = ScaLoraConfig(interval=name.interval, merge=case.merge, warmup_steps=0, native=case.native, mode=mode)
    return kind(config=config)


def fill_remainders(model: nn.Module) -> None:
    """Give factored remainders as many columns as a compression leaves them in a long run.

    Args:
        model: a model with ScaLoRA attached.
    """
    for module in model.modules():
        if isinstance(module, FactoredRemainder):
            left, right = module.used
            module.append(*(1e-4 * torch.randn(len(f), module.max_rank).to(f) for f in (left, right)))
