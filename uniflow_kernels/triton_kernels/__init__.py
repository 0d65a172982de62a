"""Triton kernels, imported where they are launched: the package needs neither Triton nor a GPU."""
