"""Training in several processes: DistributedDataParallel and FSDP2. May import `model` and below."""
