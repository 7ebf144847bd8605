"""The command line: parsing and printing. Imports heavy libraries only inside the command that needs them."""

from scalora.cli.app import app

__all__ = ["app"]
