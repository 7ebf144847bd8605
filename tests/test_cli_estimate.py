"""`scalora estimate`, through the command: against models that are really made, real optimizer state, and by hand."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from models import tiny_gpt2, tiny_llama, trainable
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BitsAndBytesConfig,
    GPT2Config,
    MixtralConfig,
    T5Config,
    ViTConfig,
)
from typer.testing import CliRunner

from scalora import PairAdamW, add_block_signs
from scalora.bench.estimate import Estimate, estimate
from scalora.bench.settings import EstimateSettings
from scalora.cli import app
from scalora.model.adapters import find_lora_pairs
from scalora.model.placement import place_remainders, resolve_merge
from scalora.runs.peak_memory import peak_memory_bytes

LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
# Of its adapted layers: entries, and m + n, summed over layers.
ADAPTED = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
WIDTH = 32 * (4 * 8192 + 3 * (4096 + 11008))

# (m, n) of the tiny Llama's adapted layers, of which it has two each.
TINY = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]


def command(*words):
    return CliRunner().invoke(app, ["estimate", *map(str, words)])


def estimated(tmp_path, folder, *words):
    result = command(folder, *words, "--json", tmp_path / "estimate.json")
    assert result.exit_code == 0, result.output
    return json.loads((tmp_path / "estimate.json").read_text())


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(LLAMA_2_7B))
    return path


@pytest.fixture
def tiny(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def adapted(model, r=4, target_modules="all-linear"):
    return get_peft_model(model, LoraConfig(r=r, target_modules=target_modules))


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj", "embed_tokens, down_proj"])
def test_lora_takes_what_a_real_model_and_a_real_optimizer_take(tiny, tmp_path, targets):
    base = tiny_llama().to(torch.bfloat16)
    parameters, taken = sum(p.numel() for p in base.parameters()), sum(p.nbytes for p in base.parameters())
    names = targets if targets == "all-linear" else targets.replace(" ", "").split(",")
    model = adapted(base, target_modules=names)
    optimizer = torch.optim.AdamW(trainable(model))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    found = estimated(tmp_path, tiny, "--r", 4, "--target-modules", targets)
    count, total = model.get_nb_trainable_parameters()
    assert (found["trainable"], found["parameters"]) == (count, parameters)
    assert found["share"] == count / total
    assert found["layers"] == len(find_lora_pairs(model))
    assert found["memory"]["base"] == taken
    assert found["memory"]["adapter"] == sum(p.nbytes for p in trainable(model))
    assert found["memory"]["gradients"] == sum(p.grad.nbytes for p in trainable(model))
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert found["memory"]["optimizer"] == sum(moment.nbytes for moment in moments)


def test_pair_adamw_takes_what_a_real_one_takes_and_gpus_share_its_first_moments(tiny, tmp_path):
    model = adapted(tiny_llama())
    optimizer = PairAdamW(model)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    sizes = {
        name: sum(state[name].nbytes for state in optimizer.state.values())
        for name in ("exp_avg", "second_moment", "row_weights")
    }
    words = ("--r", 4, "--optimizer", "pair_adamw")
    assert estimated(tmp_path, tiny, *words)["memory"]["optimizer"] == sum(sizes.values())
    of_two = estimated(tmp_path, tiny, *words, "--gpus", 2)["memory"]["optimizer"]
    assert of_two == sum(sizes.values()) - sizes["exp_avg"] / 2


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj", "embed_tokens,down_proj"])
def test_the_adapter_of_block_signs_takes_what_a_real_one_takes(tiny, tmp_path, targets):
    model = adapted(tiny_llama(), target_modules=targets if targets == "all-linear" else targets.split(","))
    add_block_signs(model)
    taken = sum(tensor.nbytes for tensor in get_peft_model_state_dict(model, save_embedding_layers=False).values())
    assert estimated(tmp_path, tiny, "--r", 4, "--target-modules", targets)["signed_adapter"] == taken


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("merge", ["dense", "dense_8bit", "stochastic", "factored"])
def test_the_remainder_takes_what_a_real_one_takes_at_its_largest(tiny, tmp_path, dtype, merge):
    pairs = find_lora_pairs(adapted(tiny_llama().to(getattr(torch, dtype))))
    place_remainders(pairs, merge, 8)
    # Sixteen columns are twice the rank, and a rescale adds four more before they are compressed.
    real = 0
    for pair in pairs:
        remainder = pair.remainder
        if merge != "factored":
            real += 0 if remainder.rounded_off is None else remainder.rounded_off.nbytes
            continue
        for _ in range(4):
            remainder.add(pair.weight, torch.randn(len(pair.lora_B), 4), torch.randn(pair.lora_A.shape[1], 4))
        assert remainder.columns == 16
        real += remainder.left.nbytes + remainder.right.nbytes
    found = estimated(tmp_path, tiny, "--r", 4, "--dtype", dtype, "--merge", merge, "--remainder-rank", 8)
    assert found["merge"] == merge
    assert found["memory"]["remainder"] == real


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("columns", [1, 4, 64])
def test_auto_is_what_training_would_do(tiny, tmp_path, dtype, columns):
    pairs = find_lora_pairs(adapted(tiny_llama().to(getattr(torch, dtype))))
    found = estimated(tmp_path, tiny, "--r", 4, "--dtype", dtype, "--remainder-rank", columns)
    assert found["merge"] == resolve_merge(pairs, "auto", columns)
    for kind in ("nf4", "int8"):
        quantised = estimated(tmp_path, tiny, "--remainder-rank", columns, "--quantization", kind)
        assert quantised["merge"] == "factored"


def test_the_scratch_is_that_of_the_largest_stack(tiny, tmp_path):
    found = estimated(tmp_path, tiny, "--r", 4)
    # Layers, m, n: q and o, k and v, gate and up, down; A and G·B of (m, 4), B and Gᵀ·A of (n, 4): all in float32, and
    # the one or the other two in float64.
    stacks = [(4, 32, 32), (4, 16, 32), (4, 48, 32), (2, 32, 48)]
    scratch = [layers * 2 * 4 * (4 * (m + n) + 8 * max(m, n)) for layers, m, n in stacks]
    assert found["memory"]["scratch"] == max(scratch)


def test_quantised_linear_layers_by_hand(tiny, tmp_path):
    entries = [2 * m * n for m, n in TINY]
    others = tiny_llama()
    rest = 2 * (sum(p.numel() for p in others.parameters()) - sum(entries))
    nf4 = estimated(tmp_path, tiny, "--quantization", "nf4")
    assert nf4["memory"]["base"] == rest + sum(entries) // 2 + 4 * sum(entries) // 64
    int8 = estimated(tmp_path, tiny, "--quantization", "int8")
    assert int8["memory"]["base"] == rest + sum(entries)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_nf4_takes_what_bitsandbytes_takes(make, tmp_path):
    pytest.importorskip("bitsandbytes")
    make().save_pretrained(tmp_path / "model")
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.bfloat16, quantization_config=quantisation
    )
    scales = [p.quant_state.absmax.nbytes for p in model.parameters() if hasattr(p, "quant_state")]
    found = estimated(tmp_path, tmp_path / "model", "--quantization", "nf4")
    assert scales
    assert found["memory"]["base"] == sum(p.nbytes for p in model.parameters()) + sum(scales)


@pytest.mark.slow
def test_a_large_model_by_hand_and_without_its_memory(large, tmp_path):
    before = peak_memory_bytes(cuda=False)
    found = estimated(tmp_path, large)
    assert peak_memory_bytes(cuda=False) - before < 2**30
    assert found["parameters"] == 6_738_415_616
    assert found["trainable"] == 19_988_480
    assert found["memory"] == {
        "base": 2 * 6_738_415_616,
        "adapter": 4 * 19_988_480,
        "gradients": 4 * 19_988_480,
        "optimizer": 8 * 19_988_480,
        "remainder": 4 * WIDTH * (2 * 64 + 8),
        "scratch": 64 * 2 * 8 * (4 * (11008 + 4096) + 8 * 11008),  # gate and up of 32 layers
    }
    assert found["merge"] == "factored"
    rate, tokens = 0.4 * 989e12, 4096
    lora = (4 * (ADAPTED + 32000 * 4096) + 6 * WIDTH * 8) * tokens / rate
    columns = 4 * WIDTH * 1.5 * 64 * tokens / rate
    assert found["seconds"]["lora"] == pytest.approx(lora)
    assert found["seconds"]["columns"] == pytest.approx(columns)
    rescale = sum(found["seconds"]["rescale"].values())
    assert found["overhead"] == {
        "1": pytest.approx((columns + rescale) / lora),
        "10": pytest.approx((columns + rescale / 10) / lora),
    }


@pytest.mark.slow
def test_the_floor_of_a_dense_rescale_by_hand(large, tmp_path):
    # With arithmetic for nothing there is what must move: factors and gradients read; weights read and written; and
    # factors, gradients and moments too.
    dense = "--merge", "dense"
    rescale = estimated(tmp_path, large, *dense, "--bandwidth", 2000, "--float32-tflops", 1e9)["seconds"]["rescale"]
    adapter = 4 * 8 * WIDTH
    assert rescale["grams"] == pytest.approx(2 * adapter / 2e12)
    assert rescale["merge"] == pytest.approx((2 * 4 * ADAPTED + adapter) / 2e12)  # bfloat16 and 2 bytes beside it
    assert rescale["transport"] == pytest.approx(8 * adapter / 2e12)
    fast = "--bandwidth", 2000, "--float32-tflops", 1e9
    rescale = estimated(tmp_path, large, "--merge", "dense_8bit", *fast)["seconds"]["rescale"]
    assert rescale["merge"] == pytest.approx((2 * 3 * ADAPTED + adapter) / 2e12)  # bfloat16 and 1 byte beside it
    rescale = estimated(tmp_path, large, "--merge", "stochastic", *fast)["seconds"]["rescale"]
    assert rescale["merge"] == pytest.approx((2 * 2 * ADAPTED + adapter) / 2e12)  # bfloat16 alone
    # With memory for nothing there is what must be computed.
    rescale = estimated(tmp_path, large, *dense, "--bandwidth", 1e12, "--float32-tflops", 5)["seconds"]["rescale"]
    assert rescale["merge"] == pytest.approx(2 * 8 * ADAPTED / 5e12)
    # In float32 whatever the base is.
    rescale = estimated(tmp_path, large, *dense, "--bandwidth", 1e12, "--tflops", 5)["seconds"]["rescale"]
    assert rescale["merge"] == pytest.approx(2 * 8 * ADAPTED / (0.4 * 67e12))
    single = "--dtype", "float32", "--tflops", 5
    rescale = estimated(tmp_path, large, *dense, "--bandwidth", 1e12, *single)["seconds"]["rescale"]
    assert rescale["merge"] == pytest.approx(2 * 8 * ADAPTED / 5e12)


@pytest.mark.slow
def test_tokens_and_the_machine_scale_the_step(large, tmp_path):
    base = estimated(tmp_path, large, "--merge", "dense")
    longer = estimated(tmp_path, large, "--merge", "dense", "--tokens", 8192)
    slower = estimated(tmp_path, large, "--merge", "dense", "--tflops", 0.4 * 989 / 2)
    for other in (longer, slower):
        assert other["seconds"]["lora"] == pytest.approx(2 * base["seconds"]["lora"])
    assert longer["overhead"]["1"] == pytest.approx(base["overhead"]["1"] / 2)
    single = estimated(tmp_path, large, "--dtype", "float32")
    assert single["settings"]["tflops"] == pytest.approx(0.4 * 67)


@pytest.mark.slow
def test_a_step_of_few_tokens_waits_for_the_weights(large, tmp_path):
    few = estimated(tmp_path, large, "--merge", "dense", "--tokens", 8)
    assert few["seconds"]["lora"] == pytest.approx(2 * few["memory"]["base"] / 3350e9)


@pytest.mark.slow
def test_the_overhead_is_given_at_the_intervals_that_are_asked_for(large, tmp_path):
    result = command(large, "--interval", 5, "--interval", 50, "--json", tmp_path / "estimate.json")
    found = json.loads((tmp_path / "estimate.json").read_text())
    rescale, lora = sum(found["seconds"]["rescale"].values()), found["seconds"]["lora"]
    for interval in (5, 50):
        over = (found["seconds"]["columns"] + rescale / interval) / lora
        assert found["overhead"][str(interval)] == pytest.approx(over)
        assert f"ScaLoRA, I = {interval} " in result.stdout
    assert len(found["overhead"]) == 2


def test_an_encoder_is_estimated_as_what_it_was_saved_as(tmp_path):
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=64)
    for kind in (BertModel, BertForSequenceClassification):
        kind(config).save_pretrained(tmp_path / kind.__name__)
        found = estimated(tmp_path, tmp_path / kind.__name__)
        real = sum(p.numel() for p in kind(config).parameters())
        assert (found["model"], found["parameters"]) == (kind.__name__, real)


@pytest.mark.slow
def test_what_is_printed_is_what_is_written(large, tmp_path):
    result = command(large.parent, "--json", tmp_path / "estimate.json")
    found = json.loads((tmp_path / "estimate.json").read_text())
    assert "6,738,415,616 parameters, bfloat16" in result.stdout
    assert "r = 8 on 224 layers, 19,988,480 trainable parameters (0.296% of all)" in result.stdout
    assert "Without activations" in result.stdout
    assert "4,096 tokens per step, 3350 GB/s, 395.6 TFLOP/s reached, 26.8 by a rescale" in result.stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines() if "|" in line]
    table = {row[0]: row[1:] for row in rows}
    memory, both = found["memory"], ("base", "adapter", "gradients", "optimizer")
    lora = sum(memory[part] for part in both)
    assert table["base weights"] == [f"{memory['base'] / 2**30:.3f}"] * 2
    assert table["remainder"] == ["0.000", f"{memory['remainder'] / 2**30:.3f}"]
    assert table["total"] == [f"{lora / 2**30:.3f}", f"{sum(memory.values()) / 2**30:.3f}"]
    for interval in ("1", "10"):
        step, over = table[f"ScaLoRA, I = {interval}"]
        assert over == f"+{found['overhead'][interval]:.2%}"
        assert float(step) == pytest.approx(1000 * found["seconds"]["lora"] * (1 + found["overhead"][interval]), 1e-3)


MIXTRAL = MixtralConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    vocab_size=64,
)


@pytest.mark.parametrize(
    ("config", "kind", "uncounted"),
    [
        (T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=64), AutoModel, 0),
        (
            ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32),
            AutoModel,
            32 * 3 * 16 * 16 + (1 + 4 + 1) * 32,  # patches; positions of four patches and the class, and the class
        ),
        (GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=64), AutoModelForCausalLM, 0),
        (MIXTRAL, AutoModelForCausalLM, 2 * 4 * 32),  # routers
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_other_kinds_of_models(config, kind, uncounted, tmp_path):
    config.save_pretrained(tmp_path / "model")
    real = kind.from_config(config)
    result = command(tmp_path / "model", "--json", tmp_path / "estimate.json")
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "estimate.json").read_text())
    assert (found["model"], found["parameters"]) == (type(real).__name__, sum(p.numel() for p in real.parameters()))
    assert found["trainable"] == adapted(real, r=8, target_modules="all-linear").get_nb_trainable_parameters()[0]
    assert found["uncounted"] == uncounted
    assert (f"Not in the step: {uncounted:,} parameters" in result.stdout) == (uncounted > 0)


def test_experts_are_counted_by_those_that_a_token_sees(tmp_path):
    MIXTRAL.save_pretrained(tmp_path)
    # A step with so many tokens is limited by arithmetic.
    words = ("--target-modules", "experts.gate_up_proj,experts.down_proj", "--tokens", 10**6)
    few = estimated(tmp_path, tmp_path, *words)
    entries, seen, tokens, rate = 2 * 4 * 3 * 32 * 64, 2 * 2 * 3 * 32 * 64, 10**6, few["settings"]["tflops"] * 1e12
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16) + 64 * 32
    assert few["experts"] == 2 * entries
    assert few["layers"] == 4
    base = 4 * (linear + seen) * tokens
    assert few["seconds"]["lora"] * rate == pytest.approx(base + 2 * seen * tokens + 6 * entries * 8)
    # Their remainders are in the weights, and their lower halves beside them.
    assert few["memory"]["remainder"] == (2 * entries if few["merge"] == "dense" else 0)
    real = AutoModelForCausalLM.from_config(MIXTRAL, dtype=torch.bfloat16)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(real, LoraConfig(r=8, target_modules=[], target_parameters=names))
    pairs = find_lora_pairs(model, all_shapes=True)
    place_remainders(pairs, few["merge"], 64)
    assert sum(pair.remainder.rounded_off.nbytes for pair in pairs) == few["memory"]["remainder"]
    factored = estimated(tmp_path, tmp_path, *words, "--merge", "factored")
    assert factored["seconds"]["columns"] * rate == pytest.approx(6 * entries * 1.5 * 64)


def test_experts_stay_as_they_are_where_linear_layers_are_quantised(tmp_path):
    MIXTRAL.save_pretrained(tmp_path)
    whole, packed = (estimated(tmp_path, tmp_path, *words) for words in ((), ("--quantization", "nf4")))
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16)
    saved = whole["memory"]["base"] - packed["memory"]["base"]
    assert saved == pytest.approx(linear * (2 - 0.5 - 4 / 64))
    assert "They are not quantised" in command(tmp_path, "--quantization", "nf4").stdout


def test_a_layer_that_training_would_refuse_is_refused(tmp_path):
    MIXTRAL.save_pretrained(tmp_path)
    refused(command(tmp_path, "--merge", "dense", "--quantization", "nf4"), "can't merge into nf4 weights")


@pytest.mark.slow
def test_nothing_of_it_is_made(large, monkeypatch):
    made = []
    original = torch.nn.Module.register_parameter

    def watch(self, name, parameter):
        made.append(parameter)
        original(self, name, parameter)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", watch)
    found = estimate(EstimateSettings(large))
    assert isinstance(found, Estimate)
    devices = {parameter.device.type for parameter in made if parameter is not None}
    assert devices == {"meta"}
    assert torch.zeros(1).device.type == "cpu"


# Of the 7B model's adapted layers: m, n and how many there are.
SHAPES = [(4096, 4096, 128), (11008, 4096, 64), (4096, 11008, 32)]
INPUTS = sum(n * count for _, n, count in SHAPES)


@pytest.mark.slow
def test_gpus_that_share_shards_by_hand(large, tmp_path):
    dense = "--merge", "dense", "--r", 16
    alone = estimated(tmp_path, large, *dense)
    found = estimated(tmp_path, large, *dense, "--gpus", 8)
    base, adapter, share = 2 * 6_738_415_616, 4 * 2 * 19_988_480, 7 / 8
    block, outside = 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096), 2 * (2 * 32000 * 4096 + 4096)
    assert found["memory"] == {
        "base": base // 8,
        "adapter": adapter // 8,
        "gradients": adapter // 8,
        "optimizer": 2 * adapter // 8,
        "remainder": alone["memory"]["remainder"] // 8,
        "scratch": alone["memory"]["scratch"] // 8,
        "layers": outside + 2 * block,
        "gathered": 2 * 8 * 16 * INPUTS,  # less than a bucket of 256 MiB
    }
    sums = 224 * 8 * (2 * 32**2 + 1)
    assert found["traffic"]["rescale"] == pytest.approx((8 * 16 * INPUTS + 2 * sums) * share)
    assert found["traffic"]["step"] == pytest.approx((2 * base + 3 * adapter) * share)
    # What is split takes a GPU an eighth of the time, and the solve all of it.
    rescale, whole = found["seconds"]["rescale"], alone["seconds"]["rescale"]
    for part in ("grams", "merge", "transport"):
        assert rescale[part] == pytest.approx(whole[part] / 8)
    assert rescale["solve"] == whole["solve"]
    assert rescale["traffic"] == pytest.approx(found["traffic"]["rescale"] / 50e9)
    assert found["seconds"]["lora"] == pytest.approx(found["traffic"]["step"] / 50e9)  # longer than to compute
    fast = estimated(tmp_path, large, *dense, "--gpus", 8, "--link", 900)
    assert fast["seconds"]["lora"] == pytest.approx(alone["seconds"]["lora"])


@pytest.mark.slow
def test_a_bucket_is_what_is_gathered_at_most(large, tmp_path):
    found = estimated(tmp_path, large, "--merge", "dense", "--r", 128, "--gpus", 8)
    assert 2 * 8 * 128 * INPUTS > found["memory"]["gathered"] > 2**28
    assert found["memory"]["gathered"] <= 2 * 2**28


@pytest.mark.slow
def test_a_factored_remainder_is_whole_on_every_gpu(large, tmp_path):
    found = estimated(tmp_path, large, "--gpus", 8)
    assert found["merge"] == "factored"
    assert found["memory"]["remainder"] == estimated(tmp_path, large)["memory"]["remainder"]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "zero1", "zero2", "zero3"])
def test_other_ways_to_use_gpus_by_hand(large, tmp_path, parallel):
    dense = "--merge", "dense", "--r", 16
    alone = estimated(tmp_path, large, *dense)["memory"]
    found = estimated(tmp_path, large, *dense, "--gpus", 8, "--parallel", parallel)
    memory, adapter, share = found["memory"], 4 * 2 * 19_988_480, 7 / 8
    split = {"ddp": (), "zero1": (), "zero2": ("gradients",), "zero3": ("base", "adapter", "gradients", "remainder")}
    for part in ("base", "adapter", "gradients", "remainder"):
        assert memory[part] == alone[part] // (8 if part in split[parallel] else 1)
    assert memory["optimizer"] == (2 * adapter if parallel == "ddp" else 3 * adapter // 8)
    assert (memory["layers"] > 0) == (parallel == "zero3")
    assert found["traffic"]["rescale"] == pytest.approx(0 if parallel == "ddp" else 8 * 16 * WIDTH * share)
    weights = 2 * (2 * 6_738_415_616 + adapter) if parallel == "zero3" else adapter
    assert found["traffic"]["step"] == pytest.approx((weights + adapter) * share)


@pytest.mark.slow
def test_what_gpus_receive_is_printed(large, tmp_path):
    result = command(large, "--gpus", 8, "--interval", 1, "--interval", 10, "--json", tmp_path / "estimate.json")
    sent = json.loads((tmp_path / "estimate.json").read_text())["traffic"]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("8 GPUs, fsdp2: ")]
    assert f"each receives {sent['step'] / 1e6:,.1f} MB in a step, and {sent['rescale'] / 1e6:,.1f} MB" in line
    share = sent["rescale"] / sent["step"]
    assert f"{share:.2%} with I = 1, {share / 10:.2%} with I = 10" in line
    assert "GPUs" not in command(large).stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--r", "0"], "'--r'"),
        (["--gpus", "0"], "'--gpus'"),
        (["--link", "0"], "--link must be a positive finite number, got 0.0"),
        (["--parallel", "tp"], "--parallel 'tp': must be one of ddp, fsdp2, zero1, zero2, zero3"),
        (["--gpus", "2", "--quantization", "nf4"], "--parallel fsdp2: nf4 weights are not split over GPUs"),
        (["--r", "two"], "'--r'"),
        (["--tokens", "0"], "'--tokens'"),
        (["--remainder-rank", "0"], "'--remainder-rank'"),
        (["--bandwidth", "-1"], "--bandwidth must be a positive finite number, got -1.0"),
        (["--bandwidth", "nan"], "--bandwidth must be a positive finite number, got nan"),
        (["--float32-tflops", "0"], "--float32-tflops must be a positive finite number, got 0.0"),
        (["--interval", "0"], "'--interval'"),
        (["--tflops", "inf"], "--tflops must be a positive finite number, got inf"),
        (["--dtype", "float8"], "--dtype 'float8': the dtypes are float32, bfloat16, float16"),
        (["--quantization", "gguf"], "--quantization 'gguf': must be one of none, nf4, int8"),
        (["--merge", "sparse"], "merge must be one of auto, dense, dense_8bit, stochastic, factored, got 'sparse'"),
        (["--optimizer", "sgd"], "--optimizer 'sgd': must be one of adamw, pair_adamw"),
        (
            ["--optimizer", "pair_adamw", "--gpus", "2", "--parallel", "zero2"],
            "--optimizer pair_adamw with --parallel zero2: DeepSpeed cuts the factors up",
        ),
        (["--merge", "dense", "--quantization", "nf4"], "--merge dense: can't merge into nf4 weights"),
        (["--merge", "dense_8bit", "--quantization", "nf4"], "--merge dense_8bit: can't merge into nf4 weights"),
        (["--merge", "stochastic", "--quantization", "nf4"], "--merge stochastic: can't merge into nf4 weights"),
        (
            ["--target-modules", "q_proj,qq"],
            "--target-modules 'qq': no layer has that name; the names are embed_tokens,",
        ),
        (["--target-modules", ""], "--target-modules '': no layer has that name"),
    ],
)
def test_a_wrong_option_is_one_line(tiny, options, message):
    refused(command(tiny, *options), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist: give a config.json or the folder that holds it"),
        (b"{not json", "can't be read as a model's config"),
        (b"\xff\xfe\x00", "can't be read as a model's config"),
        (b"{}", "can't be read as a model's config"),
        (b"[1, 2]", "can't be read as a model's config"),
        (b'{"model_type": "abacus"}', "can't be read as a model's config"),
        (b'{"model_type": "llama", "hidden_size": "wide"}', "config"),
        (b'{"model_type": "llama", "hidden_size": -64}', "no model can be built from config"),
        (b'{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', "quantised already"),
    ],
)
def test_what_is_no_config_of_a_model_is_said_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    for path in (tmp_path, tmp_path / "config.json"):
        refused(command(path), message)


def test_a_tied_head_takes_a_factored_remainder_only(tmp_path):
    tiny_llama(tie_word_embeddings=True).config.save_pretrained(tmp_path)
    assert "Remainder: factored" in command(tmp_path, "--target-modules", "lm_head").output
    refused(command(tmp_path, "--target-modules", "lm_head", "--merge", "dense"), "its base weight is tied")


def refused(result, message):
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not result.stdout


def test_a_share_of_a_block_counts_as_one(tmp_path):
    # 20 × 30 entries are nine blocks of 64 and a bit.
    settings = {"hidden_size": 20, "intermediate_size": 30, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = tiny_llama(**settings)
    model.config.save_pretrained(tmp_path / "odd")
    linear = [p.numel() for name, p in model.named_parameters() if "proj" in name]
    rest = 2 * (sum(p.numel() for p in model.parameters()) - sum(linear))
    found = estimated(tmp_path, tmp_path / "odd", "--quantization", "nf4")
    assert found["memory"]["base"] == rest + sum(n // 2 + 4 * math.ceil(n / 64) for n in linear)


@pytest.mark.slow
def test_the_plans_on_the_page_are_what_is_estimated():
    script = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "distributed_plans.py"))
    page = script["PAGE"].read_text(encoding="utf-8")
    assert page == script["page"](), "run `python docs/distributed_plans.py`"
    rows = [line for line in page.splitlines() if line.startswith(("| 8B", "| 70B", "| 405B"))]
    assert len(rows) == len(script["PLANS"])
    assert "713 MB of the first row of 70B" in page
    assert "| 249.1 | 713 |" in rows[2]
