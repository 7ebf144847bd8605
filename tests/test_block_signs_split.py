"""Block signs where factors are split over processes, by FSDP2 and by DeepSpeed: they do what one process does.

All cases are run by two processes that are started once, because starting takes longer than they do.
"""

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict
from conftest import DEEPSPEED_LACKS, needs_deepspeed
from datasets import Dataset
from models import losses_of, tiny_llama, trainable
from peft import LoraConfig, get_peft_model
from processes import results_of, worst
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from scalora import BlockSignsCallback, PairAdamW, UnsupportedLayerError, add_block_signs

pytestmark = pytest.mark.slow

PROCESSES, BATCH, STEPS = 2, 4, 5
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)

# What is split apart from the whole model, whose parts are split by themselves: a shard is gathered for a layer of the
# decoder, or for a call of one factor.
UNITS = {"decoder layers": ("layers.0", "layers.1"), "factors": ("lora_A.default", "lora_B.default")}
OPTIMIZERS = {
    "PairAdamW": lambda model: PairAdamW(model, lr=1e-2),
    "AdamW": lambda model: torch.optim.AdamW(trainable(model), lr=1e-2),
}

FSDP = {
    "fsdp_version": 2,
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "reshard_after_forward": True,
}
TRAINERS = {
    "fsdp, full": {"fsdp": FSDP | {"state_dict_type": "FULL_STATE_DICT"}},
    "fsdp, full, pairs": {"fsdp": FSDP | {"state_dict_type": "FULL_STATE_DICT"}, "pairs": True},
    "fsdp, shards, pairs": {"fsdp": FSDP | {"state_dict_type": "SHARDED_STATE_DICT"}, "pairs": True},
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": {"stage": 3},
    "ZeRO-3, all parts": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def base():
    return tiny_llama(hidden_size=24, intermediate_size=40)


def signed(blocks=8):
    torch.manual_seed(0)
    model = get_peft_model(base(), LoraConfig(r=3, lora_alpha=4, target_modules="all-linear"))
    add_block_signs(model, blocks)
    return model


def tokens(step):
    return torch.randint(0, 64, (BATCH, 12), generator=torch.Generator().manual_seed(step))


def sharded(units):
    model = signed()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for name, module in list(model.named_modules()):
        if name.endswith(UNITS[units]):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(model, optimizer, part=slice(None)):
    losses = [losses_of(model, optimizer, tokens(step)[part], 1)[0] for step in range(STEPS)]
    return torch.tensor(losses)


def factors(model):
    return {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def by_fsdp(rank, units, name, folder):
    model = sharded(units)
    assert all(isinstance(p, DTensor) for p in trainable(model))
    share = BATCH // PROCESSES
    losses = trained(model, OPTIMIZERS[name](model), slice(rank * share, (rank + 1) * share))
    dist.all_reduce(losses)
    found = factors(model)
    if units == "decoder layers":
        survives_its_own_checkpoints(rank, model, found, folder / name)
    return {"losses": losses / PROCESSES, "factors": found}


def survives_its_own_checkpoints(rank, model, wanted, folder):
    """Zeroed, a model has what torch.distributed.checkpoint has of it, in each of the ways to load it."""

    def loaded(load):
        with torch.no_grad():
            for parameter in trainable(model):
                parameter.zero_()
        load()
        assert all(torch.equal(value, wanted[name]) for name, value in factors(model).items())

    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)

    def from_shards():
        state = get_model_state_dict(model)
        dcp.load({"model": state}, checkpoint_id=folder)
        set_model_state_dict(model, state)

    loaded(from_shards)
    loaded(lambda: set_model_state_dict(model, dict(full), options=StateDictOptions(full_state_dict=True)))
    loaded(lambda: set_model_state_dict(model, dict(full) if rank == 0 else {}, options=BROADCAST))


def takes_no_ordinary_factors_in_silence(rank):
    """What set_model_state_dict says, in the process that has the ordinary factors."""
    model, ordinary = sharded("decoder layers"), signed().state_dict()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    try:
        set_model_state_dict(model, ordinary if rank == 0 else {}, options=options)
    except RuntimeError as error:
        return str(error)
    return ""


def takes_ordinary_factors(model_of):
    """The factors of a split model into which every process has loaded ordinary ones, and those that they are of."""
    torch.manual_seed(5)
    other = signed()
    for parameter in trainable(other):
        torch.nn.init.normal_(parameter, std=0.1)
    model = model_of()
    ordinary = {key: value for key, value in other.state_dict().items() if "lora_" in key}
    model.load_state_dict(ordinary, strict=False)
    return factors(model), factors(other)


def from_the_first_process(rank):
    """The factors that Accelerate sends to a model on the meta device, as with ``cpu_ram_efficient_loading``."""
    full = signed().state_dict()
    model = signed().to("meta")
    fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))
    fsdp2_load_full_state_dict(SimpleNamespace(is_main_process=rank == 0), model, full)
    return factors(model)


