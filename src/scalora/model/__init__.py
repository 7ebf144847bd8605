"""PEFT's layers: finding LoRA pairs, attaching remainders. May import `config`, `rescale` and below."""
