// What the CPU kernels share: dtype dispatch, function clones per instruction set, and a split of rows over threads
// that depends on nothing but their number.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "tensor.h"

// One binary serves every x86-64: GCC compiles a function so marked once per instruction set, and the loader picks.
// The body that it calls must be FASTGPT_INLINE, or it stays compiled for the baseline. musl and macOS lack ifunc.
#ifdef FASTGPT_CLONES  // defined empty under AddressSanitizer, which is not there yet when the loader picks
#elif defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12  // v3 has AVX2; v4 has AVX-512 with its instructions for 16-bit elements, which avx512f alone lacks
#define FASTGPT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTGPT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define FASTGPT_CLONES
#endif
#define FASTGPT_INLINE inline __attribute__((always_inline))

namespace fastgpt {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Sums are in float for 16- and 32-bit types, in double for double.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// One element to and from an accumulator. The 16-bit types are written out without branches, because the library's own
// conversions do not vectorize (layer_norm at 4096 x 768 took up to five times as long with them).
template <typename A, typename T>
FASTGPT_INLINE A load(T v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return std::bit_cast<float>(static_cast<uint32_t>(v.x) << 16);
  } else if constexpr (std::is_same_v<T, Half>) {
    const uint32_t magnitude = static_cast<uint32_t>(v.x & 0x7fff) << 13;
    // Of exponent 5 bits, now in a field of 8: 2^112 makes up for the other bias, of subnormal numbers too.
    const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
    const uint32_t bits = magnitude < 0x0f800000u ? finite : magnitude | 0x7f800000u;
    return std::bit_cast<float>(bits | static_cast<uint32_t>(v.x & 0x8000) << 16);
  } else {
    return static_cast<A>(v);
  }
}

template <typename T, typename A>
FASTGPT_INLINE void store(T& out, A v) {
  const auto to_nearest_even = [](uint32_t bits, int drop) __attribute__((always_inline)) {
    return (bits + ((1u << (drop - 1)) - 1) + ((bits >> drop) & 1)) >> drop;
  };
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t rounded = to_nearest_even(std::bit_cast<uint32_t>(v), 16);
    out.x = static_cast<uint16_t>(v != v ? 0x7fc0 : rounded);
  } else if constexpr (std::is_same_v<T, Half>) {
    const uint32_t bits = std::bit_cast<uint32_t>(v);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = to_nearest_even(magnitude - (112u << 23), 13);
    // Below 2^-14, adding 1/2 leaves the bits of a subnormal number at the end of the sum's, rounded.
    const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - (126u << 23);
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    const uint32_t large = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;  // NaN, or infinity from 2^16 on
    out.x = static_cast<uint16_t>((magnitude < (143u << 23) ? finite : large) | (bits >> 16 & 0x8000));
  } else {
    out = static_cast<T>(v);
  }
}

// 64 bytes of accumulators, which GCC and Clang lower to what the instruction set has. For sums: the compiler adds the
// lanes of a reduction loop one after the other at its end, which costs as much as 768 columns do.
template <typename A>
struct LanesOf {
  typedef A type __attribute__((vector_size(64)));
};
template <typename A>
using Lanes = typename LanesOf<A>::type;
template <typename A>
inline constexpr int64_t kLanes = 64 / sizeof(A);

template <typename T, typename V>
FASTGPT_INLINE void load_lanes(const T* from, V& to) {
  using A = std::remove_cvref_t<decltype(to[0])>;
  if constexpr (std::is_same_v<T, A>) {
    std::memcpy(&to, from, sizeof to);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    typedef uint16_t Narrow __attribute__((vector_size(32)));
    typedef uint32_t Wide __attribute__((vector_size(64)));
    Narrow bits;
    std::memcpy(&bits, from, sizeof bits);
    const Wide wide = __builtin_convertvector(bits, Wide) << 16;
    std::memcpy(&to, &wide, sizeof to);
  } else {
    A each[kLanes<A>];
    for (int64_t i = 0; i < kLanes<A>; ++i) each[i] = load<A>(from[i]);
    std::memcpy(&to, each, sizeof to);
  }
}

template <typename A, typename V>
FASTGPT_INLINE void store_lanes(A* to, const V& from) {
  std::memcpy(to, &from, sizeof from);
}

