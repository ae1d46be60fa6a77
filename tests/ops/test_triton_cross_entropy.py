"""The Triton pass over rows of logits under Triton's interpreter: interpreted_cross_entropy.py."""

from interpreter import interpret


def test_kernels():
    interpret("interpreted_cross_entropy.py")
