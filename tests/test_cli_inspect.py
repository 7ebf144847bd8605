"""`scalora inspect`, through the command: ranks of the weights on disk, residuals from plain autograd."""

import json
import math
import shutil
from functools import partial
from itertools import pairwise

import pytest
import torch
import yaml
from conftest import WORDS, pairs
from models import tiny_gpt2, tiny_llama
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from typer.testing import CliRunner

import scalora
from scalora.cli import app
from scalora.cli.console import short_names
from scalora.maths.weight_steps import norm_for_turn
from scalora.runs.inspect import inspect_run

QUANTILES = [f"{factor}_p{quantile}" for factor in ("alpha", "beta") for quantile in (10, 50, 90)]
ROWS = 24
TRAINING = {
    "max_steps": 6,
    "per_device_train_batch_size": ROWS,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": 3,
    "gradient_checkpointing": False,
}


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def run_training(tmp_path, name, **settings):
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump({"output_dir": str(tmp_path / name)} | settings))
    result = command("train", config)
    assert result.exit_code == 0, result.stderr[-400:]
    return tmp_path / name


@pytest.fixture(scope="module")
def train(causal_folder, tmp_path_factory):
    """Trains a run of some settings once."""
    folder, runs = tmp_path_factory.mktemp("runs"), {}
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs(ROWS)))

    def run(**settings):
        settings = {"method": "scalora"} | settings
        key = yaml.safe_dump({name: value for name, value in settings.items() if value != {}})
        if key not in runs:
            common = {"model": settings.get("model", str(causal_folder)), "data": {"train": str(data)}}
            common["lora"] = {"r": 4, "lora_alpha": 8} | settings.get("lora", {})
            mode = {} if "optimizer" in settings else {"mode": "auto"}
            common["scalora"] = {"warmup_steps": 2} | mode | settings.get("scalora", {})
            common["training"] = TRAINING | settings.get("training", {})
            runs[key] = run_training(folder, f"run{len(runs)}", **settings | common)
        return runs[key]

    return run


def inspected(run, *words):
    result = command("inspect", run, *words)
    assert result.exit_code == 0, result.stderr[-400:]
    return json.loads((run / "inspect.json").read_text())


def by_name(content):
    return {layer["name"]: layer for layer in content["layers"]}


def tokens_of(row, tokenizer):
    """A prompt and its completion as TRL trains on them: the loss is the completion's and the end token's."""
    prompt, whole = tokenizer(row["prompt"])["input_ids"], tokenizer(row["prompt"] + row["completion"])["input_ids"]
    whole = [*whole, tokenizer.eos_token_id]
    return whole, [-100] * len(prompt) + whole[len(prompt) :]


def full_gradients(model, tokenizer):
    """Of every weight, by plain autograd over all rows, which are one batch here."""
    rows = [tokens_of(row, tokenizer) for row in pairs(ROWS)]
    longest = max(len(tokens) for tokens, _ in rows)
    inputs = torch.tensor([tokens + [tokenizer.pad_token_id] * (longest - len(tokens)) for tokens, _ in rows])
    labels = torch.tensor([wanted + [-100] * (longest - len(wanted)) for _, wanted in rows])
    mask = (torch.arange(longest) < torch.tensor([[len(tokens)] for tokens, _ in rows])).long()
    model.eval()
    model.zero_grad()
    logits = model(input_ids=inputs, attention_mask=mask).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    return {name.removesuffix(".weight"): p.grad.double() for name, p in model.named_parameters()}


