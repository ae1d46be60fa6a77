"""Attention's Triton kernels under Triton's interpreter: interpreted_attention.py."""

import pytest
from interpreter import interpret


def test_kernels():
    interpret("interpreted_attention.py")


@pytest.mark.slow
def test_kernels_at_the_lengths_that_the_trusted_libraries_use():
    interpret("interpreted_attention.py", "-m", "slow")
