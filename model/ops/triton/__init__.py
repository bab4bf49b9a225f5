"""Kernels in Triton. Nothing here is imported where Triton may be missing: operations do, when they meet a tensor on a GPU."""
