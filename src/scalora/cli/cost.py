"""The commands `estimate` and `bench`: what training costs, computed and measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from scalora.bench.settings import (
    ACHIEVED,
    H100_TFLOPS,
    BenchSettings,
    EstimateSettings,
    Parallel,
    Quantization,
    StateOf,
)
from scalora.cli.one_line import Debug, in_one_line
from scalora.config import Dtype, Merge


def _or(values: Sequence[str]) -> str:
    return f"{', '.join(values[:-1])} or {values[-1]}"


def estimate(
    config: Annotated[Path, typer.Argument(help="A model's config.json, or the folder that holds it.")],
    r: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = EstimateSettings.r,
    target_modules: Annotated[
        str, typer.Option(help="Modules to adapt, separated by commas.")
    ] = EstimateSettings.target_modules,
    dtype: Annotated[
        str, typer.Option(help=f"dtype of the base weights: {_or(get_args(Dtype))}.")
    ] = EstimateSettings.dtype,
    quantization: Annotated[
        str, typer.Option(help=f"Quantisation of the base's linear layers: {_or(get_args(Quantization))}.")
    ] = EstimateSettings.quantization,
    optimizer: Annotated[
        str, typer.Option(help=f"Optimizer whose state is counted: {_or(get_args(StateOf))}.")
    ] = EstimateSettings.optimizer,
    merge: Annotated[
        str, typer.Option(help=f"Where the remainder goes: {_or(get_args(Merge))}.")
    ] = EstimateSettings.merge,
    remainder_rank: Annotated[
        int, typer.Option(min=1, help="Columns that a factored remainder keeps.")
    ] = EstimateSettings.remainder_rank,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens per step. The default is one sequence of Llama 2.")
    ] = EstimateSettings.tokens,
    bandwidth: Annotated[
        float, typer.Option(help="Memory bandwidth of the machine in GB/s. The default is that of NVIDIA's H100 SXM.")
    ] = EstimateSettings.bandwidth,
    tflops: Annotated[
        float | None,
        typer.Option(
            help=f"TFLOP/s that training reaches in the base's dtype (default: {ACHIEVED} times the H100 SXM's dense "
            f"peak, which is {H100_TFLOPS[EstimateSettings.dtype]:g} in {EstimateSettings.dtype})."
        ),
    ] = None,
    float32_tflops: Annotated[
        float | None,
        typer.Option(
            help=f"TFLOP/s reached in float32, in which a rescale computes (default: {ACHIEVED} times the H100 SXM's "
            f"{H100_TFLOPS['float32']:g}; --tflops for a float32 base)."
        ),
    ] = None,
    gpus: Annotated[
        int, typer.Option(min=1, help="GPUs that share a copy of the model; each takes --tokens.")
    ] = EstimateSettings.gpus,
    parallel: Annotated[
        str, typer.Option(help=f"How several GPUs train: {_or(get_args(Parallel))}.")
    ] = EstimateSettings.parallel,
    link: Annotated[
        float, typer.Option(help="GB/s that a GPU receives from others. The default is a 400 Gb/s port for each.")
    ] = EstimateSettings.link,
    interval: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Optimizer steps between rescales; can be repeated (default: "
            f"{' and '.join(map(str, EstimateSettings.interval))}).",
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the estimate to this JSON file.")] = None,
    debug: Debug = False,
) -> None:
    """Estimate memory and time of training from a model's config.

    Compares LoRA, ScaLoRA and block signs; no weights are read.
    """

    def run() -> None:
        from scalora.bench.estimate import as_json, markdown
        from scalora.bench.estimate import estimate as make
        from scalora.runs.run_folder import check_output, check_place, write_json

        if json is not None:
            check_place(json, "--json")
            check_output(json, "--json", {"settings", "overhead"})
        settings = EstimateSettings(
            config,
            r=r,
            target_modules=target_modules,
            dtype=dtype,  # type: ignore[arg-type]
            quantization=quantization,  # type: ignore[arg-type]
            optimizer=optimizer,  # type: ignore[arg-type]
            merge=merge,  # type: ignore[arg-type]
            remainder_rank=remainder_rank,
            tokens=tokens,
            bandwidth=bandwidth,
            tflops=tflops,
            float32_tflops=float32_tflops,
            gpus=gpus,
            parallel=parallel,  # type: ignore[arg-type]
            link=link,
            interval=tuple(interval or EstimateSettings.interval),
        )
        found = make(settings)
        typer.echo(markdown(settings, found))
        if json is not None:
            write_json(json, as_json(settings, found))

    in_one_line(run, debug)


def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder or hub id of a causal language model (default: a Llama with random weights)."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Method to measure against LoRA; scalora:10 rescales at every tenth step, scalora+pair_adamw by "
            f"matrices (default: {' and '.join(BenchSettings.methods)})."
        ),
    ] = None,
    width: Annotated[
        list[int] | None,
        typer.Option(min=64, help=f"Hidden size of the random model (default: {BenchSettings.width[0]})."),
    ] = None,
    layers: Annotated[
        list[int] | None,
        typer.Option(min=1, help=f"Number of layers of the random model (default: {BenchSettings.layers[0]})."),
    ] = None,
    rank: Annotated[
        list[int] | None, typer.Option(min=1, help=f"Rank of the adapter (default: {BenchSettings.rank[0]}).")
    ] = None,
    sequence: Annotated[
        list[int] | None, typer.Option(min=2, help=f"Tokens per sequence (default: {BenchSettings.sequence[0]}).")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"dtype of the base weights (default: {BenchSettings.dtype[0]}).")
    ] = None,
    merge: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Where ScaLoRA's remainder goes: {_or(get_args(Merge))} (default: {BenchSettings.merge[0]})."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = BenchSettings.batch,
    device: Annotated[
        str | None, typer.Option(help="Device to train on (default: cuda if available, else cpu).")
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds of interleaved steps; cost ratios are taken within each round.")
    ] = BenchSettings.rounds,
    memory: Annotated[
        bool, typer.Option(help="Also measure peak memory, in a separate process per method.")
    ] = BenchSettings.memory,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: torch's own choice).")] = None,
    native: Annotated[bool, typer.Option(help="Rescale in C++ (on a CPU).")] = BenchSettings.native,
    output: Annotated[Path, typer.Option(help="Folder for the table, the figures and the data.")] = Path("runs/bench"),
    debug: Debug = False,
) -> None:
    """Measure the cost of methods relative to LoRA, and of a rescale.

    Options that take a list can be repeated: their first values make the base case, and each other value is tried
    alone in place of the first.
    """
    # Silences messages of torch's profiler on standard error; read when torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")

    def run() -> None:
        import torch

        from scalora.bench.bench import bench as run_bench
        from scalora.cli.console import progress_line
        from scalora.runs.run_folder import check_output

        check_output(output / "bench.json", "--output", {"environment", "settings", "steps"})
        several = {
            "methods": method,
            "width": width,
            "layers": layers,
            "rank": rank,
            "sequence": sequence,
            "dtype": dtype,
            "merge": merge,
        }
        given: dict[str, Any] = {name: tuple(values) for name, values in several.items() if values}
        settings = BenchSettings(
            model=model,
            batch=batch,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            rounds=rounds,
            memory=memory,
            threads=threads or torch.get_num_threads(),
            native=native,
            **given,
        )
        with progress_line() as announce:
            text = run_bench(settings, output, announce)
        typer.echo(text)

    in_one_line(run, debug)
