"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "transformers", "peft")


def environment(device: str) -> dict[str, Any]:
    """The date, the device and the versions of what it ran with.

    Args:
        device: name of a torch device.
    """
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = f"{platform.machine()}, {os.cpu_count()} cores", None
    return {
        "date": date.today().isoformat(),
        "device": name,
        "memory": memory,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
