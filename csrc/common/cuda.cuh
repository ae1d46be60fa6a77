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
