"""What `gpu.steps` measures: a Llama with random weights, and the methods that train it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from scalora import PairAdamW, ScaLora, ScaLoraConfig, add_block_signs
from scalora.bench.case import fill_remainders
from scalora.config import Merge
from scalora.rescale.other_optimizers import _WATCHES
from scalora.rivals.full_weights import Full

# Any rate at which training does not diverge will do: only time and memory are measured.
_LEARNING_RATE = 1e-5

MERGES = tuple(merge for merge in get_args(Merge) if merge != "auto")
"""All places of the remainder that there are."""


@dataclass(frozen=True)
class Size:
    """The model and a batch.

    Attributes:
        hidden: hidden size.
        intermediate: hidden size of the MLPs.
        layers: number of layers.
        heads: attention heads.
        key_value_heads: heads of keys and values.
        vocabulary: tokens.
        batch: sequences per step.
        sequence: tokens per sequence.
        rank: rank of the adapters, which are on all linear layers but the head.
        dtype: dtype of the weights. In bfloat16, training uses autocast and float32 adapters, as the Trainer does.
        device: device to train on.
    """

    hidden: int = 2048
    intermediate: int = 5632
    layers: int = 24
    heads: int = 32
    key_value_heads: int = 4
    vocabulary: int = 32000
    batch: int = 8
    sequence: int = 1024
    rank: int = 16
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    def model(self) -> LlamaForCausalLM:
        """The model, on its device, with the same random weights at each call."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=max(2048, self.sequence),
            tie_word_embeddings=False,
            use_cache=False,
            dtype=self.dtype,
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)


TOY = Size(
    hidden=64, intermediate=96, layers=2, heads=4, key_value_heads=2, vocabulary=64, batch=2, sequence=16, rank=4,
    device="cpu",
)  # fmt: skip
"""A size at which everything takes seconds on a CPU."""

TOY_METHODS = ("ScaLoRA, dense, I = 1", "ScaLoRA, matrices, factored, I = 10", "block signs, PairAdamW")
"""What is measured at toy size."""


@dataclass(frozen=True)
class Spec:
    """A method.

    Attributes:
        name: its name in the tables.
        lora: fields of `peft.LoraConfig`; None for full training of the same matrices.
        scalora: fields of `scalora.ScaLoraConfig`; None without rescales.
        pair_adamw: whether the optimizer is `scalora.PairAdamW`, and not PyTorch's fused AdamW.
        block_signs: whether the update has block signs.
    """

    name: str
    lora: dict[str, Any] | None = field(default_factory=dict)
    scalora: dict[str, Any] | None = None
    pair_adamw: bool = False
    block_signs: bool = False

    @property
    def interval(self) -> int:
        """Steps from one rescale to the next; 1 without rescales."""
        return 1 if self.scalora is None else self.scalora.get("interval", 1)


def specs(intervals: tuple[int, ...] = (1, 10)) -> list[Spec]:
    """The methods to measure, LoRA first and then by importance.

    Args:
        intervals: intervals between rescales.
    """
    columns = [
        Spec(f"ScaLoRA, {merge}, I = {interval}", scalora={"merge": merge, "interval": interval})
        for interval in intervals
        for merge in MERGES
    ]
    matrices = [
        Spec(
            f"ScaLoRA, matrices, {merge}, I = {interval}",
            scalora={"mode": "matrix", "merge": merge, "interval": interval},
            pair_adamw=True,
        )
        for merge in MERGES
        for interval in intervals
    ]
    return [
        Spec("LoRA"),
        *columns,
        *matrices[: len(intervals)],
        Spec("DoRA", lora={"use_dora": True}),
        Spec("full", lora=None),
        Spec("LoRA, PairAdamW", pair_adamw=True),
        Spec("block signs, PairAdamW", pair_adamw=True, block_signs=True),
        Spec("ScaLoRA, scalar, dense, I = 1", scalora={"mode": "scalar", "merge": "dense"}),
        *matrices[len(intervals) :],
    ]


class Contender:
    """The model and optimizer of one method, which takes steps.

    Args:
        spec: the method.
        size: model and batch.

    Attributes:
        spec: the method.
        model: the model to train.
        optimizer: its optimizer, with ScaLoRA attached if the method has it.
    """

    def __init__(self, spec: Spec, size: Size) -> None:
        self.spec = spec
        self._size = size
        base = size.model()
        torch.manual_seed(1)
        settings = {"r": size.rank, "lora_alpha": size.rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        config = LoraConfig(**settings | (spec.lora or {}))
        self.model: nn.Module = (
            Full(matrices="adapted").adapt(base, config, lambda model: None)
            if spec.lora is None
            else get_peft_model(base, config)
        ).train()
        if spec.block_signs:
            add_block_signs(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        on_cuda = size.device.startswith("cuda")
        self.optimizer: Optimizer = (
            PairAdamW(self.model, lr=_LEARNING_RATE)
            if spec.pair_adamw
            else AdamW(trained, lr=_LEARNING_RATE, weight_decay=0.0, fused=on_cuda)
        )
        if spec.scalora is not None:
            ScaLora(self.model, self.optimizer, ScaLoraConfig.from_dict({"warmup_steps": 0} | spec.scalora))
            _WATCHES.clear()  # it would look at the steps of the other methods' optimizers, too
            fill_remainders(self.model)
        generator = torch.Generator().manual_seed(0)
        shape = (size.batch, size.sequence)
        self._tokens: Tensor = torch.randint(size.vocabulary, shape, generator=generator).to(size.device)

    def checkpoint_activations(self, on: bool) -> None:
        """Turn gradient checkpointing on or off.

        Args:
            on: whether to compute activations again in the backward pass.
        """
        if on:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def backward(self) -> None:
        """Compute the gradients for the batch."""
        half = self._size.dtype != torch.float32
        with torch.autocast(torch.device(self._size.device).type, self._size.dtype, enabled=half):
            loss = self.model(input_ids=self._tokens, labels=self._tokens).loss
        loss.backward()

    def step(self) -> None:
        """Take one training step. Does not wait for the device."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
