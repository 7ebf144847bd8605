"""Every code block of the docs: Python is run, commands are parsed, and configs are read by the classes that read them.

What can't be run here says why in a comment before it: `<!-- not run: REASON -->`.
"""

import json
import re
import runpy
from collections import Counter

import pytest
import torch
import yaml
from conftest import pairs
from documented import BLOCKS, OTHER_PROGRAMS, PAGES, ROOT, blocks_of, check_command, commands
from models import tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from scalora.cli import app
from scalora.integrations.plugin import PluginSettings
from scalora.rivals import METHODS
from scalora.runs.errors import InputError
from scalora.runs.settings import Settings, load_settings
from scalora.studies.study import Study, load_study_file

HUB_ID = "HuggingFaceTB/SmolLM2-135M"

# What a reader has before the first block of a page, if that says so or it is plain from the text.
BEFORE = {
    "README.md": "dataset = examples()",
    "index.md": "dataset = examples()",
    "loops.md": """
        import scalora, torch
        from scalora import ScaLora, ScaLoraConfig
        model = adapted()
        optimizer = torch.optim.AdamW(model.parameters())
        def evaluate(model): model(input_ids=torch.ones(1, 4, dtype=torch.long))
    """,
    "optimizers.md": """
        import scalora, torch
        from scalora import PairAdamW, ScaLora, ScaLoraConfig
        model = adapted()
    """,
    "distributed.md": """
        import os, torch
        from scalora import ScaLora
        from torch.distributed.fsdp import fully_shard
        torch.distributed.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=0, world_size=1)
        model, folder = adapted(), "state"
    """,
}
PYTHON = sorted({block.page for block in BLOCKS if block.language == "python" and not block.mark})


def of(language):
    return [block for block in BLOCKS if block.language == language and not block.mark]


def named(blocks):
    return {"argvalues": blocks, "ids": map(str, blocks)}


