"""The proof of the GPU's kernels: cases, a judge in float64, and what runs them in a process.

`interpreted` runs them in Triton's interpreter and `compiled` compiles them, each in a process of
its own: Triton reads which of both it is to do when it is imported.
"""
