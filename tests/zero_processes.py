"""What the processes of `test_zero` do. DeepSpeed is imported where it is used, in them alone."""

import gc
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig
from datasets import Dataset
from experts import tiny
from models import tiny_llama, trainable, with_lora
from processes import BATCH, Collectives, Layers, data, full_disk
from torch import nn
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
from scalora.parallel import runs
from scalora.parallel.zero import zero_of
from scalora.saving.peft_model import ShardedModelError

STEPS = 22
BUCKET = runs.BUCKET


def adapted(dtype=torch.float32, ranks=None, **settings):
    """Layers with adapters of two ranks."""
    torch.manual_seed(0)
    targets = ["conv1d", "linear", "extra"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about Conv1D
        ranks = ranks or {"r": 3, "rank_pattern": {"linear": 2}}
        model = with_lora(Layers(), target_modules=targets, lora_alpha=4, **ranks, **settings)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    return model


def deep(model, optimizer, processes, *, stage, clip=0.0, accumulate=1, half=None, **zero):
    """DeepSpeed's engine and optimizer."""
    import deepspeed

    if stage == 3:
        zero = {"stage3_param_persistence_threshold": 0} | zero
    config = {
        "train_micro_batch_size_per_gpu": BATCH // processes,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **zero},
    }
    if half:
        config[half] = {"enabled": True}
        if half == "bf16":
            config["data_types"] = {"grad_accum_dtype": "bf16"}
    wrapper, outer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return wrapper, outer


CPU = {"device": "cpu"}
OFFLOADED = {"offload_optimizer": CPU, "offload_param": CPU}
GROUPS = {"two groups": ("linear",), "parted": ("lora_A",)}

CASES = {
    "ZeRO-1, every step": {"stage": 1, "accumulate": 2, "clip": 0.1},
    "ZeRO-2, every tenth": {"stage": 2, "interval": 10, "accumulate": 2, "clip": 0.1},
    "ZeRO-3, every step": {"stage": 3, "accumulate": 2, "clip": 0.1},
    "ZeRO-1, every tenth": {"stage": 1, "interval": 10},
    "ZeRO-2, every step, round robin": {"stage": 2, "round_robin_gradients": True},
    "ZeRO-3, every tenth, persistent": {"stage": 3, "interval": 10, "stage3_param_persistence_threshold": 10**5},
    "ZeRO-2, offloaded": {"stage": 2, "offload_optimizer": CPU, "clip": 0.1},
    "ZeRO-3, offloaded": {"stage": 3, **OFFLOADED, "clip": 0.1},
    "ZeRO-2, two groups": {"stage": 2, "groups": "two groups"},
    "ZeRO-3, two groups": {"stage": 3, "groups": "two groups"},
    "ZeRO-2, a layer at a time": {"stage": 2, "bucket": 300},
    "ZeRO-3, matrix, sgd": {"stage": 3, "mode": "matrix", "optimizer": "sgd", "target_norm": 1.0},
    "ZeRO-2, matrix, sgd": {"stage": 2, "mode": "matrix", "optimizer": "sgd", "target_norm": 1.0},
    "ZeRO-3, factored": {"stage": 3, "merge": "factored", "remainder_rank": 64},
}
OF_FOUR = ("ZeRO-1, every step", "ZeRO-2, every tenth", "ZeRO-3, every step")

# Where a gradient nearly vanishes, Adam's own eps of 1e-8 would turn a rounding error into a step of another sign.
OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, eps=1e-5),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=3e-2, momentum=0.9),
}


