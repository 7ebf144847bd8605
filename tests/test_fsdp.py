"""FSDP2: processes that have some rows of every tensor do what one does with the whole batch; no weight is gathered.

Each number of processes is started once and runs all its cases, because starting takes longer than they do.
"""

import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from models import tiny_llama, trainable, with_lora
from processes import BATCH, Collectives, Layers, data, results_of, worst
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import Trainer, TrainingArguments

from scalora import (
    PairAdamW,
    ScaLora,
    ScaLoraCallback,
    ScaLoraConfig,
    StateError,
    UnsupportedLayerError,
    UnsupportedOptimizerError,
    optimal_start,
)
from scalora.bench.several_gpus import rescale_collectives
from scalora.model.adapters import find_lora_pairs
from scalora.parallel import buckets
from scalora.parallel.traffic import training_step
from scalora.rescale.rounding import join
from scalora.rescale.transport import scale_gradients_and_states
from scalora.saving.checkpoints import why_not_resumable
from scalora.saving.peft_model import ShardedModelError
from scalora.saving.state_file import SHARDED_STATE, STATE_FILE, read_state

pytestmark = pytest.mark.slow

STEPS = 50
BUCKET = buckets.BUCKET

# Ranks below the number of processes, and not divisible by it; each rank of a model has collectives of its own.
ODD = {"r": 3, "rank_pattern": {"linear": 1, "extra": 1}}
EVEN = {"r": 4, "rank_pattern": {"conv1d": 2, "extra": 2}}


def adapted(dtype=torch.float64, ranks=ODD):
    torch.manual_seed(0)
    targets = ["embed", "conv1d", "linear", "extra"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about Conv1D
        return with_lora(Layers(), dtype=dtype, target_modules=targets, lora_alpha=4, **ranks)


def sharded(model, processes, *, hsdp=False, **settings):
    """A model whose parameters, but for those that are ignored, are shards in this process."""
    sizes = (2, processes // 2) if hsdp else (processes,)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicas", "shards")[-len(sizes) :])
    for name, module in model.named_modules():
        if name.endswith((".linear", "layers.0")):  # a LoRA layer itself; a decoder layer
            fully_shard(module, mesh=mesh, **settings)
    fully_shard(model, mesh=mesh, **settings)
    return model


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=3e-2, momentum=0.9),
}

CASES = {
    "every step": {},
    "every tenth, accumulated, clipped": {"interval": 10, "ranks": EVEN, "accumulate": 2, "clip": 0.1},
    "replicas of shards": {"hsdp": True, "clip": 0.1},
    "scalar, sgd": {"mode": "scalar", "optimizer": "sgd"},
    "column, fused": {"mode": "column", "optimizer": "fused"},
    "foreach": {"optimizer": "foreach", "interval": 10},
    "a few layers at a time": {"bucket": 300},
    "matrix, sgd": {"ranks": EVEN, "mode": "matrix", "optimizer": "sgd", "target_norm": 1.0},
    "matrix, pairs": {"mode": "matrix", "optimizer": "pairs", "merge": "factored"},
    "matrix, pairs that were there before the shards": {"mode": "matrix", "optimizer": "pairs early", "ranks": EVEN},
    "factored": {"merge": "factored", "remainder_rank": 64},
    "matrix, factored": {"mode": "matrix", "optimizer": "sgd", "target_norm": 1.0, "merge": "factored"},
    "adapter beside shards": {"ignored": True},
}

# Two processes are faster, and four are needed for replicas and for ranks of 1 to 3.
OF_FOUR = ("every step", "every tenth, accumulated, clipped", "replicas of shards", "matrix, sgd", "factored")

# Compressions of a factored remainder truncate what is below 1e-8 of it.
TOLERANCE = {"matrix, factored": 1e-9}


def switch_parameters(optimizer, model, names):
    """What Accelerate does to an optimizer that was there before the shards."""
    parameters = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [parameters[names[id(parameter)]] for parameter in group["params"]]


