"""Training in several processes: DistributedDataParallel, FSDP2 and DeepSpeed's ZeRO. May import `model` and below."""