class Run:
    """A training run, of this process's part of each batch; without DeepSpeed if there is no stage."""

    def __init__(self, rank=0, processes=1, *, stage=None, optimizer="adamw", groups=None, bucket=None, **settings):
        self.rank, self.processes, self.stage = rank, processes, stage
        self.accumulate, self.clip = settings.pop("accumulate", 1), settings.pop("clip", 0.0)
        half = settings.pop("half", None)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(half, torch.float32)
        zero = {key: value for key, value in settings.items() if key not in ScaLoraConfig.__dataclass_fields__}
        config = {key: value for key, value in settings.items() if key not in zero}
        self.model = adapted(dtype)
        runs.BUCKET = bucket or BUCKET
        parameters = trainable(self.model)
        if groups is not None:
            first = [p for n, p in self.model.named_parameters() if p.requires_grad and GROUPS[groups][0] in n]
            others = [p for p in parameters if not any(p is one for one in first)]
            parameters = [{"params": others}, {"params": first, "lr": 5e-3}]
        self.optimizer = OPTIMIZERS[optimizer](parameters)
        self.forward = self.model
        if stage is not None:
            settings = {"accumulate": self.accumulate, "clip": self.clip, "half": half, **zero}
            self.forward, self.optimizer = deep(self.model, self.optimizer, processes, stage=stage, **settings)
        self.engine = ScaLora(self.forward, self.optimizer, ScaLoraConfig(warmup_steps=1, **config))
        self.losses = []

    def steps(self, first, last):
        for step in range(first, last):
            for part in range(self.accumulate):
                x, y = (t.chunk(self.processes)[self.rank] for t in data(step * self.accumulate + part))
                loss = (self.forward(x) - y).float().square().mean()
                if self.stage is None:
                    (loss / self.accumulate).backward()
                else:
                    self.forward.backward(loss)
                    self.forward.step()
                self.losses.append(mean(loss, self.processes))
            if self.stage is None:
                if self.clip:
                    nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return self

    def result(self):
        x, _ = data(10**6)
        metrics = self.engine.metrics()
        with torch.no_grad():
            outputs = self.forward(x)
        state = self.engine.state_dict()
        return {
            "weights": effective(self.engine, state),
            "losses": torch.tensor(self.losses),
            "metrics": metrics,
            "outputs": outputs,
            "base": state["base"],
        }


def mean(loss, processes):
    loss = loss.detach().clone()
    if processes > 1:
        dist.all_reduce(loss)
    return loss.item() / processes


def effective(engine, state=None):
    """Of each layer, W and all that is added to it."""
    tensors, weights = (state or engine.state_dict())["tensors"], {}
    for pair in engine.pairs:
        lora_A, lora_B = (tensors[f"trained.{key}"] for key in pair.keys)
        weight = pair.scaling * lora_B @ lora_A
        if (dense := tensors.get(f"weight.{pair.name}")) is not None:
            weight = pair.oriented(dense).float() + weight
        else:
            weight = weight + tensors[f"left.{pair.name}"] @ tensors[f"right.{pair.name}"].mT
        weights[pair.name] = weight
    return weights


