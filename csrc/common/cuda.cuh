// What the CUDA kernels share: conversions, 16-byte accesses, reductions over a block, the current stream.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>

#include "tensor.h"

namespace fastgpt {

template <typename T>
struct Acc {
  using type = float;
};
template <>
struct Acc<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Acc<T>::type;

template <typename A, typename T>
__device__ __forceinline__ A load(T v) {
  return static_cast<A>(static_cast<float>(v));
}
template <>
__device__ __forceinline__ double load<double, double>(double v) {
  return v;
}

// N elements that move as one access.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T at[N];
};

// N elements of a parameter from element `at` on, as accumulators. A parameter has x's dtype T, or is fp32 beside a
// 16-bit x: one branch, the same for all threads, where a template argument would double the kernels. N of more than 1
// needs 16-byte alignment.
template <typename T, int N, typename A>
__device__ __forceinline__ void load_parameters(const void* from, bool is_float, int64_t at, A (&to)[N]) {
  if (is_float) {
    constexpr int M = N > 4 ? 4 : N;
#pragma unroll
    for (int k = 0; k < N; k += M) {
      const auto v = *reinterpret_cast<const Vec<float, M>*>(static_cast<const float*>(from) + at + k);
#pragma unroll
      for (int i = 0; i < M; ++i) to[k + i] = v.at[i];
    }
  } else {
    const auto v = *reinterpret_cast<const Vec<T, N>*>(static_cast<const T*>(from) + at);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = load<A>(v.at[i]);
  }
}

// Asks for a line of memory before there is a register to hold it.
__device__ __forceinline__ void prefetch_l2(const void* p) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// The sums of `a` and of `b` over each R neighbours among a block's threads, in all of them; the same order every time.
// For R above 32 all threads of the block take part, and `scratch` holds 2 values a warp; calls take turns between two
// such scratches, so that one barrier a call does.
template <int R, typename A>
__device__ __forceinline__ void row_sums(A& a, A& b, A* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    a += __shfl_xor_sync(0xffffffffu, a, offset);
    b += __shfl_xor_sync(0xffffffffu, b, offset);
  }
  if constexpr (R > 32) {
    const int warp = threadIdx.x >> 5, first = warp / (R / 32) * (R / 32);
    if ((threadIdx.x & 31) == 0) {
      scratch[2 * warp] = a;
      scratch[2 * warp + 1] = b;
    }
    __syncthreads();
    a = b = 0;
#pragma unroll
    for (int w = first; w < first + R / 32; ++w) {
      a += scratch[2 * w];
      b += scratch[2 * w + 1];
    }
  }
}

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int sm_count(const Tensor& t) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.get_device_index()));
  return count;
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Calls f with a value of x's element type and one of weight's: the same, or float beside a 16-bit x.
template <typename F>
void dispatch_float(const Tensor& x, const Tensor& weight, const char* name, F&& f) {
  const ScalarType t = x.scalar_type(), w = weight.scalar_type();
  if (t == ScalarType::Float && w == t) return f(float{}, float{});
  if (t == ScalarType::Double && w == t) return f(double{}, double{});
  if (t == ScalarType::BFloat16 && w == t) return f(__nv_bfloat16{}, __nv_bfloat16{});
  if (t == ScalarType::BFloat16 && w == ScalarType::Float) return f(__nv_bfloat16{}, float{});
  if (t == ScalarType::Half && w == t) return f(__half{}, __half{});
  if (t == ScalarType::Half && w == ScalarType::Float) return f(__half{}, float{});
  STD_TORCH_CHECK(false, name, ": dtypes of x and weight do not go together");
}

}  // namespace fastgpt
