"""Checks of the GPU's kernels, in processes: Triton is configured when it is imported."""
