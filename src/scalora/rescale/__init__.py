"""What a rescale does to tensors and to optimizer state: remainders, transport, metrics. May import `maths`."""
