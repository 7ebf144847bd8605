"""What a rescale does to tensors and to optimizer state: remainder, transport, metrics. May import `maths`."""
