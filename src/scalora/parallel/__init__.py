"""Training in several processes: DistributedDataParallel. May import `model` and below."""
