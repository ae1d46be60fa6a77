// Weights from their 4-bit NF4 codes, on GPUs; the math is csrc/cpu/nf4.cpp's, to the bit:
//
//   a = absmax * scale + mean        weight = value[code] * a
//
// each operation rounded once (not fused), then rounded to the dtype that is asked for. Memory decides: a thread reads
// the codes of 2 * 16 bytes of weights in one access and writes those in two, one in each half of a block, whose codes
// share their bytes. The 16 values lie in shared memory, in 16 banks: no two threads conflict.

#include "cuda.cuh"
#include "nf4.h"

#include <algorithm>

namespace fastgpt {
namespace {

constexpr const char* kName = "dequantize_nf4";
constexpr int kThreads = 256;
constexpr int kBlocksPerSM = 8;

__constant__ float kValues[16] = FASTGPT_NF4;

template <typename T>
struct Args {
  const uint8_t* codes;
  const int8_t* absmax;
  const float *scale, *mean;
  T* out;
  int64_t numel, parts;  // a part is what one thread makes at once: N weights of a block's first half, N of its other
};

template <typename T>
__global__ void __launch_bounds__(kThreads) expand_kernel(const Args<T> p) {
  constexpr int N = 16 / sizeof(T), kParts = kBytes / N;  // parts a block
  __shared__ float values[16];
  if (threadIdx.x < 16) values[threadIdx.x] = kValues[threadIdx.x];
  __syncthreads();
  const float mean = *p.mean;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t part = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; part < p.parts; part += step) {
    const int64_t block = part / kParts;
    const float a = __fadd_rn(__fmul_rn(p.absmax[block], p.scale[block / kAbsmaxes]), mean);
    const auto codes = reinterpret_cast<const Vec<uint8_t, N>*>(p.codes)[part];
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      Vec<T, N> w;
#pragma unroll
      for (int i = 0; i < N; ++i) w.at[i] = static_cast<T>(__fmul_rn(values[codes.at[i] >> (4 * upper) & 15], a));
      const int64_t at = block * kBlock + upper * kBytes + part % kParts * N;
      if (at + N <= p.numel) {
        *reinterpret_cast<Vec<T, N>*>(p.out + at) = w;
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (at + i < p.numel) p.out[at + i] = w.at[i];
        }
      }
    }
  }
}

Tensor dequantize_nf4(Tensor codes, Tensor absmax, Tensor scale, Tensor mean, int64_t numel, ScalarType dtype) {
  check_nf4(codes, absmax, scale, mean, numel);
  const torch::stable::accelerator::DeviceGuard guard(codes.get_device_index());
  codes = as_contiguous(codes);
  if (!aligned16(codes.const_data_ptr())) codes = torch::stable::clone(codes);
  absmax = as_contiguous(absmax);
  scale = as_contiguous(scale);
  Tensor out = make_empty(codes, {numel}, dtype);
  if (numel == 0) return out;
  dispatch_float(out, out, kName, [&](auto tag, bool) {
    using T = decltype(tag);
    const int64_t parts = codes.numel() * static_cast<int64_t>(sizeof(T)) / 16;
    const Args<T> args{
        static_cast<const uint8_t*>(codes.const_data_ptr()), static_cast<const int8_t*>(absmax.const_data_ptr()),
        static_cast<const float*>(scale.const_data_ptr()), static_cast<const float*>(mean.const_data_ptr()),
        static_cast<T*>(out.mutable_data_ptr()), numel, parts};
    const int64_t needed = (parts + kThreads - 1) / kThreads;
    const auto grid = static_cast<unsigned>(std::min<int64_t>(needed, kBlocksPerSM * sm_count(codes)));
    expand_kernel<T><<<grid, kThreads, 0, current_stream(codes)>>>(args);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) { m.impl("dequantize_nf4", TORCH_BOX(&fastgpt::dequantize_nf4)); }
