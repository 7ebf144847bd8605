"""`track`: a progress bar on standard error, so that standard output holds results alone."""

from functools import partial

from rich import progress
from rich.console import Console

track = partial(progress.track, console=Console(stderr=True))
"""`rich.progress.track` on standard error."""
