// Weights from their 4-bit NF4 codes, on CPUs:
//
//   a = absmax * scale + mean        weight = value[code] * a
//
// all in fp32, each operation rounded once, then rounded to the dtype that is asked for: the GPU's bits and the
// reference's. A block of 64 has but 16 different weights. They are made first, in their dtype, and the codes only pick
// among them, by a shuffle where there is one: looked up one by one, in the cache, they took three times as long.
// Memory decides: what is read is an eighth, or a quarter, of what is written.

#include <algorithm>

#include "cpu.h"
#include "nf4.h"

namespace fastgpt {
namespace {

constexpr const char* kName = "dequantize_nf4";
// Below 512 blocks a second thread costs more than it brings.
constexpr int64_t kMinBlocks = 512;

struct Quantized {
  const uint8_t* codes;
  const int8_t* absmax;
  const float *scale, *mean;
};

// The 64 weights of one block, from the 16 that they can be. A shuffle of 16 lanes looks at 4 bits of an index, which
// leaves the code in a byte's low half as it is. 8 lanes from two vectors, for fp32, are what AVX2 and AVX-512 both
// have.
template <typename T>
FASTGPT_INLINE void pick(const uint8_t* codes, const T* values, T* out) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if constexpr (sizeof(T) == 4) {
    typedef uint8_t Bytes __attribute__((vector_size(8)));
    typedef uint16_t Halves __attribute__((vector_size(16)));
    typedef uint32_t Words __attribute__((vector_size(32)));
    Words first, second;
    std::memcpy(&first, values, sizeof first);
    std::memcpy(&second, values + 8, sizeof second);
    for (int64_t i = 0; i < kBytes; i += 8) {
      Bytes bytes;
      std::memcpy(&bytes, codes + i, sizeof bytes);
      const Words both = __builtin_convertvector(__builtin_convertvector(bytes, Halves), Words);
      const Words low = __builtin_shuffle(first, second, both), high = __builtin_shuffle(first, second, both >> 4);
      std::memcpy(out + i, &low, sizeof low);
      std::memcpy(out + i + kBytes, &high, sizeof high);
    }
    return;
  } else if constexpr (sizeof(T) == 2) {
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    typedef uint16_t Halves __attribute__((vector_size(32)));
    Halves all;
    std::memcpy(&all, values, sizeof all);
    for (int64_t i = 0; i < kBytes; i += 16) {
      Bytes bytes;
      std::memcpy(&bytes, codes + i, sizeof bytes);
      const Halves both = __builtin_convertvector(bytes, Halves);
      const Halves low = __builtin_shuffle(all, both), high = __builtin_shuffle(all, both >> 4);
      std::memcpy(out + i, &low, sizeof low);
      std::memcpy(out + i + kBytes, &high, sizeof high);
    }
    return;
  }
#endif
  for (int64_t i = 0; i < kBytes; ++i) {
    out[i] = values[codes[i] & 15];
    out[i + kBytes] = values[codes[i] >> 4];
  }
}

template <typename T>
FASTGPT_INLINE void expand_blocks(const Quantized& q, T* out, int64_t first, int64_t last, int64_t numel) {
  constexpr float table[16] = FASTGPT_NF4;
  for (int64_t block = first; block < last; ++block) {
    const float a = static_cast<float>(q.absmax[block]) * q.scale[block / kAbsmaxes] + *q.mean;
    T values[16];
#pragma omp simd
    for (int64_t i = 0; i < 16; ++i) store(values[i], table[i] * a);
    const int64_t start = block * kBlock;
    if (start + kBlock <= numel) {
      pick(q.codes + block * kBytes, values, out + start);
    } else {
      T last_ones[kBlock];
      pick(q.codes + block * kBytes, values, last_ones);
      std::copy(last_ones, last_ones + (numel - start), out + start);
    }
  }
}

// GCC clones plain functions only, not templates: one a dtype.
#define FASTGPT_EXPAND(T)                                                                                              \
  FASTGPT_CLONES void expand(const Quantized& q, T* out, int64_t first, int64_t last, int64_t numel) {                 \
    expand_blocks<T>(q, out, first, last, numel);                                                                      \
  }
FASTGPT_EXPAND(float)
FASTGPT_EXPAND(double)
FASTGPT_EXPAND(BFloat16)
FASTGPT_EXPAND(Half)
#undef FASTGPT_EXPAND

}  // namespace

Tensor dequantize_nf4(Tensor codes, Tensor absmax, Tensor scale, Tensor mean, int64_t numel, ScalarType dtype) {
  check_nf4(codes, absmax, scale, mean, numel);
  codes = as_contiguous(codes);
  absmax = as_contiguous(absmax);
  scale = as_contiguous(scale);
  Tensor out = make_empty(codes, {numel}, dtype);
  const Quantized q{
      static_cast<const uint8_t*>(codes.const_data_ptr()), static_cast<const int8_t*>(absmax.const_data_ptr()),
      static_cast<const float*>(scale.const_data_ptr()), static_cast<const float*>(mean.const_data_ptr())};
  dispatch_float(out, kName, [&](auto tag) {
    using T = decltype(tag);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const int64_t blocks = absmax.numel();
    for_row_blocks(blocks, row_blocks(blocks, kMinBlocks), [&](int64_t, int64_t first, int64_t last) {
      expand(q, to, first, last, numel);
    });
  });
  return out;
}

}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) { m.impl("dequantize_nf4", TORCH_BOX(&fastgpt::dequantize_nf4)); }
