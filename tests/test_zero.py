"""DeepSpeed's ZeRO-1, 2 and 3: processes that have runs of every tensor do what one does with the whole batch.

Each number of processes is started once and runs all its cases (`zero_processes`), because starting takes longer than
they do. DeepSpeed is imported in those processes only.
"""

import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import needs_deepspeed
from processes import results_of, worst
from zero_processes import (
    BUCKET,
    CASES,
    HALVES,
    OF_FOUR,
    STEPS,
    ZERO,
    Run,
    adapted,
    in_a_trainer,
    process,
    rescaled,
    resumed,
)

from scalora import StateError
from scalora.parallel.flat import Cut, rectangles
from scalora.saving.checkpoints import last_checkpoint, set_broken_checkpoints_aside, why_not_resumable
from scalora.saving.fingerprint import base_fingerprint
from scalora.saving.state_file import STATE_FILE, read_state, write_state

slow = pytest.mark.slow

# The first start of all compiles an operation of DeepSpeed's.
SECONDS = 300

# Of what is saved, without DeepSpeed.
PLAIN = {key: value for key, value in CASES["ZeRO-3, every step"].items() if key != "stage"}

RESUMED = ("ZeRO-2", "ZeRO-3", "ZeRO-2, bfloat16", "ZeRO-3, bfloat16")