def check_divided(run):
    """What one process has of the weights and of the optimizer's state."""
    optimizer, total = run.engine.optimizer, sum(pair.r * (pair.m + pair.n) for pair in run.engine.pairs)
    moments = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    assert total / run.processes <= moments <= total / run.processes + 50
    for pair in run.engine.pairs:
        if run.stage == 3:
            assert pair.weight.ds_tensor.numel() == -(-pair.m * pair.n // run.processes)
        else:
            assert pair.weight.numel() == pair.m * pair.n


def resumed(rank, processes, folder, **settings):
    run = Run(rank, processes, **settings)
    run.engine.load(folder)
    assert run.engine.step == STEPS // 2
    return run.steps(STEPS // 2, STEPS).result()


# ---- Rescales on given gradients

HALVES = [
    (2, torch.bfloat16, "dense"),
    (3, torch.float32, "dense"),
    (3, torch.bfloat16, "dense"),
    (3, torch.bfloat16, "dense_8bit"),
    (3, torch.bfloat16, "stochastic"),
    (3, torch.float16, "dense"),
    (3, torch.float16, "stochastic"),
]


def rescaled(processes, dtype, merge, stage=None):
    """Bits after rescales on given gradients."""
    model = adapted(dtype)
    outer = optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    if stage is not None:
        model, outer = deep(model, optimizer, processes, stage=stage)
    engine = ScaLora(model, outer, ScaLoraConfig(warmup_steps=0, merge=merge))
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        give_gradients(engine, outer, generator)
        outer.step() if stage is None else outer._optimizer_step(0)
    state = engine.state_dict()["tensors"]
    bits = {key: value.int() if key.startswith("rounded_off.") else value for key, value in state.items()}
    assert engine.metrics()["scalora/rescales"] == 5
    assert ("rounded_off.base_model.model.extra" in bits) == (dtype != torch.float32 and merge != "stochastic")
    pairs = engine.pairs
    if stage == 3 and merge != "stochastic" and dtype != torch.float32:
        assert all(pair.remainder.rounded_off.numel() == -(-pair.m * pair.n // processes) for pair in pairs)
    return bits


def give_gradients(engine, optimizer, generator):
    zero = zero_of(optimizer)
    for flat in zero.flats if zero else []:
        flat.grad = torch.zeros_like(flat)
    for pair in engine.pairs:
        for factor, shape in ((pair.lora_A, (pair.r, pair.n)), (pair.lora_B, (pair.m, pair.r))):
            gradient = torch.randn(shape, generator=generator)
            if zero is None:
                factor.grad = gradient
            else:
                run = zero.run_of(factor)
                run.of(run.flat.grad).put(gradient)


def collectives_of_a_rescale(processes, stage, bucket):
    model = with_lora(tiny_llama(num_hidden_layers=1), r=4, target_modules="all-linear")
    runs.BUCKET = bucket
    said = rescale_collectives(find_lora_pairs(model), "dense", f"zero{stage}", processes)
    wrapper, optimizer = deep(model, torch.optim.SGD(trainable(model), lr=0.0), processes, stage=stage)
    engine = ScaLora(wrapper, optimizer, ScaLoraConfig(warmup_steps=0))
    give_gradients(engine, optimizer, torch.Generator().manual_seed(1))
    with Collectives() as counted:
        optimizer._optimizer_step(0)
    assert engine.metrics()["scalora/left_alone_share"] == 0
    runs.BUCKET = BUCKET
    return {
        "seen": counted.seen,
        "said": [tuple(collective) for collective in said],
        "entries": sum(pair.r * (pair.m + pair.n) for pair in engine.pairs),
    }


# ---- A Trainer

TEXTS = torch.randint(0, 64, (64, 10), generator=torch.Generator().manual_seed(0)).tolist()
ZERO = {
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "ZeRO-1, offloaded, DeepSpeedCPUAdam": {"stage": 1, "offload_optimizer": CPU, "cpu_adam": True},
    "ZeRO-2, offloaded": {"stage": 2, "offload_optimizer": CPU},
    "ZeRO-3, offloaded, persistent": {"stage": 3, **OFFLOADED},
    "ZeRO-2, bfloat16": {"stage": 2, "bf16": True},
    "ZeRO-3, bfloat16": {"stage": 3, "bf16": True, "merge": "factored"},
    # Last: what Ulysses puts in the place of attention stays there.
    "ZeRO-3, sequences": {"stage": 3, "stage3_param_persistence_threshold": 0, "sequences": True},
    "without": None,
}


def in_a_trainer(folder, name, per_process, *, steps=6, resume=None, merge="dense"):
    """A training with the callback."""
    zero = dict(ZERO[name]) if ZERO[name] else None
    half = bool(zero and zero.pop("bf16", False))
    merge = zero.pop("merge", merge) if zero else merge
    cpu_adam = bool(zero and zero.pop("cpu_adam", False))  # Accelerate's default with an optimizer on the CPU
    sequences = bool(zero and zero.pop("sequences", False))
    model = with_lora(
        tiny_llama(num_hidden_layers=1), r=3, target_modules=["q_proj", "down_proj"], modules_to_save=None
    )
    if half:
        for key, parameter in model.named_parameters():
            parameter.data = parameter.data.bfloat16() if "lora_" not in key else parameter.data
    settings = {}
    if zero is not None:
        settings["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": cpu_adam,
            "bf16": {"enabled": half},
            "zero_optimization": zero,
        }
        settings["ddp_backend"] = "gloo"
    if sequences:  # each process has half of the positions of the same examples
        handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
        settings["parallelism_config"] = ParallelismConfig(sp_backend="deepspeed", sp_size=2, sp_handler=handler)
        per_process *= 2
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=per_process, use_cpu=True, bf16=half,
        gradient_accumulation_steps=2, max_grad_norm=0.5, report_to="none", save_steps=3,
        dataloader_pin_memory=False, disable_tqdm=True, logging_steps=1, learning_rate=1e-2,
        adam_epsilon=1e-5, **settings,
    )  # fmt: skip
    callback = ScaLoraCallback(ScaLoraConfig(warmup_steps=1, merge=merge))
    positions = {"position_ids": list(range(len(TEXTS[0])))}  # Ulysses asks for them
    examples = Dataset.from_list([{"input_ids": row, "labels": row} | positions for row in TEXTS])
    trainer = Trainer(model, arguments, train_dataset=examples, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    engine = callback.engine
    losses = torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])
    rates = torch.tensor([log["learning_rate"] for log in trainer.state.log_history if "loss" in log])
    assert engine.is_sharded == (zero is not None)
    assert (type(engine.optimizer).__name__ == "DeepSpeedCPUAdam") == cpu_adam
    if zero is not None and zero["stage"] == 3:
        assert all(pair.weight.ds_tensor.numel() < pair.m * pair.n for pair in engine.pairs)
        if merge == "dense":
            with pytest.raises(ShardedModelError) as error:
                trainer.model.save_pretrained(folder / "model")
            assert "ScaLora.save(folder) in all processes" in str(error.value)
    elif zero is not None and dist.get_rank() == 0:
        trainer.model.save_pretrained(folder / "model")
    return {
        "weights": effective(engine),
        "losses": losses,
        "rates": rates,
        "metrics": engine.metrics(),
        "base": engine.state_dict()["base"],
    }


def trainers(folder, processes):
    results = {}
    for name, zero in ZERO.items():
        if zero is None or (processes == 4 and name != "ZeRO-3"):
            continue
        whole = in_a_trainer(folder / f"{name} {processes}", name, 8 // processes)
        results[name] = {"whole": whole}
        dist.barrier()
        if "offloaded" not in name and "sequences" not in name and processes == 2 and name != "ZeRO-1":
            checkpoint = folder / f"{name} {processes}" / "checkpoint-3"
            results[name]["resumed"] = in_a_trainer(checkpoint.parent, name, 8 // processes, resume=str(checkpoint))
    return results


# ---- What is refused


def message(call):
    with pytest.raises((UnsupportedLayerError, UnsupportedOptimizerError)) as error:
        call()
    return f"{type(error.value).__name__}: {error.value}"


ABSENT = object()


def refusals(processes):
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    def initialized(stage, optimizer=torch.optim.AdamW, groups=trainable, **zero):
        model = adapted(ranks={"r": 2})
        return deep(model, optimizer(groups(model), lr=1e-3), processes, stage=stage, **zero)

    def attached(*arguments, **settings):
        return message(lambda: ScaLora(*initialized(*arguments, **settings)))

    found = {
        2: initialized(2),
        3: initialized(3, offload_optimizer=CPU),
    }

    def with_setting(stage, name, value, of=lambda outer: outer):
        """A message where one attribute is another one, or absent."""
        wrapper, outer = found[stage]
        holder = of(outer)
        before = getattr(holder, name, None)
        delattr(holder, name) if value is ABSENT else setattr(holder, name, value)
        try:
            return message(lambda: ScaLora(wrapper, outer))
        finally:
            setattr(holder, name, before)

    def lora_plus(model):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return [{"params": [p for name, p in named if ("lora_B" in name) == is_B]} for is_B in (False, True)]

    def of_class(name):
        return with_setting(2, "__class__", type(name, (DeepSpeedZeroOptimizer,), {}))

    def quantised():
        weight = next(
            p for name, p in found[3][0].module.named_parameters() if name.endswith("conv1d.base_layer.weight")
        )
        weight.ds_tensor.ds_quant_scale = torch.ones(1)
        told = message(lambda: ScaLora(*found[3]))
        del weight.ds_tensor.ds_quant_scale
        return told

    def piped():
        model, wrapper = (
            adapted(),
            type("PipelineModule", (nn.Module,), {"__module__": "deepspeed.runtime.pipe.module"})(),
        )
        wrapper.inner = model
        return message(lambda: ScaLora(wrapper, torch.optim.AdamW(trainable(model))))

    def in_pairs():
        model = adapted(ranks={"r": 2})
        wrapper, outer = deep(model, PairAdamW(model, lr=1e-3), processes, stage=2)
        return message(lambda: ScaLora(wrapper, outer, ScaLoraConfig(mode="matrix", merge="factored")))

    def too_early(stage):
        """What the first step of all says, long before a rescale."""
        model = adapted(ranks={"r": 2})
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
        ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=50, interval=100))
        wrapper, _ = deep(model, optimizer, processes, stage=stage)
        x, y = data(0)
        wrapper.backward((wrapper(x) - y).square().mean())
        return message(wrapper.step)

    def no_matrix(inner, **settings):
        """What is said of layers that are no single matrix."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = with_lora(inner, r=2, **settings)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
        return message(lambda: ScaLora(*deep(model, optimizer, processes, stage=2)))

    def tied():
        """Where a layer has a twin. DeepSpeed itself fails to send the twin's factors to several processes."""
        wrapper, outer = found[2]
        first, second, *_ = find_lora_pairs(wrapper.module, masters=True)
        return message(lambda: zero_of(outer).check_pairs([replace(first, twin=second)], {}))

    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

    blocks = type("AdamW8bit", (torch.optim.AdamW,), {"__module__": "bitsandbytes.optim.adamw"})
    muon = type("MuonWithAuxAdam", (torch.optim.AdamW,), {})
    module = found[3][0].module
    return {
        "groups": attached(2, groups=lora_plus),
        "sub-groups": attached(3, sub_group_size=30),
        "muon": attached(2, optimizer=muon),
        "blocks": attached(2, optimizer=blocks),
        "pairs": in_pairs(),
        "pipeline": piped(),
        "another optimizer": message(lambda: ScaLora(module, torch.optim.AdamW(trainable(module)))),
        "copies": message(lambda: ScaLora(found[2][0], torch.optim.AdamW(trainable(found[2][0])))),
        "start": message(lambda: optimal_start(found[2][0].module, lambda: None)),
        "start of stage 3": message(lambda: optimal_start(module, lambda: None)),
        "hpz": with_setting(3, "zero_hpz_partition_size", 2),
        "qwz": with_setting(3, "zero_quantized_weights", True, of=lambda outer: outer.parameter_offload),
        "quantised weights": quantised(),
        "quantised setting": with_setting(3, "zero_quantized_nontrainable_weights", True),
        "nvme optimizer": with_setting(3, "swap_optimizer", True),
        "nvme parameters": with_setting(3, "params_in_nvme_and_cpu", True),
        "ratio": with_setting(3, "partial_offload", 0.5),
        "too early": too_early(2),
        "too early for stage 3": too_early(3),
        "convolution": no_matrix(Patches(), target_modules=["conv"]),
        "stack of experts": no_matrix(tiny("mixtral"), target_parameters=["experts.down_proj"], target_modules=[]),
        "tied": tied(),
        "experts": with_setting(2, "has_moe_layers", True),
        "experts of stage 3": with_setting(3, "sub_group_process_groups", [dist.new_group([0])]),
        "mpu": with_setting(2, "model_parallel_world_size", 2),
        "mpu of stage 3": with_setting(3, "model_parallel_group", dist.group.WORLD),
        "zenflow": with_setting(2, "zenflow", True),
        "zenflow's class": of_class("ZenFlowZeroOptimizerSequential"),
        "muon of stage 3": with_setting(3, "use_muon", True),
        "bf16": of_class("BF16_Optimizer"),
        "fp16": of_class("FP16_Optimizer"),
        "half masters": with_setting(2, "master_weights_and_grads_dtype", torch.bfloat16),
        "autocast": with_setting(2, "torch_autocast_gradscaler", torch.amp.GradScaler("cpu")),
        "another version": with_setting(2, "round_robin_bit16_offsets", ABSENT),
        "another version of stage 3": with_setting(3, "grad_position", ABSENT),
        "coupled decay": with_setting(2, "adam_w_mode", False, of=lambda outer: outer.optimizer),
    }


def failures(rank, processes, folder):
    """Of saving and of loading, where one process alone can't."""
    run = Run(rank, processes, stage=3).steps(0, 2)
    run.engine.save(folder / "failing")
    dist.barrier()
    before, messages = effective(run.engine), {}
    run.steps(2, 3)
    with full_disk(rank == 0), pytest.raises(OSError, match="File too large") as error:
        run.engine.save(folder / "failing")
    messages["disk full"] = str(error.value)
    dist.barrier()
    now = effective(run.engine)
    with pytest.raises(StateError) as unreadable:
        run.engine.load(folder / ("failing" if rank == 0 else "nothing"))
    messages["unreadable"] = str(unreadable.value)
    messages["untouched"] = same(effective(run.engine), now)
    run.engine.load(folder / "failing")
    messages["earlier"] = same(effective(run.engine), before) and not same(now, before)
    return messages


def same(found, wanted):
    return all(torch.equal(found[key], value) for key, value in wanted.items())


def overflowing(processes):
    """Steps that DeepSpeed skips because of an overflow, and one that it takes."""
    model = adapted(torch.float16)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    wrapper, outer = deep(model, optimizer, processes, stage=2)
    engine = ScaLora(wrapper, outer, ScaLoraConfig(warmup_steps=0))
    x, y = data(0)
    counts = []
    before = effective(engine)
    outer.check_grad_overflow = True
    for scale in (float("inf"), 1.0):
        wrapper.backward((wrapper(x).float() - y).square().mean() * (scale if dist.get_rank() == 0 else 1.0))
        wrapper.step()
        same = all(torch.equal(weight, before[name]) for name, weight in effective(engine).items())
        counts.append((engine.step, engine.metrics().get("scalora/rescales", 0.0), same))
    return counts


def process(rank, processes, folder, port):
    import deepspeed

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage in every start with ZeRO-3
    deepspeed.init_distributed("gloo", verbose=False)
    folder = Path(folder)
    results = {}
    for name, settings in CASES.items():
        if (name in OF_FOUR) == (processes == 4):
            run = Run(rank, processes, **settings).steps(0, STEPS)
            if "sgd" not in name:
                check_divided(run)
            results[name] = run.result()
    if processes == 4:
        for stage, dtype, merge in HALVES:
            results[stage, str(dtype), merge] = rescaled(processes, dtype, merge, stage)
        for stage in (2, 3):
            for bucket in (BUCKET, 3000):
                results["collectives", stage, bucket] = collectives_of_a_rescale(processes, stage, bucket)
        saving = Run(rank, processes, **CASES["ZeRO-3, every step"]).steps(0, STEPS // 2)
        saving.engine.save(folder / "saved")
        dist.barrier()
    else:
        for stage in (2, 3):
            settings = {**CASES["ZeRO-3, every step"], "stage": stage}
            results["resumed", stage] = resumed(rank, processes, folder / "saved", **settings)
        results["refusals"] = refusals(processes)
        results["overflows"] = overflowing(processes)
        results["failures"] = failures(rank, processes, folder)
        with pytest.raises(StateError) as error:
            in_a_trainer(folder / "fewer", "ZeRO-3", 4, resume=str(folder / "ZeRO-3 4" / "checkpoint-3"))
        results["fewer"] = str(error.value)
    results["trainers"] = trainers(folder, processes)
    torch.save(results, folder / f"{processes}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
