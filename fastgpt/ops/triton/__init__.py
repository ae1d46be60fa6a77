"""Triton kernels and their launchers. Import these only where Triton is there: `fastgpt.ops` works without it."""
