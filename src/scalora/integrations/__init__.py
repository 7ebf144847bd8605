"""Hooks into other libraries' training loops."""