def residuals(G, A, B, smoothness_rate):
    """Section 3, densely."""
    r, energy = A.shape[1], G.square().sum()
    terms = [torch.outer(a, G.T @ a) for a in A.T] + [torch.outer(G @ b, b) for b in B.T]
    X = torch.stack([term.flatten() for term in terms], dim=1)
    in_two = torch.stack([X[:, :r].sum(1), X[:, r:].sum(1)], dim=1)
    found = {"none": (G.flatten() - smoothness_rate * X.sum(1)).square().sum() / energy}
    solutions = {}
    for kind, columns in (("scalar", in_two), ("column", X)):
        solutions[kind] = torch.linalg.lstsq(columns, G.flatten()[:, None], driver="gelsd").solution[:, 0]
        found[kind] = (G.flatten() - columns @ solutions[kind]).square().sum() / energy
    U_A, U_B = torch.linalg.qr(A)[0], torch.linalg.qr(B)[0]
    units = torch.eye(r * r, dtype=G.dtype).view(-1, r, r)
    symmetric = units + units.mT
    terms = [U_A @ E @ U_A.T @ G for E in symmetric] + [G @ U_B @ E @ U_B.T for E in symmetric]
    columns = torch.stack([term.flatten() for term in terms], dim=1)
    solution = torch.linalg.lstsq(columns, G.flatten()[:, None], driver="gelsd").solution[:, 0]
    found["matrix"] = (G.flatten() - columns @ solution).square().sum() / energy
    found["polar"] = (G - U_A @ U_A.T @ G - G @ U_B @ U_B.T).square().sum() / energy
    kind = next((kind for kind in ("column", "scalar") if (solutions[kind] > 0).all()), "none")
    found["chosen"] = found[kind]
    found["oracle"] = torch.linalg.svdvals(G)[2 * r :].square().sum() / energy
    return {kind: value.item() for kind, value in found.items()}


def base_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def trained_factors(run, base):
    """The live model of a LoRA or ScaLoRA run on its base, and A and B of every layer."""
    saved_state = (run / "delta").exists()
    live = scalora.load_model(base, run / "delta") if saved_state else PeftModel.from_pretrained(base, run / "adapter")
    factors = {}
    for name, module in live.named_modules():
        if name.endswith("embed_tokens") and hasattr(module, "lora_embedding_B"):
            A, B = module.lora_embedding_B.default, module.lora_embedding_A.default.T
        elif hasattr(module, "lora_B"):
            A, B = module.lora_B.default.weight, module.lora_A.default.weight.T
        else:
            continue
        factors[name.removeprefix("base_model.model.")] = A.detach().double(), B.detach().double()
    return factors


def differences(run, base):
    """Of the trained model's weights on disk to the base's, and the base's, where they differ, (out, in)."""
    before, after = (load_file(folder / "model.safetensors") for folder in (base, run / "model"))
    changed = [name for name in after if "layers." in name and not torch.equal(before[name], after[name])]
    return {
        name.removesuffix(".weight"): (after[name].double() - before[name].double(), before[name].double())
        for name in changed
        if before[name].ndim == 2
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "scalora", "full", "dora"])
def test_the_update_is_the_difference_of_the_weights(method, train, causal_folder):
    run = train(method=method, lora={"target_modules": ["q_proj"]} if method == "dora" else {})
    content = inspected(run, "--batches", 0)
    layers, wanted = by_name(content), differences(run, causal_folder)
    assert content["step"] == 6
    assert len(wanted) == (2 if method == "dora" else 14)
    assert layers.keys() == wanted.keys()
    for name, (update, before) in wanted.items():
        layer, values = layers[name], torch.linalg.svdvals(update)
        assert layer["shape"] == list(update.shape)
        assert layer["numerical_rank"] == int((values > 1e-3 * values[0]).sum())
        assert layer["effective_rank"] == pytest.approx(scalora.effective_rank(update), rel=1e-3)
        assert layer["norm"] == pytest.approx(update.norm().item(), rel=1e-5)
        assert layer["relative_norm"] == pytest.approx((update.norm() / before.norm()).item(), rel=1e-5)
        shown = torch.tensor(layer["singular_values"], dtype=torch.float64)
        torch.testing.assert_close(shown, values[: len(shown)], rtol=1e-3, atol=1e-5 * values[0].item())
        left_out = [values[k:].norm() / values.norm() for k in range(len(values) + 1)]
        assert layer["adapter_rank"] == next(k for k, share in enumerate(left_out) if share <= 1e-3)
        assert layer["residual"] is None


@pytest.mark.slow
def test_the_update_of_lora_has_the_adapters_rank_and_scaloras_more(train):
    ranks = {
        method: [layer["numerical_rank"] for layer in inspect_run(train(method=method), batches=0)["layers"]]
        for method in ("lora", "scalora", "full")
    }
    assert max(ranks["lora"]) <= 4 < min(ranks["scalora"])
    assert min(ranks["full"]) > max(ranks["lora"])


