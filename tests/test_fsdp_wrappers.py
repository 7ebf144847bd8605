"""FSDP2 with what users put around it: checkpointed and compiled layers, offloading, half precision, other meshes."""

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
from peft import LoraConfig, get_peft_model
from processes import BATCH, data, results_of, worst
from test_fsdp import adapted, effective, full, in_a_trainer, sharded, start
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor
from transformers import DistributedConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer
from trl import SFTConfig, SFTTrainer

from scalora import ScaLora, ScaLoraCallback, ScaLoraConfig, UnsupportedLayerError, load_model
from scalora.saving.state_file import read_state

pytestmark = pytest.mark.slow

STEPS = 6

TRAINERS = {
    "plain": {},
    "checkpointed": {"fsdp_settings": {"activation_checkpointing": True}},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
}


class Trained:
    """Some steps of a model, attached, in float64 unless it has a dtype of its own."""

    def __init__(self, model, **config):
        self.model = model
        self.optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        self.engine = ScaLora(model, self.optimizer, ScaLoraConfig(warmup_steps=1, **config))

    def steps(self, loss_of, *, sum_gradients=False):
        losses = []
        for index in range(STEPS):
            loss = loss_of(self.model, index)
            loss.backward()
            losses.append(loss.detach())
            for parameter in trainable(self.model) if sum_gradients else ():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
            self.optimizer.step()
            self.optimizer.zero_grad()
        assert self.engine.metrics()["scalora/rescales"] == STEPS - 1
        return {"weights": effective(self.engine), "losses": torch.stack(losses).double()}


