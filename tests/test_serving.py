"""`benchmarks/serving/run.py` with the one program that is always there: PEFT."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import pairs
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

RUN = Path(__file__).parents[1] / "benchmarks" / "serving" / "run.py"


@pytest.fixture
def environments(tmp_path):
    """A folder of environments, with that of PEFT alone."""
    python = tmp_path / "environments" / "peft" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "environments" / "peft" / "ready").touch()
    return tmp_path / "environments"


@pytest.mark.slow
def test_right_and_wrong_answers_are_counted_and_what_is_not_installed_is_named(
    environments, causal_folder, write_jsonl, tmp_path
):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(causal_folder), settings)
    model.save_pretrained(adapter)
    model.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(causal_folder).save_pretrained(merged)
    # The adapter is right, but the base that it names is not the one that it belongs to.
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(merged)}))

    options = ["--environments", environments, "--only", "peft", "vllm", "--prompts", 4]
    words = [RUN, causal_folder, adapter, merged, write_jsonl("rows.jsonl", pairs(6)), *options]
    found = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)
    assert "| peft | adapter: PeftModel | 4 of 4 | peft " in found.stdout, found.stderr[-500:]
    assert "| peft | base | 0 of 4 | peft " in found.stdout
    assert "| vllm | skipped: not installed |" in found.stdout
    assert found.returncode == 1
    assert found.stderr.strip().endswith("not as they should be: peft, adapter: AutoPeftModel")
