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

// Makes the compiler forget what it knows of `v`. Else it keeps a 16-bit row as the floats that it once made of it, in
// twice the registers, instead of converting again.
template <typename V>
__device__ __forceinline__ void keep_packed(V& v) {
#ifdef __CUDA_ARCH__
  static_assert(sizeof(V) % 4 == 0);
  auto* words = reinterpret_cast<uint32_t*>(&v);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(V) / 4); ++i) asm volatile("" : "+r"(words[i]));
#endif
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

// The sum over a block of `a` and of `b`, in every thread; the same order every time. `scratch` holds 2 * 32 values.
template <typename A>
__device__ __forceinline__ void block_sum(A& a, A& b, A* scratch) {
  for (int offset = 16; offset > 0; offset >>= 1) {
    a += __shfl_xor_sync(0xffffffffu, a, offset);
    b += __shfl_xor_sync(0xffffffffu, b, offset);
  }
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  __syncthreads();  // the scratch of the sum before this one has been read by all
  if (lane == 0) {
    scratch[warp] = a;
    scratch[32 + warp] = b;
  }
  __syncthreads();
  a = b = 0;
  for (int w = 0; w < warps; ++w) {
    a += scratch[w];
    b += scratch[32 + w];
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

// Calls f with a value of x's element type and whether `parameter` is fp32: it has x's dtype, or is fp32 beside 16 bits.
template <typename F>
void dispatch_float(const Tensor& x, const Tensor& parameter, const char* name, F&& f) {
  const ScalarType t = x.scalar_type(), w = parameter.scalar_type();
  const bool is_float = w == ScalarType::Float;
  STD_TORCH_CHECK(
      w == t || (is_float && (t == ScalarType::BFloat16 || t == ScalarType::Half)), name,
      ": the dtypes of x and its parameter do not go together");
  switch (t) {
    case ScalarType::Float: return f(float{}, is_float);
    case ScalarType::Double: return f(double{}, is_float);
    case ScalarType::BFloat16: return f(__nv_bfloat16{}, is_float);
    case ScalarType::Half: return f(__half{}, is_float);
    default: STD_TORCH_CHECK(false, name, ": dtype must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace fastgpt
