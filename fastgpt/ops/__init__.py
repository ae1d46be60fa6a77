"""Fused, differentiable torch ops: one plain-torch reference each, a C++ kernel for CPUs, one kernel for GPUs.

Works without the rest of the library: `from fastgpt import ops`, then `ops.layer_norm(x, weight, bias)` in any model.
"""

from fastgpt.ops.adamw_step import adamw_step, adamw_step_reference
from fastgpt.ops.add_layer_norm import add_layer_norm, add_layer_norm_reference
from fastgpt.ops.attention import attention, attention_reference
from fastgpt.ops.bias_gelu import bias_gelu, bias_gelu_reference
from fastgpt.ops.clip_grad_norm import clip_grad_norm, clip_grad_norm_reference
from fastgpt.ops.embedding import embedding, embedding_reference
from fastgpt.ops.layer_norm import layer_norm, layer_norm_reference
from fastgpt.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from fastgpt.ops.lora_linear import lora_linear, lora_linear_reference
from fastgpt.ops.nf4 import NF4Weight, dequantize_nf4, dequantize_nf4_reference, quantize_nf4
from fastgpt.ops.registry import Implementation, implementations, using
from fastgpt.ops.split_heads import split_heads

__all__ = [
    "Implementation",
    "NF4Weight",
    "adamw_step",
    "adamw_step_reference",
    "add_layer_norm",
    "add_layer_norm_reference",
    "attention",
    "attention_reference",
    "bias_gelu",
    "bias_gelu_reference",
    "clip_grad_norm",
    "clip_grad_norm_reference",
    "dequantize_nf4",
    "dequantize_nf4_reference",
    "embedding",
    "embedding_reference",
    "implementations",
    "layer_norm",
    "layer_norm_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "lora_linear",
    "lora_linear_reference",
    "quantize_nf4",
    "split_heads",
    "using",
]
