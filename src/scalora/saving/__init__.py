"""What is written and read: states, checkpoints, adapters, merged models. May import `parallel` and what that may."""