// The sum of N values, pairwise.
template <int64_t N, typename A>
FASTGPT_INLINE A pairwise_sum(const A* v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    return pairwise_sum<N / 2>(v) + pairwise_sum<N / 2>(v + N / 2);
  }
}

template <typename V>
FASTGPT_INLINE auto total(const V& v) {
  using A = std::remove_cvref_t<decltype(v[0])>;
  A each[kLanes<A>];
  std::memcpy(each, &v, sizeof v);
  return pairwise_sum<kLanes<A>>(each);
}

// Of exp(x) = 2^n * exp(r), with n = round(x / ln 2) and |r| <= ln(2) / 2: `shifted`, which has n in its low bits, and
// exp(r), of which eight terms of the series suffice. Of one float, or of a register of them.
constexpr float kExpRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves a float's integer part in its low bits
template <typename V>
FASTGPT_INLINE void exp_parts(const V& x, V& shifted, V& e) {
  shifted = x * 1.44269504f + kExpRound;
  const V n = shifted - kExpRound;
  const V r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts, the first exact in n * part
  e = 1.98412698e-4f * r + 1.38888889e-3f;
  e = e * r + 8.33333333e-3f;
  e = e * r + 4.16666667e-2f;
  e = e * r + 1.66666667e-1f;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
}

// exp(x) for x <= 0, which is all that a softmax or a tanh needs, to one part in 10^7; vectorizes, as std::exp does not.
template <typename A>
FASTGPT_INLINE A exp_nonpositive(A x) {
  if constexpr (std::is_same_v<A, double>) {
    return std::exp(x);
  } else {
    float shifted, e;
    exp_parts(x, shifted, e);
    const uint32_t exponent = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kExpRound) + 127u;
    const float scaled = e * std::bit_cast<float>(exponent << 23);
    return x < -87.0f ? 0.0f : scaled;  // 2^-126 is the least normal float; NaN stays NaN
  }
}

// The same of 16 floats at once, in whole registers: left to itself GCC takes half of an AVX-512 register.
FASTGPT_INLINE void exp_nonpositive(const Lanes<float>& x, Lanes<float>& y) {
  typedef int32_t Ints __attribute__((vector_size(64)));
  Lanes<float> shifted, e;
  exp_parts(x, shifted, e);
  const Ints exponent = (Ints)shifted - std::bit_cast<int32_t>(kExpRound) + 127;
  const Lanes<float> scaled = e * (Lanes<float>)(exponent << 23);
  y = x < -87.0f ? Lanes<float>{} : scaled;
}

// Calls f with a value of the element type of `t`; the caller takes its type.
template <typename F>
void dispatch_float(const Tensor& t, const char* name, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: STD_TORCH_CHECK(false, name, ": dtype must be float32, float64, bfloat16 or float16");
  }
}

// Splits [0, rows) into as many contiguous blocks as there are threads and calls f(block, first, last) for each.
// Which rows a block has depends on `rows` and the thread count alone, so sums over blocks are bitwise repeatable.
template <typename F>
void for_row_blocks(int64_t rows, int64_t blocks, F&& f) {
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      f(block, rows * block / blocks, rows * (block + 1) / blocks);
    }
  });
}

// At least `min_rows` rows a block: a thread costs some microseconds to wake.
inline int64_t row_blocks(int64_t rows, int64_t min_rows) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min(threads, rows / std::max<int64_t>(1, min_rows)));
}

// A 1-D tensor as accumulators, whatever its dtype.
template <typename A>
std::vector<A> to_accumulators(const Tensor& t, const char* name) {
  std::vector<A> out(t.numel());
  dispatch_float(t, name, [&](auto tag) {
    using W = decltype(tag);
    const W* in = static_cast<const W*>(t.const_data_ptr());
    for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<A>(in[i]);
  });
  return out;
}

// And back.
template <typename A>
void from_accumulators(const std::vector<A>& in, Tensor& t, const char* name) {
  dispatch_float(t, name, [&](auto tag) {
    using W = decltype(tag);
    W* out = static_cast<W*>(t.mutable_data_ptr());
    for (size_t i = 0; i < in.size(); ++i) out[i] = static_cast<W>(in[i]);
  });
}

}  // namespace fastgpt
