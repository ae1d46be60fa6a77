// Sums over rows, one for each column: how the gradients of weights and biases leave a kernel. Blocks walk over rows and
// keep their sums in registers; each writes them once, to its row of `partial`, and a second kernel adds those rows in
// their order. No atomics: bitwise the same every time.
//
// A block of B threads is B / R groups of R, each on its own rows. Thread r of a group has, for vector k, the columns
// (k * R + r) * N .. + N, and J sums: N each of dweight and dbias, or of dbias alone. Sum j is in column
// (k * J + j) * R + r of `partial`, so that warps write and read whole lines; `partial` has K * J * R columns.
#pragma once

#include "cuda.cuh"

namespace fastgpt {

// What one block writes of its sums of one vector; `row` is column k * J * R of its row of `partial`. All threads of the
// block take part; `scratch` holds B * J values.
template <int B, int R, int J, typename A>
__device__ __forceinline__ void write_partial(const A (&sums)[J], A* scratch, A* row) {
  if constexpr (B == R) {
#pragma unroll
    for (int j = 0; j < J; ++j) row[j * R + threadIdx.x] = sums[j];
  } else {
    __syncthreads();  // the scratch of the vector before this one has been read by all
#pragma unroll
    for (int j = 0; j < J; ++j) scratch[j * B + threadIdx.x] = sums[j];
    __syncthreads();
    for (int i = threadIdx.x; i < J * R; i += B) {
      const A* of = scratch + i / R * B + i % R;
      A sum = of[0];
#pragma unroll
      for (int group = 1; group < B / R; ++group) sum += of[group * R];
      row[i] = sum;
    }
  }
}

constexpr int kReduceWarps = 16;

// 32 columns of `partial` a block, a warp on every 16th row: so 132 rows take 9 loads, one after the other.
template <typename W, typename A>
__global__ void __launch_bounds__(32 * kReduceWarps) reduce_partial(
    const A* partial, int64_t rows, int64_t columns, int64_t R, int N, int J, W* first, W* second, int64_t C) {
  __shared__ A scratch[kReduceWarps][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t p = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  A sum = 0;
  if (p < columns) {
#pragma unroll 4
    for (int64_t row = warp; row < rows; row += kReduceWarps) sum += partial[row * columns + p];
  }
  scratch[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || p >= columns) return;
  for (int w = 1; w < kReduceWarps; ++w) sum += scratch[w][lane];
  const int64_t k = p / R / J, j = p / R % J, r = p % R;
  const int64_t c = (k * R + r) * N + j % N;
  if (c < C) (j < N ? first : second)[c] = static_cast<W>(sum);
}

// Into `first`, and into `second` where there are two sets of sums (J = 2 * N), both of C elements and one dtype.
template <typename A>
void reduce_columns(const Tensor& partial, int64_t R, int N, int J, Tensor& first, Tensor* second, const char* name) {
  const int64_t rows = partial.size(0), columns = partial.size(1);
  auto run = [&](auto tag) {
    using W = decltype(tag);
    reduce_partial<W, A><<<static_cast<unsigned>((columns + 31) / 32), 32 * kReduceWarps, 0, current_stream(partial)>>>(
        static_cast<const A*>(partial.const_data_ptr()), rows, columns, R, N, J,
        static_cast<W*>(first.mutable_data_ptr()), second ? static_cast<W*>(second->mutable_data_ptr()) : nullptr,
        first.numel());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if constexpr (std::is_same_v<A, double>) {
    run(double{});
  } else {
    switch (first.scalar_type()) {
      case ScalarType::Float: return run(float{});
      case ScalarType::BFloat16: return run(__nv_bfloat16{});
      case ScalarType::Half: return run(__half{});
      default: STD_TORCH_CHECK(false, name, ": parameters must be float32, float64, bfloat16 or float16");
    }
  }
}

}  // namespace fastgpt
