"""The mathematics of the paper as pure functions of tensors. Imports nothing from scalora, PEFT or Transformers."""