def run_by_deepspeed(processes, folder):
    os.environ |= {"DS_ACCELERATOR": "cpu", "DEEPSPEED_LOG_LEVEL": "error"}
    return results_of(processes, folder, process, seconds=SECONDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def of_four(folder):
    return run_by_deepspeed(4, folder)


@pytest.fixture(scope="module")
def of_two(folder, of_four):
    return run_by_deepspeed(2, folder)  # resumes what four have saved


@pytest.fixture(scope="module")
def alone():
    """What one process without DeepSpeed does."""
    found = {}

    def of(**settings):
        of_run = (
            "groups",
            "accumulate",
            "clip",
            "interval",
            "mode",
            "optimizer",
            "target_norm",
            "merge",
            "remainder_rank",
        )
        settings = {key: value for key, value in settings.items() if key in of_run}
        key = repr(settings)
        if key not in found:
            found[key] = Run(**settings).steps(0, STEPS).result()
        return found[key]

    return of


@pytest.fixture
def of_case(name, of_four, of_two):
    return [result[name] for result in (of_four if name in OF_FOUR else of_two)]


@slow
@needs_deepspeed
@pytest.mark.parametrize("name", CASES)
def test_processes_do_what_one_does_with_the_whole_batch(name, of_case, alone):
    wanted = alone(**CASES[name])
    # In float32; what a compression leaves out depends on the rounding of sums, which is each processor's own.
    bound = 1e-4 if CASES[name].get("merge") == "factored" else 1e-5
    for result in of_case:
        assert worst(result["weights"], wanted["weights"]) <= bound
        torch.testing.assert_close(result["losses"], wanted["losses"], rtol=1e-5, atol=0)
        # The model's own weights, which the next step trains.
        torch.testing.assert_close(result["outputs"], wanted["outputs"], rtol=1e-4, atol=1e-5)
        assert result["metrics"] == pytest.approx(wanted["metrics"], rel=1e-3, abs=1e-3)
        assert result["base"] == wanted["base"]
    assert wanted["metrics"]["scalora/rescales"] == (STEPS - 1) // CASES[name].get("interval", 1)
    assert wanted["metrics"]["scalora/left_alone_share"] < 1


@slow
@needs_deepspeed
@pytest.mark.parametrize("name", CASES)
def test_all_processes_have_the_same_bits(name, of_case):
    first, *others = of_case
    for other in others:
        assert other["metrics"] == first["metrics"]
        assert torch.equal(other["outputs"], first["outputs"])
        assert all(torch.equal(other["weights"][key], value) for key, value in first["weights"].items())


@slow
@needs_deepspeed
@pytest.mark.parametrize(("stage", "dtype", "merge"), HALVES)
def test_rescales_on_given_gradients_are_equal_to_the_bit(stage, dtype, merge, of_four):
    wanted = rescaled(1, dtype, merge)
    for result in of_four:
        found = result[stage, str(dtype), merge]
        assert found.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


@slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_a_rescale_takes_one_collective_which_is_estimated_and_no_weight_is_sent(stage, of_four):
    for result in of_four:
        counted = result["collectives", stage, BUCKET]
        assert counted["seen"] == [("_allgather_base_", 2 * 4 * counted["entries"])]
        assert counted["said"] == [("gather", 2 * 4 * counted["entries"])]


@slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_a_rescale_takes_one_collective_for_each_bucket(stage, of_four):
    for result in of_four:
        counted = result["collectives", stage, 3000]
        said = sum(size for _, size in counted["said"])
        assert len(counted["seen"]) == len(counted["said"]) > 2
        assert said == 2 * 4 * counted["entries"]
        # Of a layer that few processes have, a gather is padded or a sum sends it twice.
        sent = sum((2 if "allreduce" in name else 1) * size for name, size in counted["seen"])
        assert sent == said if stage == 3 else said <= sent <= 2 * said


@slow
@needs_deepspeed
@pytest.mark.parametrize("name", ["ZeRO-2", "ZeRO-3", "plain"])
def test_a_run_goes_on_from_its_file_in_any_number_of_processes(name, of_four, of_two, alone, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the generators of another number of processes
        if name == "plain":
            found = [resumed(0, 1, folder / "saved", **PLAIN)]
        else:
            found = [result["resumed", int(name[-1])] for result in of_two]
    for result in found:
        assert worst(result["weights"], alone(**PLAIN)["weights"]) <= 1e-5


@slow
@needs_deepspeed
def test_without_the_merges_a_run_does_not_go_on(of_four, alone, folder):
    state, base = read_state(folder / "saved"), adapted().state_dict()
    for name in state["tensors"]:
        if name.startswith("weight."):
            state["tensors"][name] = base[f"{name.removeprefix('weight.')}.base_layer.weight"]
    (folder / "control").mkdir()
    write_state(folder / "control" / STATE_FILE, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = resumed(0, 1, folder / "control", **PLAIN)
    assert worst(found["weights"], alone(**PLAIN)["weights"]) > 1e-3


@slow
@needs_deepspeed
def test_the_file_is_one_process_s_file(of_four, folder):
    alone, saved = Run(**PLAIN).steps(0, STEPS // 2).engine.state_dict(), read_state(folder / "saved")
    assert saved["base"] == alone["base"] == base_fingerprint(adapted())
    assert saved["tensors"].keys() == alone["tensors"].keys()
    for key, value in alone["tensors"].items():
        torch.testing.assert_close(saved["tensors"][key], value, rtol=1e-4, atol=1e-5)
    assert saved["optimizer"]["state"].keys() == alone["optimizer"]["state"].keys()
    for number, entries in alone["optimizer"]["state"].items():
        for key, value in entries.items():
            torch.testing.assert_close(saved["optimizer"]["state"][number][key], value, rtol=1e-3, atol=1e-5)


# ---- The Trainer


@pytest.fixture(scope="module")
def without(folder):
    return in_a_trainer(folder / "without", "without", 8)


@slow
@needs_deepspeed
@pytest.mark.parametrize("name", [name for name in ZERO if "bfloat16" not in name and name != "without"])
def test_a_trainer_with_deepspeed_trains_as_one_without(name, of_four, of_two, without):
    for result in [*(of_four if name == "ZeRO-3" else []), *of_two]:
        found = result["trainers"][name]["whole"]
        torch.testing.assert_close(found["losses"], without["losses"], rtol=1e-5, atol=0)
        assert worst(found["weights"], without["weights"]) <= 1e-5
        assert found["metrics"]["scalora/rescales"] == without["metrics"]["scalora/rescales"] == 5
        assert found["base"] == without["base"]


@slow
@needs_deepspeed
@pytest.mark.parametrize("name", RESUMED)
def test_a_trainer_s_checkpoint_is_resumed_to_the_bit(name, of_two, folder):
    for result in of_two:
        whole, again = (result["trainers"][name][key] for key in ("whole", "resumed"))
        assert whole["metrics"]["scalora/rescales"] == again["metrics"]["scalora/rescales"] == 5
        assert all(torch.equal(again["weights"][key], value) for key, value in whole["weights"].items())
        assert torch.equal(again["losses"], whole["losses"])
    assert why_not_resumable(folder / f"{name} 2" / "checkpoint-6") is None


@slow
@needs_deepspeed
def test_a_trainer_without_deepspeed_goes_on_from_its_checkpoint(of_four, without, folder):
    checkpoint = folder / "ZeRO-3 4" / "checkpoint-3"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = in_a_trainer(folder / "goes on", "without", 8, resume=str(checkpoint))
    torch.testing.assert_close(found["losses"], without["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["rates"], without["rates"], rtol=1e-6, atol=0)
    assert worst(found["weights"], without["weights"]) <= 1e-5


@slow
@needs_deepspeed
def test_a_checkpoint_without_the_merges_is_not_resumed(of_two, folder, tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(folder / "ZeRO-3 2" / "checkpoint-3", checkpoint)
    (checkpoint / STATE_FILE).unlink()
    assert f"has neither {STATE_FILE}" in why_not_resumable(checkpoint)
    with pytest.raises(StateError, match=f"has neither {STATE_FILE}"):
        in_a_trainer(tmp_path, "without", 8, resume=str(checkpoint))


@slow
@needs_deepspeed
@pytest.mark.parametrize("name", ["ZeRO-2", "ZeRO-3", "ZeRO-2, bfloat16", "ZeRO-3, bfloat16"])
@pytest.mark.parametrize("cut_short", [False, True])
def test_a_checkpoint_whose_part_of_deepspeed_s_is_not_whole_is_set_aside(name, cut_short, of_two, folder, tmp_path):
    checkpoints = [tmp_path / f"checkpoint-{step}" for step in (3, 6)]
    for checkpoint in checkpoints:
        shutil.copytree(folder / f"{name} 2" / checkpoint.name, checkpoint)
    files = list((checkpoints[1] / "global_step6").iterdir())
    assert len(files) == (4 if "ZeRO-3" in name else 3)
    for path in files:
        content = path.read_bytes()
        if cut_short:
            path.write_bytes(content[: len(content) // 2])
        else:
            path.unlink()
        assert re.search(
            "is cut short" if cut_short else "has no .*: it was cut off", why_not_resumable(checkpoints[1])
        )
        path.write_bytes(content)
        assert why_not_resumable(checkpoints[1]) is None
    files[0].unlink()
    with pytest.warns(UserWarning, match="checkpoint-6' is set aside"):
        set_broken_checkpoints_aside(tmp_path)
    assert last_checkpoint(tmp_path) == checkpoints[0]


@slow
@needs_deepspeed
def test_another_number_of_processes_is_refused_by_name(of_two):
    for result in of_two:
        assert re.search(
            r"can't resume from '.*ZeRO-3 4/checkpoint-3' in 2 processes: DeepSpeed has saved its part in 4, and reads "
            r"it in as many alone: start 4 processes, or go on without DeepSpeed",
            result["fewer"],
        )


@slow
@needs_deepspeed
def test_what_one_process_cannot_save_or_load_is_refused_by_all(of_two):
    first, second = (result["failures"] for result in of_two)
    assert "File too large" in first["disk full"]
    assert re.match("process 0 of 2 failed: .*File too large", second["disk full"])
    assert "nothing" in second["unreadable"]
    assert first["unreadable"].startswith("process 1 of 2 failed: ")
    for found in (first, second):
        assert found["untouched"]
        assert found["earlier"]


@slow
@needs_deepspeed
def test_zero_2_s_model_is_saved_by_one_process(of_two, folder):
    saved, found = read_state(folder / "ZeRO-2 2" / "model"), of_two[0]["trainers"]["ZeRO-2"]["whole"]["weights"]
    for name, weight in found.items():
        lora_A, lora_B = (saved["tensors"][f"trained.{name}.lora_{which}.default.weight"] for which in "AB")
        torch.testing.assert_close(saved["tensors"][f"weight.{name}"] + 8 / 3 * lora_B @ lora_A, weight)


# ---- Refusals, and steps that are skipped

REFUSED = {
    "groups": r"conv1d' is not supported: .*steps lora_A and lora_B in different groups .as with LoRA\+",
    "sub-groups": r"lora_A and lora_B in different groups .*or sub-groups.*leave sub_group_size out",
    "hpz": r"ZeRO\+\+'s secondary copies of weights .hpZ. is not supported",
    "qwz": r"quantised weights .ZeRO\+\+'s qwZ. is not supported",
    "quantised weights": r"DeepSpeed has quantised its base weight; leave out zero_quantized_nontrainable_weights",
    "quantised setting": r"quantised weights .ZeRO\+\+'s qwZ. is not supported",
    "nvme optimizer": r"the optimizer on NVMe .offload_optimizer. is not supported: offload to the CPU",
    "nvme parameters": r"parameters on NVMe .offload_param. is not supported: offload to the CPU",
    "ratio": r"offloaded in part .ratio. is not supported: set offload_optimizer's ratio to 1",
    "too early": r"taken its parameters over since ScaLoRA was attached.*attach ScaLoRA after deepspeed.initialize",
    "too early for stage 3": r"taken its parameters over since .* after deepspeed.initialize",
    "convolution": r"conv' is not supported: it is a convolution, whose factors DeepSpeed's ZeRO cuts",
    "stack of experts": r"experts.*' is not supported: it is a stack of experts, whose factors DeepSpeed's ZeRO cuts",
    "tied": r"conv1d' is not supported: it shares its factors with '.*linear', and DeepSpeed's ZeRO",
    "experts": r"groups of experts .MoE. is not supported",
    "experts of stage 3": r"groups of experts .MoE. is not supported",
    "mpu": r"tensor or pipeline parallelism .mpu. is not supported",
    "mpu of stage 3": r"tensor or pipeline parallelism .mpu. is not supported",
    "zenflow": r"ZenFlow is not supported",
    "zenflow's class": r"ZenFlow .ZenFlowZeroOptimizerSequential. is not supported",
    "muon": r"Muon, which works on matrices is not supported: use AdamW",
    "muon of stage 3": r"Muon is not supported: use AdamW",
    "bf16": r"DeepSpeed's BF16_Optimizer is not supported: use ZeRO stage 1, 2 or 3",
    "fp16": r"DeepSpeed's FP16_Optimizer is not supported: use ZeRO stage 1, 2 or 3",
    "half masters": r"copies of the weights in half precision.*leave out .*bf16_master_weights_and_grads",
    "autocast": r"torch_autocast in float16 is not supported",
    "another version": r"DeepSpeed [0-9.]+ lacks DeepSpeedZeroOptimizer.round_robin_bit16_offsets.*use DeepSpeed 0.19",
    "another version of stage 3": r"DeepSpeed [0-9.]+ lacks DeepSpeedZeroOptimizer_Stage3.grad_position",
    "pairs": r"PairAdamW needs whole pairs of factors.*use torch.optim.AdamW, or FSDP2",
    "blocks": r"AdamW8bit keeps its state in blocks of entries, which DeepSpeed's ZeRO cuts up",
    "pipeline": r"DeepSpeed's pipeline engine is not supported",
    "another optimizer": r"ZeRO-3 has partitioned its base weight, but the optimizer is not DeepSpeed's; pass ",
    "copies": r"DeepSpeed's optimizer steps a copy of its lora_[AB].*pass the optimizer that it or accelerator.prepare",
    "start": r"DeepSpeed's optimizer steps a copy of its lora_[AB].*call this before deepspeed.initialize",
    "start of stage 3": r"its base weight is sharded; call this before deepspeed.initialize",
    "coupled decay": r"with adam_w_mode=False adds its weight_decay to the gradient",
}


@slow
@needs_deepspeed
@pytest.mark.parametrize("name", REFUSED)
def test_what_can_t_be_exact_is_refused_by_name(name, of_two):
    for result in of_two:
        assert re.search(REFUSED[name], result["refusals"][name]), result["refusals"][name]
        assert set(result["refusals"]) == set(REFUSED)


@slow
@needs_deepspeed
def test_a_step_that_overflows_is_neither_counted_nor_rescaled(of_two):
    for result in of_two:
        assert result["overflows"] == [(0, 0.0, True), (1, 1.0, False)]


# ---- Without DeepSpeed


@slow
def test_deepspeed_is_not_imported_for_other_optimizers():
    code = """
import sys
sys.modules["deepspeed"] = None  # an import fails
sys.path.insert(0, "tests")
from models import TwoLayers, backward, trainable, with_lora
import torch
from scalora import ScaLora, ScaLoraConfig
model = with_lora(TwoLayers(), r=2, target_modules=["first", "second"])
optimizer = torch.optim.AdamW(trainable(model))
engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0))
backward(model)
optimizer.step()
print(engine.metrics()["scalora/rescales"])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ran.stdout.strip() == "1.0", ran.stderr


@pytest.mark.parametrize("columns", [1, 3, 7])
def test_rectangles_are_the_entries_of_a_run(columns):
    matrix = torch.arange(5 * columns).view(5, columns)
    for start in range(matrix.numel() + 1):
        for stop in range(start, matrix.numel() + 1):
            found = list(rectangles(slice(start, stop), columns))
            assert len(found) <= 3
            run = matrix.view(-1)[start:stop]
            entries = [run[part.entries].tolist() for part in found]
            assert [matrix[part.rows, part.columns].reshape(-1).tolist() for part in found] == entries
            assert [entry for part in entries for entry in part] == run.tolist()


@pytest.mark.parametrize(("total", "size", "offset"), [(10, 4, 0), (10, 4, 3), (2, 7, 6), (9, 100, 50), (0, 3, 4)])
def test_every_entry_is_in_one_process(total, size, offset):
    cut = Cut(total, size, offset, alone=False)
    entries = [entry for place in range(40) for entry in range(*cut.of(place).indices(total))]
    assert entries == list(range(total))
    assert [place for place in range(40) if cut.of(place).start < cut.of(place).stop] == list(cut.places())
