"""Hooks into other libraries' training loops. May import `engine`, `start` and below."""
