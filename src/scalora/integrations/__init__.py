"""Hooks into other libraries' training loops. May import `engine` and what that may."""
