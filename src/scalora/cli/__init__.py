"""The command line: parsing and printing. Imports the library only inside the command that needs it."""

from scalora.cli.app import app

__all__ = ["app"]