@pytest.mark.slow
def test_what_bfloat16_weights_round_off_is_no_part_of_the_update(train, causal_folder):
    run = train(dtype="bfloat16", scalora={"merge": "dense"})
    layers, rounded = by_name(inspected(run, "--batches", 0)), differences(run, causal_folder)
    assert all(layers[name]["numerical_rank"] < scalora.numerical_rank(update) for name, (update, _) in rounded.items())


# Settings of a run, and what Lη is in them: 1/target_norm², or smoothness · learning rate · scaling².
SCALINGS = {
    "lora": ({"method": "lora"}, 1),
    "scalora": ({}, 1),
    "target norm": ({"scalora": {"target_norm": 2.0, "mode": "scalar"}}, 1 / 4),
    "smoothness": ({"scalora": {"smoothness": 30.0, "merge": "factored"}}, 30 * 1e-2 * 2**2),
    "embedding": ({"method": "lora", "lora": {"target_modules": ["embed_tokens", "v_proj"], "lora_dropout": 0.2}}, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCALINGS)
def test_the_residuals_are_those_of_the_gradient_at_the_trained_weight(kind, train, causal_folder, tokenizer):
    settings, smoothness_rate = SCALINGS[kind]
    run = train(**settings)
    layers = by_name(inspected(run))
    gradients = full_gradients(base_model(run / "model"), tokenizer)
    factors = trained_factors(run, base_model(causal_folder))
    assert layers.keys() == factors.keys()
    for name, (A, B) in factors.items():
        G = gradients[name].T if name.endswith("embed_tokens") else gradients[name]
        residual, expected = layers[name]["residual"], residuals(G, A, B, smoothness_rate)
        if kind == "target norm":  # the run itself never scales columns
            expected["chosen"] = expected["scalar"]
        assert residual == pytest.approx(expected, rel=1e-3, abs=1e-5), name
        ordered = [residual[kind] for kind in ("oracle", "column", "scalar", "none")]
        assert all(less <= more + 1e-12 for less, more in pairwise(ordered))
        assert residual["oracle"] <= residual["matrix"] + 1e-9
        assert residual["matrix"] <= min(residual["column"], residual["polar"]) + 1e-9
        assert layers[name]["shape"] == [len(A), len(B)]


@pytest.mark.slow
@pytest.mark.parametrize(("optimum", "kind"), [("polar", "polar"), ("exact", "matrix")])
def test_a_run_that_rescales_by_matrices(optimum, kind, train):
    run = train(
        scalora={"mode": "matrix", "optimum": optimum, "target_norm": 1.0},
        training={"optim": "sgd", "optim_args": "momentum=0.9"},
    )
    content = inspected(run)
    for layer in content["layers"]:
        assert layer["residual"]["chosen"] == pytest.approx(layer["residual"][kind], rel=1e-3)
    assert content["factors"]["first"].keys() == {"step", "matrix_share", "left_alone_share", *QUANTILES}
    assert content["factors"]["first"]["matrix_share"] == 1


@pytest.mark.slow
def test_the_target_norm_of_each_layer_is_that_of_its_shape(train, causal_folder, tokenizer):
    run = train(optimizer="pair_adamw", training={"learning_rate": 2e-3}, scalora={"turn": 0.1})
    gradients = full_gradients(base_model(run / "model"), tokenizer)
    layers = by_name(inspected(run))
    for name, (A, B) in trained_factors(run, base_model(causal_folder)).items():
        norm = norm_for_turn(0.1, 2e-3, 2.0, len(A), len(B), 4)
        expected = residuals(gradients[name], A, B, norm**-2)
        assert layers[name]["residual"]["none"] == pytest.approx(expected["none"], rel=1e-3)
        assert layers[name]["residual"]["chosen"] == pytest.approx(expected["polar"], rel=1e-3)


@pytest.mark.slow
def test_gradients_of_several_batches_are_summed_and_the_oracle_may_have_another_rank(train, causal_folder, tokenizer):
    run = train(method="lora", training={"per_device_train_batch_size": 8})
    gradients = full_gradients(base_model(run / "model"), tokenizer)
    whole, one = (by_name(inspected(run, "--batches", batches, "--rank", 1)) for batches in (3, 1))
    oracles = {}
    for name in whole:
        values = torch.linalg.svdvals(gradients[name]).square()
        oracles[name] = (values[2:].sum() / values.sum()).item()
        # Each batch's loss is a mean over its own tokens, of which they have nearly the same number.
        assert whole[name]["residual"]["oracle"] == pytest.approx(oracles[name], rel=0.02)
    assert any(one[name]["residual"]["oracle"] != pytest.approx(oracles[name], rel=0.1) for name in one)


@pytest.mark.slow
def test_weights_that_are_stored_transposed(train, tokenizer, tmp_path):
    model = tiny_gpt2()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for method in ("scalora", "full"):
        run = train(model=str(tmp_path / "base"), method=method)
        layers, trained = by_name(inspected(run)), base_model(run / "model")
        assert layers["transformer.h.0.attn.c_attn"]["shape"] == [96, 32]
        for name, layer in layers.items():
            update = trained.get_submodule(name).weight - model.get_submodule(name).weight
            assert layer["norm"] == pytest.approx(update.norm().item(), rel=1e-4)
        if method == "scalora":
            gradients = full_gradients(trained, tokenizer)
            for name, (A, B) in trained_factors(run, base_model(tmp_path / "base")).items():
                expected = residuals(gradients[name].T, A, B, 1)
                assert layers[name]["residual"] == pytest.approx(expected, rel=1e-3, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "scalora"])