class Run:
    """A training run, of this process's part of each batch."""

    def __init__(
        self, rank=0, processes=1, *, optimizer="adamw", hsdp=False, ignored=False, ranks=ODD, bucket=None, **config
    ):
        self.rank, self.processes, self.ignored = rank, processes, ignored
        self.accumulate, self.clip = config.pop("accumulate", 1), config.pop("clip", None)
        self.model = adapted(ranks=ranks)
        buckets.BUCKET = config.pop("bucket", BUCKET)
        early = PairAdamW(self.model, lr=1e-3)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        if processes > 1:
            settings = {"ignored_params": set(trainable(self.model))} if ignored else {}
            sharded(self.model, processes, hsdp=hsdp, **settings)
        if optimizer == "pairs early":
            self.optimizer = early
            switch_parameters(early, self.model, names)
        elif optimizer == "pairs":
            self.optimizer = PairAdamW(self.model, lr=1e-3, weight_decay=0.1)
        else:
            self.optimizer = OPTIMIZERS[optimizer](trainable(self.model))
        self.engine = ScaLora(self.model, self.optimizer, ScaLoraConfig(warmup_steps=1, **config))
        for pair in self.engine.pairs:
            assert isinstance(pair.weight, DTensor) == (processes > 1)
            assert isinstance(pair.lora_A, DTensor) == (processes > 1 and not ignored)

    def steps(self, first, last):
        for step in range(first, last):
            for part in range(self.accumulate):
                x, y = (t.chunk(self.processes)[self.rank] for t in data(step * self.accumulate + part))
                ((self.model(x) - y.double()).square().mean() / self.accumulate).backward()
            if self.ignored and self.processes > 1:
                for parameter in trainable(self.model):
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.processes
            if self.clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def result(self):
        return {"weights": effective(self.engine), "metrics": self.engine.metrics()}


def full(tensor):
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def effective(engine):
    """Of each layer, W and all that is added to it."""
    weights = {}
    for pair in engine.pairs:
        weight = pair.oriented(full(pair.weight)) + pair.scaling * full(pair.lora_B) @ full(pair.lora_A)
        if hasattr(pair.remainder, "dense"):
            weight = weight + pair.remainder.dense()
        weights[pair.name] = weight
    return weights


def resumed(rank, processes, folder, **settings):
    run = Run(rank, processes, **settings)
    run.engine.load(folder)
    assert run.engine.step == STEPS // 2
    return run.steps(STEPS // 2, STEPS).result()


# ---- What processes do


def llama(rank, processes):
    """Losses and weights in float32."""
    model = with_lora(tiny_llama(), r=3, target_modules="all-linear")
    if processes > 1:
        sharded(model, processes)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=1))
    losses = []
    for step in range(10):
        tokens = torch.randint(0, 64, (BATCH, 10), generator=torch.Generator().manual_seed(step))
        tokens = tokens.chunk(processes)[rank]
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        mean = loss.detach().clone()
        if processes > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / processes)
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": effective(engine), "losses": torch.tensor(losses)}


HALF_MERGES = ("dense", "dense_8bit", "stochastic")
HALVES = [(dtype, merge) for dtype in (torch.bfloat16, torch.float16) for merge in HALF_MERGES]


def rescaled_halves(processes, dtype, merge):
    """Weights, factors, and the sums that are rounded to the weights, after rescales on given gradients."""
    model = adapted(torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    if processes > 1:
        sharded(model, processes)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, merge=merge))
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        for pair in engine.pairs:
            for factor in (pair.lora_A, pair.lora_B):
                gradient = torch.randn(factor.shape, generator=generator)
                split = isinstance(factor, DTensor)
                factor.grad = distribute_tensor(gradient, factor.device_mesh, factor.placements) if split else gradient
        optimizer.step()
    found = {}
    for pair in engine.pairs:
        tensors = {"W": pair.weight, "A": pair.lora_A, "B": pair.lora_B}
        if merge == "dense":
            low = pair.remainder.rounded_off
            assert isinstance(low, DTensor) == (processes > 1)
            if processes > 1:
                low = DTensor.from_local(low.to_local().int(), low.device_mesh, low.placements, shape=low.shape,
                                         stride=low.stride())  # fmt: skip
            tensors["low"] = low.int() if processes == 1 else low
        whole = {key: full(tensor) for key, tensor in tensors.items()}
        if "low" in whole:
            whole["sum"] = join(whole["W"], whole.pop("low").to(torch.int16))
        found |= {f"{pair.name} {key}": tensor for key, tensor in whole.items()}
    assert engine.metrics()["scalora/rescales"] == 20
    return found


