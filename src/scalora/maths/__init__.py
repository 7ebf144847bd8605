"""The mathematics of the paper: pure functions of tensors. Imports nothing of scalora, PEFT or Transformers."""
