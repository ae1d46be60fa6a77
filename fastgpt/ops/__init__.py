"""Fused, differentiable torch ops: one plain-torch reference each, a C++ kernel for CPUs, one kernel for GPUs.

Works without the rest of the library: `from fastgpt import ops`, then `ops.layer_norm(x, weight, bias)` in any model.
"""

from fastgpt.ops.attention import attention, attention_reference
from fastgpt.ops.layer_norm import layer_norm, layer_norm_reference
from fastgpt.ops.lora_linear import lora_linear, lora_linear_reference
from fastgpt.ops.registry import Implementation, implementations, using

__all__ = [
    "Implementation",
    "attention",
    "attention_reference",
    "implementations",
    "layer_norm",
    "layer_norm_reference",
    "lora_linear",
    "lora_linear_reference",
    "using",
]