def in_a_trainer(
    folder,
    *,
    dtype=torch.float32,
    kind="SHARDED_STATE_DICT",
    fsdp=True,
    resume=None,
    batch=2,
    fsdp_settings=None,
    **settings,
):
    """A training with the callback; in one process if it is not sharded."""
    model = with_lora(tiny_llama(), r=3, target_modules="all-linear")
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    texts = torch.randint(0, 64, (48, 10), generator=torch.Generator().manual_seed(0)).tolist()
    if fsdp:
        settings["fsdp"] = True
        settings["fsdp_config"] = {
            "fsdp_version": 2,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "reshard_after_forward": True,
            "state_dict_type": kind,
            **(fsdp_settings or {}),
        }
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=batch, use_cpu=True, ddp_backend="gloo",
        report_to="none", save_steps=3, bf16=False, dataloader_pin_memory=False, disable_tqdm=True, logging_steps=1,
        **settings,
    )  # fmt: skip
    if fsdp:  # Accelerate does not shard on CPUs, and says nothing
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    callback = ScaLoraCallback(ScaLoraConfig(warmup_steps=1, merge="dense"))
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in texts])
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    assert callback.engine.is_sharded == fsdp
    assert all(isinstance(pair.weight, DTensor) == fsdp for pair in callback.engine.pairs)
    losses = torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])
    if fsdp:
        with pytest.raises(ShardedModelError) as error:
            trainer.model.save_pretrained(folder)
        assert "ScaLora.save(folder) in all processes" in str(error.value)
    return {"weights": effective(callback.engine), "losses": losses, "rescales": callback.engine.metrics()}


TRAINERS = {"float32": {}, "bfloat16": {"dtype": torch.bfloat16, "kind": "FULL_STATE_DICT"}}


def trainers(folder):
    results = {}
    for name, settings in TRAINERS.items():
        whole = in_a_trainer(folder / name, **settings)
        dist.barrier()
        again = in_a_trainer(folder / name, **settings, resume=str(folder / name / "checkpoint-3"))
        results[name] = {"whole": whole, "resumed": again}
    dist.barrier()
    with pytest.raises(StateError) as error:
        in_a_trainer(folder / "best", load_best_model_at_end=True, eval_strategy="steps", eval_steps=3)
    results["best"] = str(error.value)
    PartialState._reset_state()
    AcceleratorState._reset_state(True)
    results["ddp"] = in_a_trainer(folder / "ddp", fsdp=False)
    return results


def without_gradients(processes):
    """Of a rescale for which no process has a gradient."""
    model = sharded(with_lora(tiny_llama(), r=4, target_modules="all-linear"), processes)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0))
    before = effective(engine)
    optimizer.zero_grad()
    if dist.get_rank() == 0:  # as no training should be, but a process that waits for the others is worse
        engine.pairs[0].lora_A.grad = torch.zeros_like(engine.pairs[0].lora_A)
    optimizer.step()
    after = effective(engine)
    return {
        "untouched": all(torch.equal(before[name], after[name]) for name in before),
        "metrics": engine.metrics(),
    }


def llama_of(ranks):
    return with_lora(tiny_llama(), target_modules="all-linear", **ranks)


# Ranks of which a gather pads much, so that sums are less; layers that need all of lora_B; several buckets, of which
# the largest layer fills one.
COUNTED = {
    "one rank": (lambda: llama_of({"r": 4}), "dense", BUCKET),
    "two ranks": (lambda: llama_of({"r": 3, "rank_pattern": {"down_proj": 8}}), "dense", BUCKET),
    "a rank of one": (lambda: llama_of({"r": 1}), "dense", BUCKET),
    "transposed": (lambda: adapted(torch.float32), "dense", BUCKET),
    "factored": (lambda: adapted(torch.float32, EVEN), "factored", BUCKET),
    "padded to more than fits": (lambda: llama_of({"r": 5}), "factored", BUCKET),
    "buckets": (lambda: llama_of({"r": 3, "rank_pattern": {"down_proj": 2}}), "dense", 3000),
}


