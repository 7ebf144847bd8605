"""The version, read by the build and by ``scalora --version``."""

__version__ = "0.1.0"
