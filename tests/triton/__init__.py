"""Triton's kernels without a GPU: run in its interpreter (`interpreter`), and compiled for one (`ahead_of_time`)."""

NO_TRITON = "triton is not installed: pip install --no-deps triton"
