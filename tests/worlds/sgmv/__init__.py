"""The proof of the GPU's kernels, run in processes: Triton reads what to do when it is imported."""
