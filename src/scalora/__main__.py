"""``python -m scalora``: the command."""

from scalora.cli import app

app()
