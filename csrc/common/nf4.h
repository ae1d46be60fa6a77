// What the 4-bit NF4 format is on CPUs and on GPUs alike; fastgpt/ops/nf4.py says it whole.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace fastgpt {
namespace {

constexpr int64_t kBlock = 64;      // weights of one absmax
constexpr int64_t kBytes = 32;      // a block: byte i has the codes of weight i, in its low half, and of weight i + 32
constexpr int64_t kAbsmaxes = 256;  // of one second-level scale

// The values of the 16 codes, as a macro for arrays of either compiler's memory.
#define FASTGPT_NF4                                                                                                   \
  {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,                   \
   -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,                    \
   0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f}

// The public Python function makes these tensors itself; here it only keeps a direct call from reading past an end.
void check_nf4(const Tensor& codes, const Tensor& absmax, const Tensor& scale, const Tensor& mean, int64_t numel) {
  const int64_t blocks = (numel + kBlock - 1) / kBlock;
  STD_TORCH_CHECK(
      numel >= 0 && codes.scalar_type() == ScalarType::Byte && codes.numel() == blocks * kBytes,
      "dequantize_nf4: codes must be uint8, 32 for each 64 weights");
  STD_TORCH_CHECK(
      absmax.scalar_type() == ScalarType::Char && absmax.numel() == blocks,
      "dequantize_nf4: absmax must be int8, one for each 64 weights");
  STD_TORCH_CHECK(
      scale.scalar_type() == ScalarType::Float && scale.numel() == (blocks + kAbsmaxes - 1) / kAbsmaxes,
      "dequantize_nf4: scale must be float32, one for each 256 of absmax");
  STD_TORCH_CHECK(
      mean.scalar_type() == ScalarType::Float && mean.numel() == 1, "dequantize_nf4: mean must be one float32");
  for (const Tensor& t : {absmax, scale, mean}) {
    STD_TORCH_CHECK(
        t.get_device_index() == codes.get_device_index(), "dequantize_nf4: all tensors must be on one device");
  }
}

}  // namespace
}  // namespace fastgpt
