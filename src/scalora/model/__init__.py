"""All knowledge of PEFT's layers: finding LoRA pairs, placing remainders. May import `config`, `rescale`, `maths`."""