def regression(rank=0, processes=1, sequences=1):
    """The loss of `Layers` on a process's part of a batch, and of each sequence of it."""

    def loss(model, index):
        batch, part = divmod(rank, sequences)
        x, y = (t.chunk(processes // sequences)[batch].chunk(sequences, dim=1)[part] for t in data(index))
        return (model(x) - y.double()).square().mean()

    return loss


def language(rank=0, processes=1):
    def loss(model, index):
        tokens = torch.randint(0, 64, (BATCH, 10), generator=torch.Generator().manual_seed(index))
        tokens = tokens.chunk(processes)[rank]
        return model(input_ids=tokens, labels=tokens).loss

    return loss


def llama():
    return with_lora(tiny_llama(), r=3, target_modules="all-linear")


def context_parallel(rank, processes):
    """Weights are split over batches and parts of sequences at once: Accelerate's ``dp_shard_cp``."""
    mesh = init_device_mesh("cpu", (2, processes // 2), mesh_dim_names=("dp_shard", "cp"))
    flat = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    model = adapted()
    fully_shard(model.base_model.model.mixed.linear, mesh=flat)
    fully_shard(model, mesh=flat)
    trained = Trained(model)
    assert all(pair.weight.device_mesh.size() == processes for pair in trained.engine.pairs)
    return trained.steps(regression(rank, processes, sequences=2))


def offloaded(rank, processes):
    trained = Trained(sharded(adapted(), processes, offload_policy=CPUOffloadPolicy(pin_memory=False)))
    return trained.steps(regression(rank, processes))


def half_compute(rank, processes):
    """bfloat16 copies of float32 shards; rescales are of the shards."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(llama(), processes, mp_policy=policy)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, merge="dense"))
    before = effective(engine), [full(pair.weight).clone() for pair in engine.pairs]
    language(rank, processes)(model, 0).backward()
    optimizer.step()
    return {
        "dtypes": {t.dtype for pair in engine.pairs for t in (pair.weight, pair.lora_A, pair.lora_B)},
        "function": worst(effective(engine), before[0]),
        "merged": min((full(p.weight) - w).norm() / w.norm() for p, w in zip(engine.pairs, before[1], strict=True)),
    }


def sharded_at_load(rank, processes, folder):
    """Transformers shards the base; PEFT's adapter is whole beside it, and its gradients are averaged by hand."""
    base = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=processes))
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear"))
    with torch.no_grad():
        for (name, parameter), (_, value) in zip(
            model.named_parameters(),
            with_lora(tiny_llama(), r=3, target_modules="all-linear").named_parameters(),
            strict=True,
        ):
            if "lora_" in name:
                parameter.copy_(value)
    trained = Trained(model)
    assert all(isinstance(pair.weight, DTensor) for pair in trained.engine.pairs)
    assert not any(isinstance(pair.lora_A, DTensor) for pair in trained.engine.pairs)
    return trained.steps(language(rank, processes), sum_gradients=True)


def in_sft(folder, tokenizer, batch, fsdp, kind="SHARDED_STATE_DICT", resume=None):
    """TRL's trainer, which wraps the model in an adapter itself."""
    rows = Dataset.from_list([{"text": f"{word} {word} {n}"} for n in range(8) for word in ("red", "blue", "green")])
    settings = {
        "fsdp": True,
        "fsdp_config": {
            "fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": kind,
        },
    }  # fmt: skip
    arguments = SFTConfig(
        str(folder), max_steps=4, per_device_train_batch_size=batch, use_cpu=True, report_to="none", bf16=False,
        gradient_checkpointing=False, dataloader_pin_memory=False, disable_tqdm=True, logging_steps=1, save_steps=2,
        **(settings | {"ddp_backend": "gloo"} if fsdp else {}),
    )  # fmt: skip
    if fsdp:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    callback = ScaLoraCallback(ScaLoraConfig(warmup_steps=1, merge="dense"))
    base = tiny_llama(vocab_size=len(tokenizer))
    trainer = SFTTrainer(
        base, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[callback],
        peft_config=LoraConfig(r=3, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    assert callback.engine.is_sharded == fsdp
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {"weights": effective(callback.engine), "losses": torch.tensor(losses)}


def stages(rank, processes):
    """Models of which this process has some layers."""
    messages = {}
    model = llama()
    model.base_model.model.model.layers[1] = PipelineIdentityLayer()
    stage = PipelineStage(llama(), rank, processes, torch.device("cpu"))
    for name, part in (("transformers", model), ("torch", stage)):
        with pytest.raises(UnsupportedLayerError) as error:
            ScaLora(part, torch.optim.AdamW([nn.Parameter(torch.ones(1))]))
        messages[name] = str(error.value)
    return messages


def process(rank, processes, folder, port):
    start(rank, processes, port)
    folder = Path(folder)
    warnings.simplefilter("ignore")
    results = {
        "context parallel": context_parallel(rank, processes),
        "offloaded": offloaded(rank, processes),
        "half compute": half_compute(rank, processes),
        "sharded at load": sharded_at_load(rank, processes, folder / "base"),
        "stages": stages(rank, processes),
    }
    for name, settings in TRAINERS.items():
        results[name] = in_a_trainer(folder / name, batch=1, **settings)
        PartialState._reset_state()
        AcceleratorState._reset_state(True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    results["sft"] = in_sft(folder / "sft", tokenizer, 1, fsdp=True)
    torch.save(results, folder / f"{processes}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("wrappers")
    tiny_llama().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def of_four(folder):
    return results_of(4, folder, process)


@pytest.mark.parametrize("name", ["context parallel", "offloaded"])
def test_gradients_are_of_the_whole_batch(name, of_four):
    wanted = Trained(adapted()).steps(regression())
    for result in of_four:
        assert worst(result[name]["weights"], wanted["weights"]) <= 1e-12
    torch.testing.assert_close(torch.stack([r[name]["losses"] for r in of_four]).mean(dim=0), wanted["losses"])


def test_rescales_are_of_float32_shards_where_bfloat16_computes(of_four):
    for result in of_four:
        assert result["half compute"]["dtypes"] == {torch.float32}
        assert result["half compute"]["function"] < 1e-6
        assert result["half compute"]["merged"] > 1e-4


def test_a_base_that_was_sharded_when_it_was_loaded(of_four):
    wanted = Trained(llama()).steps(language())
    for result in of_four:
        assert worst(result["sharded at load"]["weights"], wanted["weights"]) <= 1e-5


@pytest.mark.parametrize("name", ["checkpointed", "compiled"])
def test_wrappers_change_nothing(name, of_four, folder):
    for result in of_four:
        torch.testing.assert_close(result[name]["losses"], result["plain"]["losses"], rtol=1e-5, atol=0)
        assert worst(result[name]["weights"], result["plain"]["weights"]) <= 1e-5
    found, wanted = (read_state(folder / kind / "checkpoint-6") for kind in (name, "plain"))
    assert found["base"] == wanted["base"]
    assert found["tensors"].keys() == wanted["tensors"].keys()
    for key, tensor in wanted["tensors"].items():
        torch.testing.assert_close(found["tensors"][key], tensor, rtol=1e-3, atol=1e-6)


def test_sft_trains_as_one_process(of_four, folder, tokenizer):
    wanted = in_sft(folder / "sft alone", tokenizer, 4, fsdp=False)
    for result in of_four:
        torch.testing.assert_close(result["sft"]["losses"], wanted["losses"], rtol=1e-5, atol=0)
        assert worst(result["sft"]["weights"], wanted["weights"]) <= 1e-5
    model = load_model(tiny_llama(vocab_size=len(tokenizer)), folder / "sft" / "checkpoint-4")
    merged = dict(model.merge_and_unload().named_parameters())
    found = {name: merged[f"{name.removeprefix('base_model.model.')}.weight"].detach() for name in wanted["weights"]}
    assert worst(found, wanted["weights"]) <= 1e-5


def test_stages_of_a_pipeline_are_refused_by_name(of_four):
    for result in of_four:
        assert "layers.1' is not supported: another stage of a pipeline has it" in result["stages"]["transformers"]
        assert "PipelineStage is a stage of a pipeline" in result["stages"]["torch"]
        assert all("fully_shard() (FSDP2)" in message for message in result["stages"].values())
