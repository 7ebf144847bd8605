"""What ScaLoRA costs and reaches on a GPU: the parts of ``benchmarks/gpu.sh``, which says how to run them.

They need the library's own dependencies only, so that they run wherever torch, Transformers and PEFT are.
"""
