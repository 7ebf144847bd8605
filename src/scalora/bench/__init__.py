"""Measures what methods cost: whole steps in pairs, peak memory, and a rescale by its parts beside its floor."""