@pytest.fixture
def workplace(tmp_path, monkeypatch, causal_folder):
    """A folder with what the docs name: a model under a hub id, data, an adapter."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / HUB_ID).parent.mkdir()
    (tmp_path / HUB_ID).symlink_to(causal_folder)
    (tmp_path / "MODEL").symlink_to(causal_folder)
    rows = "".join(json.dumps(row) + "\n" for row in pairs(12))
    for name in ("train.jsonl", "eval.jsonl", "data.jsonl"):
        (tmp_path / name).write_text(rows)
    # The docs train on a GPU: TRL's default there is autocast to bfloat16.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_python(blocks, before=""):
    """Run the blocks of a page, one after the other, in one namespace."""
    from datasets import Dataset

    def adapted():
        return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))

    names = {
        "base": tiny_llama,
        "adapted": adapted,
        "examples": lambda: Dataset.from_list(pairs(12)),
        "__name__": "docs",
    }
    exec("\n".join(line.strip() for line in before.splitlines()), names)
    for block in blocks:
        # The line in the page is that of the traceback.
        exec(compile("\n" * block.line + block.text, str(ROOT / "docs" / block.page), "exec"), names)
    return names


def test_every_block_has_a_language_that_a_test_here_takes_or_says_why_not():
    known = {"python", "bash", "yaml", "json", "math", "bibtex"}
    unknown = [
        str(block)
        for block in BLOCKS
        if not block.mark and block.language not in known and not is_of_another_program(block)
    ]
    assert [block for block in unknown if not block.startswith("command.md")] == []  # its usages come from the parser
    assert all(len(block.mark[1]) > 12 for block in BLOCKS if block.mark)
    # Few, and none that is not looked at: raise these when there is no other way.
    assert Counter(block.mark[0] for block in BLOCKS if block.mark) == {"not run": 3, "block": 3}


def is_of_another_program(block):
    if block.language == "python":
        return "llama_cpp" in block.text
    if block.language == "yaml":
        return "merge_method:" in block.text
    words = next(commands(block.text), [""])
    return bool({word.split(".")[0] if word.startswith("vllm") else word for word in words[:3]} & OTHER_PROGRAMS)


@pytest.mark.parametrize("page", PYTHON)
def test_python_runs(page, workplace, causal_folder, without_shape_checks):
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(causal_folder), LoraConfig(r=2))
    adapter.save_pretrained(workplace / "ADAPTER")
    blocks = [block for block in of("python") if block.page == page and not is_of_another_program(block)]
    names = run_python(blocks, BEFORE.get(page, ""))
    if page == "index.md":
        assert (workplace / "sft/adapter/adapter_model.safetensors").is_file()
    if page in ("README.md", "index.md"):  # the model and optimizer that they end with train
        model, optimizer = names["model"], names["optimizer"]
        tokens = torch.full((2, 6), 5)  # no padding, of which nothing is learnt
        before = [parameter.clone() for parameter in model.parameters()]
        for _ in range(2):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        assert any(not torch.equal(*both) for both in zip(before, model.parameters(), strict=True))


def test_a_block_that_is_wrong_fails_with_its_line():
    (block,) = blocks_of("text\n\n```python\nx = 1\nscalora.no_such_name\n```\n", "page.md")
    with pytest.raises(AttributeError) as failure:
        run_python([block], "import scalora")
    assert failure.traceback[-2].lineno + 1 == 5


@pytest.mark.parametrize("block", **named([block for block in of("bash") if not is_of_another_program(block)]))
def test_commands_are_parsed_with_all_their_options(block, workplace):
    for words in commands(block.text):
        check_command(words, workplace)


@pytest.mark.parametrize(
    "command",
    [
        "scalora export runs/latest --too adapter",
        "scalora trian run.yaml",
        "scalora train run.yaml --model MODEL --data.trian x",
        "scalora estimate CONFIG --gpus none",
        "make demos",
        "python recipes/no_such_file.py",
        "python recipes/modalities/vit.py --dat FOLDER",
        "pip install '.[clii]'",
        "nosuchprogram --help",
    ],
)
def test_a_command_that_is_wrong_is_found(command, workplace):
    (words,) = commands(command)
    with pytest.raises(Exception, match=r"."):
        check_command(words, workplace)


INLINE = sorted(
    {
        " ".join(span.split())
        for page in PAGES
        for span in re.findall(r"`(scalora [a-z]+ [^`…]*)`", page.read_text(encoding="utf-8"))
        if "--help" not in span
    }
)


def test_commands_in_the_text_are_parsed_too(workplace):
    assert len(INLINE) > 20
    for command in INLINE:
        check_command(next(commands(re.sub(r"\bN\b", "1", command))), workplace)


@pytest.mark.slow
def test_the_quick_start_by_the_command_runs(workplace):
    (block,) = (block for block in of("bash") if block.page == "index.md" and "scalora train" in block.text)
    for program, *words in commands(block.text):
        assert program == "scalora"
        run = CliRunner().invoke(app, words)
        assert run.exit_code == 0, run.output
        if words == ["config"]:
            (workplace / "run.yaml").write_text(run.output)
    assert (workplace / "runs/latest/export-adapter/adapter_model.safetensors").is_file()
    assert (workplace / "runs/latest/report.html").is_file()


def yaml_problem(text, folder):
    """What scalora says of a part of a config or study file; None if it takes it."""
    content = yaml.safe_load(text)
    path = folder / "part.yaml"
    path.write_text(text)
    data = {"train": "train.jsonl", "eval": "eval.jsonl"}
    try:
        if content.keys() == {"method_options"}:  # those of at least one method
            return min((run_problem(path, content, f"--method={method}") for method in METHODS), key=len) or None
        if content.keys() <= Settings.model_fields.keys():
            return run_problem(path, content) or None
        if content.keys() <= Study.model_fields.keys():
            study = {"output_dir": "study", "seeds": [0], "learning_rates": [1e-3, 2e-3, 4e-3], "methods": {"lora": {}}}
            study |= {"run": {"training": {"max_steps": 20}}} | content
            study["run"] = {"model": "MODEL", **study["run"], "data": data}
            path.write_text(yaml.safe_dump(study))
            load_study_file(path)
            return None
    except InputError as error:
        return str(error)
    return f"{', '.join(content)}: keys of no config and no study"


def run_problem(path, content, *words):
    """What `scalora train` says of a config, completed by what it lacks; an empty text if it takes it."""
    if not content.get("model"):
        words += ("--model=MODEL",)
    if not (content.get("data") or {}).get("train"):
        words += ("--data.train=train.jsonl",)
    if any((content.get("reward") or {}).get(key) for key in ("pattern", "file")):
        words += ("--task=grpo",)
    try:
        load_settings(path, words)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("block", **named([block for block in of("yaml") if not is_of_another_program(block)]))
def test_yaml_is_read_by_the_classes_of_the_command(block, workplace):
    (workplace / "rewards.py").write_text("".join(block.text for block in of("python") if block.page == "data.md"))
    assert yaml_problem(block.text, workplace) is None


@pytest.mark.parametrize(
    "text",
    [
        "data: {trian: a.jsonl}",
        "scalora: {interval: 0}",
        "run: {lora: {rank: 8}}",
        "step_shares: [2]",
        "method_options: {no_such: 1}",
        "plugins: [a]",
    ],
)
def test_yaml_that_is_wrong_is_found(text, workplace):
    assert yaml_problem(text, workplace)


@pytest.mark.parametrize("block", **named([block for block in BLOCKS if block.mark and block.mark[0] == "block"]))
def test_plug_ins_take_their_sections(block):
    (key,) = re.findall(r"the section (\w+)", block.mark[1])
    section = yaml.safe_load(block.text)[key]
    PluginSettings.from_block({name: value for name, value in section.items() if name != "name"})


def slug(heading):
    """The anchor of a heading in a repository's own view."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_in_the_repository(page):
    for link, anchor in re.findall(r"(?<=\]\()(?![a-z]+:)([^)\s#]*)#?([^)\s]*)", page.read_text(encoding="utf-8")):
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor and "." not in anchor:  # not that of a name on an API page, which only the site has
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{link}#{anchor}"


@pytest.mark.parametrize("block", **named(of("json")))
def test_json_is_json(block):
    assert json.loads(block.text)


def test_the_page_of_the_commands_is_that_of_the_parser():
    page = runpy.run_path(str(ROOT / "docs" / "command_page.py"))["page"]
    assert (ROOT / "docs" / "command.md").read_text(encoding="utf-8") == page(), "run `python docs/command_page.py`"