def counted(processes):
    """Collectives of a rescale, what happens in which order, and what `scalora estimate` says."""
    results = {}
    for name, (make, merge, bucket) in COUNTED.items():
        buckets.BUCKET = bucket
        model = sharded(make(), processes)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)

        def transport(*arguments):
            counting.seen.append(("transport", 0))
            scale_gradients_and_states(*arguments)

        ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, merge=merge), transport=transport)
        for parameter in trainable(model):
            parameter.grad = torch.ones_like(parameter)
        with Collectives() as counting:
            optimizer.step()
        said = rescale_collectives(find_lora_pairs(make()), merge, "fsdp2", processes)
        results[name] = {"seen": counting.seen, "said": [tuple(collective) for collective in said]}
    buckets.BUCKET = BUCKET
    return results


def counted_by_matrices(processes):
    """Collectives of a rescale that gathers moments too."""
    model = sharded(llama_of({"r": 5}), processes)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3, momentum=0.9)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=1, mode="matrix", target_norm=1.0, merge="dense"))
    for _ in range(2):
        for parameter in trainable(model):
            parameter.grad = torch.ones_like(parameter) + parameter.detach()
        with Collectives() as counting:
            optimizer.step()
    assert engine.metrics()["scalora/rescales"] == 1
    return counting.seen


def step_of_fsdp(processes):
    """What a step of FSDP2 itself sends, whose weights divide by the processes, and what `scalora estimate` says."""
    model = sharded(llama_of({"r": 4}), processes, reshard_after_forward=True)
    tokens = torch.randint(0, 64, (2, 10))
    with Collectives() as counting:
        model(input_ids=tokens, labels=tokens).loss.backward()
    adapter = sum(p.numel() * 4 for p in trainable(model))
    base = sum(p.numel() * 4 for p in model.parameters()) - adapter
    return counting.seen, [tuple(collective) for collective in training_step("fsdp2", base, adapter)]


def in_small_buckets(rank, processes):
    """Whether a rescale in several goes leaves the bits of one that is not."""
    tensors = []
    for bucket in (BUCKET, 300):
        run = Run(rank, processes, bucket=bucket).steps(0, 5)
        tensors.append([t for pair in run.engine.pairs for t in (pair.weight, pair.lora_A, pair.lora_B)])
        assert run.engine.metrics()["scalora/rescales"] == 4
    return all(torch.equal(one.to_local(), other.to_local()) for one, other in zip(*tensors, strict=True))


def message(call):
    with pytest.raises((UnsupportedLayerError, UnsupportedOptimizerError)) as error:
        call()
    return f"{type(error.value).__name__}: {error.value}"


def attach(model, optimizer=torch.optim.AdamW):
    return ScaLora(model, optimizer(trainable(model), lr=1e-3))


def refusals(processes):
    mesh = init_device_mesh("cpu", (processes,))

    def split(model, placements):
        for name, module in model.named_modules():
            for key, parameter in list(module._parameters.items()):
                for part, placement in placements.items():
                    if parameter is not None and "linear" in name and f"{name}.{key}".endswith(part):
                        whole = distribute_tensor(parameter.data, mesh, [placement])
                        module._parameters[key] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        return model

    rowwise = split(adapted(), {"base_layer.weight": Shard(1), "lora_A.default.weight": Shard(1)})
    colwise = split(adapted(), {"base_layer.weight": Shard(0), "lora_B.default.weight": Shard(0)})
    offloaded = adapted()
    offloaded.base_model.model.mixed.linear.base_layer.to("meta")
    flat = FullyShardedDataParallel(adapted(), use_orig_params=True, device_id=torch.device("cpu"))
    blocks = type("AdamW8bit", (torch.optim.AdamW,), {"__module__": "bitsandbytes.optim.adamw"})

    too_early = adapted()
    optimizer = torch.optim.AdamW(trainable(too_early), lr=1e-3)
    ScaLora(too_early, optimizer, ScaLoraConfig(interval=100))
    names = {id(p): name for name, p in too_early.named_parameters()}
    sharded(too_early, processes)
    switch_parameters(optimizer, too_early, names)
    x, y = data(0)
    (too_early(x) - y.double()).square().mean().backward()
    return {
        "rowwise": message(lambda: attach(rowwise)),
        "colwise": message(lambda: attach(colwise)),
        "meta": message(lambda: attach(offloaded)),
        "fsdp1": message(lambda: attach(flat)),
        "blocks": message(lambda: attach(sharded(adapted(), processes), blocks)),
        "too early": message(optimizer.step),
        "start": message(lambda: optimal_start(sharded(adapted(), processes), lambda: None)),
    }