def test_a_quantised_base(method, train, tokenizer, tmp_path):
    # bitsandbytes needs at least one quantisation block, 64 inputs, in each row.
    tiny_llama(
        vocab_size=len(tokenizer), eos_token_id=2, pad_token_id=1, hidden_size=64, intermediate_size=64
    ).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run = train(model=str(tmp_path / "base"), quantization="nf4", method=method)
    layers = by_name(inspected(run, "--layers", "v_proj|down_proj"))
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    load = partial(
        AutoModelForCausalLM.from_pretrained, tmp_path / "base", dtype="float32", quantization_config=quantised
    )
    base = load().dequantize()
    merged = PeftModel.from_pretrained(load().dequantize(), run / "adapter").merge_and_unload()
    merged.requires_grad_(True)
    factors, gradients = trained_factors(run, load()), full_gradients(merged, tokenizer)
    assert len(layers) == 4
    for name, layer in layers.items():
        before, after = (model.get_submodule(name).weight.detach().double() for model in (base, merged))
        assert layer["norm"] == pytest.approx((after - before).norm().item(), rel=1e-3)
        assert layer["relative_norm"] == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-3)
        expected = residuals(gradients[name], *factors[name], 1)
        assert layer["residual"] == pytest.approx(expected, rel=2e-2, abs=1e-3), name


