"""Comparisons of methods over learning rates and seeds, and their tables. May import `runs` and below."""
