"""What `save_pretrained` leaves for people and other libraries: a README, and errors that lead to it."""

import pytest
import torch
from models import tiny_llama, trainable, with_lora
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM, pipeline
from typer.testing import CliRunner

import scalora
from scalora import ScaLora, ScaLoraConfig
from scalora.cli import app


def saved(base, folder, merge="dense", **settings):
    """Save a model after one step with a rescale."""
    model = with_lora(AutoModelForCausalLM.from_pretrained(base), r=2, target_modules="all-linear", **settings)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, merge=merge))
    tokens = torch.randint(0, 64, (4, 10), generator=torch.Generator().manual_seed(0))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def state(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    saved(base, folder)
    return folder


def in_fence(text, language):
    """The contents of the only code block in a language."""
    block = text.split(f"```{language}\n")[1]
    return block.split("```")[0]


def test_the_readme_names_the_commands_and_its_python_runs(base, state, tmp_path):
    readme = (state / "README.md").read_text()
    for named in (
        "scalora_state.safetensors",
        "scalora export path/to/this/folder --to adapter",
        "scalora.export_merged(base, folder, output)",
        "scalora.load_model(base, folder)",
        str(base),
    ):
        assert named in readme
    code = in_fence(readme, "python").replace("path/to/this/folder", str(state))
    exec(code.replace("my-adapter", str(tmp_path / "adapter")), {})
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        untouched = AutoModelForCausalLM.from_pretrained(base)(input_ids=tokens).logits
        live = scalora.load_model(AutoModelForCausalLM.from_pretrained(base), state)(input_ids=tokens).logits
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
        # An adapter leaves out up to a thousandth of each layer's update, which this model amplifies.
        assert (model(input_ids=tokens).logits - live).norm() < 5e-2 * (live - untouched).norm()


def test_the_command_that_the_readme_names_makes_the_adapter(base, tmp_path):
    saved(base, tmp_path / "saved", task_type="CAUSAL_LM")
    command = in_fence((tmp_path / "saved" / "README.md").read_text(), "").strip().split()
    words = [str(tmp_path / "saved") if word == "path/to/this/folder" else word for word in command[1:]]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr[-400:]
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved" / "export-adapter")


def test_a_readme_names_no_folder_that_holds_no_model(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    (tmp_path / "files").mkdir()
    model.name_or_path = str(tmp_path / "files")
    model = with_lora(model, r=2, target_modules="all-linear")
    ScaLora(model, torch.optim.AdamW(trainable(model)), ScaLoraConfig(merge="dense"))
    model.save_pretrained(tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved" / "README.md").read_text()


LOADERS = {
    "PeftConfig": lambda base, state: PeftConfig.from_pretrained(state),
    "PeftModel": lambda base, state: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), state),
    "AutoPeftModel": lambda base, state: AutoPeftModelForCausalLM.from_pretrained(state),
    "AutoModel": lambda base, state: AutoModelForCausalLM.from_pretrained(state),
    "pipeline": lambda base, state: pipeline("text-generation", model=str(state)),
    "PreTrainedModel.load_adapter": lambda base, state: AutoModelForCausalLM.from_pretrained(base).load_adapter(state),
    "PeftModel.load_adapter": lambda base, state: adapted(base).load_adapter(state, "second"),
    "hotswap_adapter": lambda base, state: hotswap_adapter(adapted(base), str(state), "default"),
}


def adapted(base):
    return with_lora(AutoModelForCausalLM.from_pretrained(base), r=2, target_modules="all-linear")


@pytest.mark.parametrize("loader", LOADERS)
def test_every_way_to_load_it_as_an_adapter_fails_and_leads_to_the_readme(loader, base, state):
    with pytest.raises((KeyError, OSError), match=r"scalora\.export_adapter.*README\.md"):
        LOADERS[loader](base, state)


def test_a_readme_of_the_users_is_left_alone(base, tmp_path):
    for merge in ("dense", "factored"):
        (tmp_path / merge).mkdir()
        (tmp_path / merge / "README.md").write_text("my notes")
        saved(base, tmp_path / merge, merge)
        assert (tmp_path / merge / "README.md").read_text() == "my notes"


@pytest.mark.slow
def test_a_readme_of_scalora_is_replaced(base, tmp_path):
    saved(base, tmp_path)
    path = tmp_path / "README.md"
    first = path.read_text()
    path.write_text(first.replace(str(base), "another-base"))
    saved(base, tmp_path)
    assert path.read_text() == first
    # A factored remainder is saved as an ordinary adapter, with PEFT's model card.
    saved(base, tmp_path, "factored")
    assert "library_name: peft" in path.read_text()
    assert "scalora_state.safetensors" not in path.read_text()


def test_a_state_without_a_named_base_has_a_readme_too(tmp_path):
    model = with_lora(tiny_llama(), r=2, target_modules="all-linear")
    ScaLora(model, torch.optim.AdamW(trainable(model)), ScaLoraConfig(merge="dense"))
    model.save_pretrained(tmp_path)
    assert "the base model that the run started from" in (tmp_path / "README.md").read_text()