@pytest.mark.slow
def test_a_classifier(encoder_folder, tmp_path):
    data = tmp_path / "train.jsonl"
    rows = [{"text": f" {WORDS[i % 10]} {WORDS[i % 3]}", "label": WORDS[i % 3]} for i in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_training(
        tmp_path, "run", model=str(encoder_folder), task="classification", data={"train": str(data)}, training=TRAINING
    )
    layers = by_name(inspected(run))
    assert len(layers) == 13
    assert not any("classifier" in name for name in layers)
    tokens = AutoTokenizer.from_pretrained(encoder_folder)(
        [row["text"] for row in rows], return_tensors="pt", padding=True
    )
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], labels=labels).loss.backward()
    for name, layer in layers.items():
        values = torch.linalg.svdvals(model.get_submodule(name).weight.grad.double()).square()
        oracle = (values[16:].sum() / values.sum()).item()
        assert layer["residual"]["oracle"] == pytest.approx(oracle, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("method", ["lora", "scalora", "full"])
def test_a_checkpoint(method, train):
    run = train(method=method)
    early, late = (inspected(run / "trainer" / f"checkpoint-{step}", "--batches", 0) for step in (3, 6))
    end = inspected(run, "--batches", 0)
    assert (early["step"], late["step"]) == (3, 6)
    assert [layer["norm"] for layer in late["layers"]] == pytest.approx([layer["norm"] for layer in end["layers"]])
    assert all(a["norm"] < 0.9 * b["norm"] for a, b in zip(early["layers"], late["layers"], strict=True))
    if method == "scalora":
        assert early["factors"]["last"]["step"] == 3
        assert late["factors"] == end["factors"]


def test_the_factors_are_those_logged(train, tmp_path):
    run = train()
    logs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logs = {log["step"]: log for log in logs if "scalora/column_share" in log}
    factors = inspected(run, "--batches", 0)["factors"]
    assert [factors[when]["step"] for when in ("first", "middle", "last")] == [3, 5, 6]
    for logged in factors.values():
        assert logged.keys() >= {"alpha_p10", "alpha_p50", "beta_p90", "column_share"}
        assert all(logs[logged["step"]][f"scalora/{key}"] == logged[key] for key in logged if key != "step")
    assert inspect_run(train(method="lora"), batches=0)["factors"] == {}
    shutil.copytree(run, tmp_path / "killed")
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "scalora/column_sh')
    assert inspect_run(tmp_path / "killed", batches=0)["factors"] == factors


@pytest.mark.slow
def test_a_pattern_an_output_file_and_what_is_printed(train, tmp_path):
    run = train()
    result = command("inspect", run, "--layers", r"1\..*_proj$", "--output", tmp_path / "out.json", "--batches", 1)
    assert result.exit_code == 0
    content = json.loads((tmp_path / "out.json").read_text())
    assert content == inspect_run(run, layers=r"1\..*_proj$", batches=1)
    assert len(content["layers"]) == 7
    printed = "".join(result.stdout.split())
    assert all(text in printed for text in ("oracle", "all(7)", "first:step3", "out.json"))
    rows = [line.split() for line in result.stdout.splitlines()]
    for name in ("q_proj", "o_proj", "gate_proj", "down_proj"):  # in one line of 80 characters
        assert any(row[:1] == [f"1.{name}"] and len(row) == 7 for row in rows)
        assert any(row[:2] == [name, "(1)"] and len(row) == 7 for row in rows)


def test_layers_that_share_their_last_name_keep_more_of_it():
    names = ["encoder.layers.0.attn.proj", "encoder.layers.0.mlp.proj", "head"]
    assert short_names(names) == ["0.attn.proj", "0.mlp.proj", "head"]
    assert short_names([names[0], "encoder.layers.0.mlp.fc", "head"]) == ["0.proj", "0.fc", "head"]


def damaged(run, target, change):
    """A copy of a LoRA run with another adapter."""
    shutil.copytree(run, target)
    path = target / "adapter" / "adapter_model.safetensors"
    save_file({key: change(key, value) for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    return target


@pytest.mark.slow
def test_runs_that_cannot_be_inspected_are_named_in_one_line(train, tmp_path):
    lora, unfinished = train(method="lora"), tmp_path / "unfinished"
    shutil.copytree(lora, unfinished)
    (unfinished / "summary.json").unlink()
    pissa = train(method="pissa")
    infinite = damaged(lora, tmp_path / "infinite", lambda key, value: value * (1e30 if "v_proj" in key else 1))
    not_numbers = damaged(lora, tmp_path / "nan", lambda key, value: value * math.nan)
    cases = {
        (tmp_path / "nowhere",): "does not exist",
        (tmp_path,): "not the folder of a run",
        (unfinished,): "is not finished",
        (train(method="lora", save_model=False),): "save_model: false",
        (pissa / "trainer" / "checkpoint-3",): "inspect the finished run",
        (lora, "--layers", "nothing_like_it"): "matches none of the 14 layers",
        (lora, "--layers", "("): "not a regular expression",
        (train(method="full"), "--rank", 2): "no A and B",
        (lora, "--rank", 0): "--rank",
        (infinite, "--layers", "0.self_attn.q_proj"): "the gradient has NaN or infinite entries",
        (not_numbers, "--batches", 0): "the update has NaN or infinite entries",
    }
    for words, named in cases.items():
        result = command("inspect", *words)
        assert result.exit_code == 2, words
        (error,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
        assert named in error