def in_a_trainer(folder, *, fsdp=None, pairs=False, resume=None, **zero):
    """A training; of all examples in this process if nothing is split. Returns what is saved in the end."""
    settings = {"per_device_train_batch_size": BATCH}
    if fsdp or zero:
        settings = {"per_device_train_batch_size": BATCH // PROCESSES, "ddp_backend": "gloo"}
    if fsdp:
        settings |= {"fsdp": True, "fsdp_config": dict(fsdp)}
    if zero:
        settings["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True} | zero,
        }
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, use_cpu=True, report_to="none", save_steps=2, bf16=False,
        dataloader_pin_memory=False, disable_tqdm=True, learning_rate=1e-2, adam_epsilon=1e-5, **settings,
    )  # fmt: skip
    if fsdp:  # Accelerate does not shard on CPUs, and says nothing
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    data = Dataset.from_list([{"input_ids": row, "labels": row} for i in range(6) for row in tokens(i).tolist()])
    callbacks = [BlockSignsCallback(8, pair_adamw=True)] if pairs else []
    trainer = Trainer(signed(), arguments, train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    if fsdp:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder / "final"))
    if dist.is_initialized():
        dist.barrier()
    return load_file(folder / "final" / "adapter_model.safetensors")


def trainers(folder):
    results = {}
    for name, settings in TRAINERS.items():
        if "stage" in settings and DEEPSPEED_LACKS:
            continue
        results[name] = {"whole": in_a_trainer(folder / name, **settings)}
        results[name]["resumed"] = in_a_trainer(folder / name, **settings, resume=str(folder / name / "checkpoint-2"))
        AcceleratorState._reset_state(reset_partial_state=True)
    return results


def process(rank, processes, folder, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(folder)
    results = {(units, name): by_fsdp(rank, units, name, folder) for units in UNITS for name in OPTIMIZERS}
    results["ordinary"] = takes_ordinary_factors(lambda: sharded("decoder layers"))
    results["from the first"] = from_the_first_process(rank)
    results["refused"] = takes_no_ordinary_factors_in_silence(rank)
    dist.barrier()
    with pytest.raises(UnsupportedLayerError) as error:
        add_block_signs(fully_shard(get_peft_model(base(), LoraConfig(target_modules="all-linear"))))
    results["too late"] = str(error.value)
    with pytest.raises(RuntimeError) as error:
        sharded("decoder layers").save_pretrained(folder / f"parts of {rank}")
    results["parts"] = str(error.value)
    results["trainers"] = trainers(folder)
    torch.save(results, folder / f"{processes}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    if importlib.util.find_spec("deepspeed"):
        os.environ |= {"DS_ACCELERATOR": "cpu", "DEEPSPEED_LOG_LEVEL": "error"}
    return results_of(PROCESSES, tmp_path_factory.mktemp("split"), process, seconds=300)


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shards_do_what_one_process_does_with_the_whole_batch(units, name, of_two):
    model = signed()
    losses = trained(model, OPTIMIZERS[name](model))
    for result in of_two:
        torch.testing.assert_close(result[units, name]["losses"], losses, rtol=1e-5, atol=0)
        assert worst(result[units, name]["factors"], factors(model)) < 1e-4


def test_ordinary_factors_that_every_process_has_are_loaded(of_two):
    for result in of_two:
        found, wanted = result["ordinary"]
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_model_on_the_meta_device_gets_its_factors_from_the_first_process(of_two):
    for result in of_two:
        assert all(torch.equal(result["from the first"][name], value) for name, value in factors(signed()).items())


def test_ordinary_factors_that_torch_would_drop_are_not_dropped_in_silence(of_two):
    assert "lora_A.default.weight' can't be loaded into a model that is split" in of_two[0]["refused"]


def test_signs_that_come_after_the_shards_are_refused(of_two):
    for result in of_two:
        assert "call add_block_signs before fully_shard()" in result["too late"]


def test_parts_of_factors_are_not_saved(of_two):
    for result in of_two:
        assert "this process has a part of them: gather them in all processes" in result["parts"]


def split_by_zero3(model):
    """What DeepSpeed leaves of the parameters of a model between passes, in place of which it has others."""
    for parameter in trainable(model):
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    return model


def test_empty_factors_are_not_saved(tmp_path):
    model = split_by_zero3(signed())
    for given in ({}, {"state_dict": model.state_dict()}):
        with pytest.raises(RuntimeError, match="this process has a part of them"):
            model.save_pretrained(tmp_path / "adapter", **given)
    assert not (tmp_path / "adapter").exists()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process saves, without pairs and with them."""
    return [in_a_trainer(tmp_path_factory.mktemp("alone"), pairs=pairs) for pairs in (False, True)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_deepspeed if "stage" in TRAINERS[name] else []) for name in TRAINERS]
)
def test_a_trainer_that_splits_saves_the_ordinary_adapter_and_is_resumed(name, of_two, alone):
    for result in of_two:
        found = result["trainers"][name]
        assert worst(found["whole"], alone["pairs" in name]) < 1e-4
        assert all(torch.equal(found["resumed"][key], value) for key, value in found["whole"].items())