def after_an_evaluation(processes):
    """Attached, saved and loaded while FSDP has left whole parameters in the root's layers."""
    model = sharded(adapted(), processes)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    x, _ = data(0)
    with torch.no_grad():
        before = model(x)
    left_whole = not any(isinstance(p, DTensor) for p in model.base_model.model.extra.parameters())
    engine = ScaLora(model, optimizer)
    with torch.no_grad():
        model(x)
    state = engine.state_dict()
    shards = all(isinstance(tensor, DTensor) for tensor in state["tensors"].values())
    wholes = state | {"tensors": {key: full(t).clone() for key, t in state["tensors"].items()}}
    with torch.no_grad():
        for pair in engine.pairs:
            pair.lora_A.add_(1)
        model(x)
    engine.load_state_dict(wholes)
    model.eval()
    with torch.no_grad():
        after = model(x)
    return {
        "left whole": left_whole,
        "shards": shards,
        "fingerprint": state["base"],
        "difference": (before - after).abs().max().item(),
    }


def start(rank, processes, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")


def process(rank, processes, folder, port):
    start(rank, processes, port)
    folder = Path(folder)
    results = {}
    for name, settings in CASES.items():
        if (name in OF_FOUR) == (processes == 4):
            results[name] = Run(rank, processes, **settings).steps(0, STEPS).result()
    if processes == 4:
        for dtype, merge in HALVES:
            results[str(dtype), merge] = rescaled_halves(processes, dtype, merge)
        saving = Run(rank, processes).steps(0, STEPS // 2)
        saving.engine.save(folder / "saved")
        dist.barrier()
        results["resumed"] = resumed(rank, processes, folder / "saved")
        results["collectives"] = without_gradients(processes)
        results["same bits in buckets"] = in_small_buckets(rank, processes)
        results["step"] = step_of_fsdp(processes)
    else:
        results["llama"] = llama(rank, processes)
        pairs = Run(rank, processes, **CASES["matrix, pairs"]).steps(0, STEPS // 2)
        pairs.engine.save(folder / "pairs")
        results["resumed"] = resumed(rank, processes, folder / "saved")
        results["trainers"] = trainers(folder)
        results["refusals"] = refusals(processes)
        results["evaluated"] = after_an_evaluation(processes)
    results["counted"] = counted(processes)
    results["counted by matrices"] = counted_by_matrices(processes)
    torch.save(results, folder / f"{processes}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def of_four(folder):
    return results_of(4, folder, process)


@pytest.fixture(scope="module")
def of_two(folder, of_four):
    return results_of(2, folder, process)  # resumes what four have saved


@pytest.fixture
def of_case(name, of_four, of_two):
    return [result[name] for result in (of_four if name in OF_FOUR else of_two)]


@pytest.fixture(scope="module")
def of_one():
    return Run().steps(0, STEPS).result()


@pytest.mark.parametrize("name", CASES)
def test_shards_do_what_one_process_does_with_the_whole_batch(name, of_case):
    alone = Run(**{key: value for key, value in CASES[name].items() if key not in ("hsdp", "ignored")})
    wanted = alone.steps(0, STEPS).result()
    assert worst(of_case[0]["weights"], wanted["weights"]) <= TOLERANCE.get(name, 1e-12)
    assert of_case[0]["metrics"] == pytest.approx(wanted["metrics"], rel=1e-6, abs=1e-7)
    assert wanted["metrics"]["scalora/left_alone_share"] < 1


@pytest.mark.parametrize("name", CASES)
def test_all_processes_have_the_same_bits(name, of_case):
    first, *others = of_case
    for other in others:
        assert other["metrics"] == first["metrics"]
        assert all(torch.equal(other["weights"][key], value) for key, value in first["weights"].items())


def test_in_float32_losses_and_weights_are_those_of_one_process(of_two):
    found, wanted = of_two[0]["llama"], llama(0, 1)
    torch.testing.assert_close(found["losses"], wanted["losses"], rtol=1e-5, atol=0)
    assert worst(found["weights"], wanted["weights"]) <= 1e-5


@pytest.mark.parametrize(("dtype", "merge"), HALVES)
def test_rescales_of_half_precision_are_those_of_one_process(dtype, merge, of_four):
    found, wanted = of_four[0][str(dtype), merge], rescaled_halves(1, dtype, merge)
    assert found.keys() == wanted.keys()
    sums = {key for key in wanted if key.endswith("sum")}
    assert bool(sums) == (merge == "dense")
    assert [key for key in wanted.keys() - sums if not torch.equal(found[key], wanted[key])] == []
    for key in sums:
        # Some processors' libraries sum the product of a part of a matrix in another order than that of the whole.
        assert (found[key] - wanted[key]).abs().max() <= 20 * torch.finfo(torch.float32).eps * wanted[key].abs().max()


KINDS = {"_allgather_base_": "gather", "allreduce_": "sum", "_reduce_scatter_base_": "scatter"}


@pytest.mark.parametrize("name", COUNTED)
def test_a_rescale_sends_what_is_estimated_and_no_weight(name, of_four, of_two):
    for result in (*of_four, *of_two):
        seen = [(KINDS[name], size) for name, size in result["counted"][name]["seen"] if name != "transport"]
        assert seen == result["counted"][name]["said"]
        assert (len(seen) > 2) == (name == "buckets")
    # By hand: lora_A and its gradient in float32; two Gram matrices and a flag in float64.
    one_rank = of_four[0]["counted"]["one rank"]["said"]
    assert one_rank == [("gather", 2 * 4 * 4 * (2 * 6 * 32 + 2 * 48)), ("sum", 14 * 8 * (2 * 8 * 8 + 1))]


def entries(seen):
    """Of the two collectives of a rescale: factors in float32, inner products in float64."""
    (_, gathered), (_, products) = [collective for collective in seen if collective[0] != "transport"]
    return max(gathered // 4, products // 8)


@pytest.mark.parametrize("name", [name for name in COUNTED if name != "buckets"])
def test_no_collective_is_larger_than_four_times_the_larger_factor_of_each_layer(name, of_four, of_two):
    make, *_ = COUNTED[name]
    most = sum(4 * pair.r * max(pair.m, pair.n) for pair in find_lora_pairs(make()))
    for result in (*of_four, *of_two):
        assert entries(result["counted"][name]["seen"]) <= most


def test_a_rescale_by_matrices_gathers_no_more_either(of_four, of_two):
    most = sum(4 * 5 * max(pair.m, pair.n) for pair in find_lora_pairs(llama_of({"r": 5})))
    exact = 3 * 4 * 5 * (2 * 6 * 32 + 2 * 48)
    # Two processes pad to a rank of six; four would to eight, which is too much.
    for results, wanted in ((of_two, ("_allgather_base_", exact * 6 // 5)), (of_four, ("allreduce_", exact))):
        for result in results:
            assert result["counted by matrices"][0] == wanted
            assert entries(result["counted by matrices"]) <= most


def test_a_sum_takes_the_place_of_a_gather_that_pads_more(of_four, of_two):
    assert of_four[0]["counted"]["a rank of one"]["said"][0] == ("sum", 2 * 4 * 1 * (2 * 6 * 32 + 2 * 48))
    assert of_two[0]["counted"]["a rank of one"]["said"][0][0] == "gather"


def test_the_next_bucket_is_gathered_under_a_merge_and_none_after_it(of_four, of_two):
    for result in (*of_four, *of_two):
        seen = [KINDS.get(name, name) for name, _ in result["counted"]["buckets"]["seen"]]
        order = [name for name, following in zip(seen, [*seen[1:], None], strict=True) if name != following]
        count = order.count("gather")
        assert count > 2
        assert order == ["gather", "sum"] + ["gather", "transport", "sum"] * (count - 1) + ["transport"]


def test_buckets_leave_the_bits(of_four):
    assert all(result["same bits in buckets"] for result in of_four)


def test_a_step_of_fsdp_sends_what_is_estimated(of_four):
    seen, said = of_four[0]["step"]
    assert {KINDS[name] for name, _ in seen} == {kind for kind, _ in said}
    for kind, size in said:
        # What a scatter leaves in a process is its part of what is summed.
        found = sum(count * (4 if kind == "scatter" else 1) for name, count in seen if KINDS[name] == kind)
        assert found == size


def test_nobody_waits_for_a_process_that_lacks_a_gradient(of_four):
    for result in of_four:
        assert result["collectives"]["untouched"]
        assert result["collectives"]["metrics"]["scalora/left_alone_share"] == 1


@pytest.mark.parametrize("processes", [4, 2, 1])
def test_a_run_goes_on_from_its_file_in_any_number_of_processes(processes, of_four, of_two, of_one, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the generators of another number of processes
        found = resumed(0, 1, folder / "saved") if processes == 1 else {4: of_four, 2: of_two}[processes][0]["resumed"]
    assert worst(found["weights"], of_one["weights"]) <= 1e-12


def test_the_moments_of_pairs_go_on_too(of_two, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = resumed(0, 1, folder / "pairs", **CASES["matrix, pairs"])
    assert worst(found["weights"], of_two[0]["matrix, pairs"]["weights"]) <= 1e-12


def test_a_file_of_shards_is_one_process_s_file(of_four, folder):
    alone, saved = Run().steps(0, STEPS // 2).engine.state_dict(), read_state(folder / "saved")
    assert saved["base"] == alone["base"]
    assert saved["tensors"].keys() == alone["tensors"].keys()
    for key, value in alone["tensors"].items():
        torch.testing.assert_close(saved["tensors"][key], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_s_checkpoint_is_resumed_to_the_bit(name, of_two, folder):
    for result in of_two:
        whole, again = (result["trainers"][name][key] for key in ("whole", "resumed"))
        assert whole["rescales"]["scalora/rescales"] == 5
        assert all(torch.equal(again["weights"][key], value) for key, value in whole["weights"].items())
        assert torch.equal(again["losses"], whole["losses"])
    assert why_not_resumable(folder / name / "checkpoint-6") is None


def test_a_trainer_that_shards_trains_as_one_that_does_not(of_two):
    for result in of_two:
        found, wanted = result["trainers"]["float32"]["whole"], result["trainers"]["ddp"]
        torch.testing.assert_close(found["losses"], wanted["losses"], rtol=1e-5, atol=0)
        assert worst(found["weights"], wanted["weights"]) <= 1e-5


def test_a_checkpoint_without_the_merges_is_not_resumed(of_two, folder, tmp_path):
    shutil.copytree(folder / "float32" / "checkpoint-3", tmp_path / "checkpoint-3")
    shutil.rmtree(tmp_path / "checkpoint-3" / SHARDED_STATE)
    assert f"has neither {STATE_FILE} nor" in why_not_resumable(tmp_path / "checkpoint-3")


def test_the_best_model_is_not_loaded_without_its_base(of_two):
    for result in of_two:
        assert (
            "load_best_model_at_end=True would load the best adapter onto the last base" in result["trainers"]["best"]
        )


REFUSED = {
    "rowwise": "base weight is split as .*Shard.*tensor parallelism; shard by rows, with fully_shard",
    "colwise": "of lora_A and lora_B one is split and the other not.*tensor parallelism; shard with fully_shard",
    "meta": "base weight is on the meta device",
    "fsdp1": r"base weight is sharded; use fully_shard\(\) \(FSDP2\)",
    "blocks": "AdamW8bit keeps its state in blocks of entries.*with FSDP2 use torch.optim.AdamW",
    "too early": r"sharded since ScaLoRA was attached.*attach ScaLoRA after fully_shard\(\)",
    "start": "is sharded; ",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_ways_of_sharding_are_refused_by_name(name, of_two):
    for result in of_two:
        assert "Unsupported" in result["refusals"][name]
        assert re.search(REFUSED[name], result["refusals"][name]), result["refusals"][name]


def test_whole_parameters_that_an_evaluation_leaves_are_put_back(of_two, of_one):
    alone = attach(adapted())
    for result in of_two:
        assert result["evaluated"]["left whole"]
        assert result["evaluated"]["shards"]
        assert result["evaluated"]["fingerprint"] == alone.state_dict()["base"]
        assert result["evaluated"]["difference"] < 1e-14
