"""What knows of other processes: DistributedDataParallel today. May import `model` and what that may."""
