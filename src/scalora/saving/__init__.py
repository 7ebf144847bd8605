"""Saving and loading: states, checkpoints, adapters, merged models. May import `parallel` and below."""
