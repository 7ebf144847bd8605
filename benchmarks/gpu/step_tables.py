"""Markdown tables of what `gpu.steps` has measured."""

from __future__ import annotations

from statistics import median, quantiles
from typing import Any

from scalora.rescaling import PARTS
from scalora.studies.grid import grid

_NONE = "—"
_MIB = 2**20


def tables(results: dict[str, Any]) -> str:
    """All tables, with a line on what they were measured on.

    Args:
        results: the content of ``steps.json``.
    """
    size, measured_on = results["size"], results["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in measured_on["versions"].items() if number)
    sections = [
        f"{measured_on['date']}, {measured_on['device']}, {versions}. Llama with random weights: hidden size "
        f"{size['hidden']}, {size['layers']} layers, MLPs of {size['intermediate']}; r = {size['rank']} on all linear "
        f"layers, {size['batch']} × {size['sequence']} tokens, {size['dtype'].removeprefix('torch.')}.",
    ]
    for checkpointing in (False, True):
        rows = [row for row in results["steps"] if row["checkpointing"] == checkpointing]
        if rows:
            sections += [
                f"{'With' if checkpointing else 'Without'} gradient checkpointing:",
                grid(
                    [
                        "method",
                        "seconds per step",
                        "over LoRA",
                        "middle half",
                        "rounds",
                        "peak memory, MiB",
                        "over LoRA",
                    ],
                    [_steps_row(row) for row in rows],
                ),
            ]
    if results["rescales"]:
        names = [f"{part.removeprefix('scalora::')}, ms" for part in PARTS]
        sections += [
            "A rescale as it is in training, its parts launched one by one, and its floor: every byte moved once at "
            f"{measured_on['bandwidth'] / 1e9:.0f} GB/s, as measured for a copy.",
            grid(
                ["method", "rescale, ms", "floor, ms", "over floor", *names, "merge over its floor"],
                [_rescale_row(row) for row in results["rescales"]],
            ),
        ]
    if results["launches"]:
        names = [part.removeprefix("scalora::") for part in PARTS]
        sections += [
            "Kernels that an optimizer step launches, and how many of them in a rescale:",
            grid(["method", "layers", "step", *names], [_launches_row(row) for row in results["launches"]]),
        ]
    if results["left_out"]:
        left_out = [[row["method"], row["what"], row["why"]] for row in results["left_out"]]
        sections += ["Not measured:", grid(["method", "what", "why"], left_out)]
    return "\n\n".join(sections) + "\n"


def _steps_row(row: dict[str, Any]) -> list[str]:
    ratios = [own / baseline for own, baseline in zip(row["seconds"], row["baseline_seconds"], strict=True)]
    low, _, high = quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
    return [
        row["method"],
        f"{median(row['seconds']):.4f}",
        f"{median(ratios):.3f}",
        f"{low:.3f} … {high:.3f}",
        str(len(row["seconds"])),
        f"{row['peak'] / _MIB:,.0f}" if row["peak"] else _NONE,
        f"{row['peak'] / row['baseline_peak']:.3f}" if row["baseline_peak"] else _NONE,
    ]


def _rescale_row(row: dict[str, Any]) -> list[str]:
    whole, floor = row["whole"], sum(row["floor"].values())
    parts = [f"{1e3 * row['parts'][part]:.3g}" for part in PARTS]
    merge = row["parts"][PARTS[1]] / row["floor"][PARTS[1]]
    return [row["method"], f"{1e3 * whole:.3g}", f"{1e3 * floor:.3g}", f"{whole / floor:.1f}", *parts, f"{merge:.1f}"]


def _launches_row(row: dict[str, Any]) -> list[str]:
    return [row["method"], str(row["layers"]), str(row["in_step"]), *(str(row["in_parts"][part]) for part in PARTS)]
