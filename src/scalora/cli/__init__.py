"""The command: ``scalora train`` and ``scalora evaluate``, thin over the library, TRL and Transformers."""

from scalora.cli.app import app

__all__ = ["app"]
