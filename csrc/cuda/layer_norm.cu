// Layer normalization on GPUs; the math is the CPU kernel's (csrc/cpu/layer_norm.cpp):
//
//   xhat = (x - mean) * rstd,  y = xhat * weight + bias
//   dx = rstd * (g - sum(g) / C - xhat * sum(g * xhat) / C) with g = dy * weight
//   dweight = sum over rows of dy * xhat,  dbias = sum over rows of dy
//
// Memory decides. A block takes a row; the passes over it after the first hit the L1 cache, so each tensor crosses the
// bus once. Accesses are 16 bytes wide where the width and the pointers allow it.
// Backward runs a grid of two blocks an SM, each over rows block, block + grid, ...: a thread owns its columns'
// dweight and dbias, in shared memory while 2 * C accumulators fit into 48 KB and in its own row of `partial`
// otherwise; a second small kernel adds the blocks' rows in order. No atomics: bitwise the same every time.

#include "cuda.cuh"

#include <algorithm>
#include <tuple>
#include <vector>

namespace fastgpt {
namespace {

constexpr const char* kName = "layer_norm";
constexpr int kThreads = 256;
constexpr int64_t kSharedBytes = 48 * 1024 - 1024;  // what every GPU gives without asking, less the reductions' scratch

template <int N, typename T, typename W, typename A>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    const T* x, const W* weight, const W* bias, T* y, A* mean, A* rstd, int64_t C, A eps) {
  __shared__ A scratch[64];
  const int64_t row = blockIdx.x;
  const auto* xv = reinterpret_cast<const Vec<T, N>*>(x + row * C);
  auto* yv = reinterpret_cast<Vec<T, N>*>(y + row * C);
  const int64_t n = C / N;

  A sum = 0, none = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const Vec<T, N> v = xv[i];
#pragma unroll
    for (int k = 0; k < N; ++k) sum += load<A>(v.at[k]);
  }
  block_sum(sum, none, scratch);
  const A m = sum / static_cast<A>(C);

  A square = 0, rest = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const Vec<T, N> v = xv[i];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const A d = load<A>(v.at[k]) - m;
      square += d * d;
      rest += d;
    }
  }
  block_sum(square, rest, scratch);
  // m carries the rounding of its sum; what is left over is exact enough to take it out again.
  const A delta = rest / static_cast<A>(C);
  const A variance = square / static_cast<A>(C) - delta * delta;
  const A r = A(1) / sqrt((variance < A(0) ? A(0) : variance) + eps);

  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const Vec<T, N> v = xv[i];
    Vec<T, N> out;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const int64_t c = i * N + k;
      out.at[k] = static_cast<T>((load<A>(v.at[k]) - m - delta) * r * load<A>(weight[c]) + load<A>(bias[c]));
    }
    yv[i] = out;
  }
  if (threadIdx.x == 0) {
    mean[row] = m + delta;
    rstd[row] = r;
  }
}

// `partial` is (gridDim.x, 2, C): this block's dweight and dbias.
template <int N, typename T, typename W, typename A>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    const T* dy, const T* x, const W* weight, const A* mean, const A* rstd, T* dx, A* partial, int64_t rows, int64_t C,
    bool in_shared) {
  __shared__ A scratch[64];
  extern __shared__ __align__(16) unsigned char shared[];
  A* row_of_partial = partial + static_cast<int64_t>(blockIdx.x) * 2 * C;
  A* dweight = in_shared ? reinterpret_cast<A*>(shared) : row_of_partial;
  A* dbias = dweight + C;
  const int64_t n = C / N;
  // From here to the end a thread touches no accumulator but those of its own columns.
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
#pragma unroll
    for (int k = 0; k < N; ++k) dweight[i * N + k] = dbias[i * N + k] = 0;
  }
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const auto* dyv = reinterpret_cast<const Vec<T, N>*>(dy + row * C);
    const auto* xv = reinterpret_cast<const Vec<T, N>*>(x + row * C);
    auto* dxv = reinterpret_cast<Vec<T, N>*>(dx + row * C);
    const A m = mean[row], r = rstd[row];
    A sum_g = 0, sum_gx = 0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const Vec<T, N> dv = dyv[i], v = xv[i];
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const int64_t c = i * N + k;
        const A d = load<A>(dv.at[k]);
        const A xhat = (load<A>(v.at[k]) - m) * r;
        const A g = d * load<A>(weight[c]);
        sum_g += g;
        sum_gx += g * xhat;
        dweight[c] += d * xhat;
        dbias[c] += d;
      }
    }
    block_sum(sum_g, sum_gx, scratch);
    const A c1 = sum_g / static_cast<A>(C), c2 = sum_gx / static_cast<A>(C);
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const Vec<T, N> dv = dyv[i], v = xv[i];
      Vec<T, N> out;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const A xhat = (load<A>(v.at[k]) - m) * r;
        out.at[k] = static_cast<T>(r * (load<A>(dv.at[k]) * load<A>(weight[i * N + k]) - c1 - xhat * c2));
      }
      dxv[i] = out;
    }
  }
  if (in_shared) {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        row_of_partial[i * N + k] = dweight[i * N + k];
        row_of_partial[C + i * N + k] = dbias[i * N + k];
      }
    }
  }
}

template <typename W, typename A>
__global__ void __launch_bounds__(kThreads) reduce_kernel(
    const A* partial, W* dweight, W* dbias, int64_t blocks, int64_t C) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= 2 * C) return;
  A sum = 0;
  for (int64_t b = 0; b < blocks; ++b) sum += partial[b * 2 * C + c];
  (c < C ? dweight[c] : dbias[c - C]) = static_cast<W>(sum);
}

void check(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, "layer_norm: x must have a last dimension of at least 1");
  STD_TORCH_CHECK(
      weight.dim() == 1 && weight.size(0) == x.size(-1), "layer_norm: weight must be 1-D, as long as x's last dimension");
  STD_TORCH_CHECK(
      weight.get_device_index() == x.get_device_index(), "layer_norm: x and its parameters must be on one GPU");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> layer_norm_cuda(Tensor x, Tensor weight, Tensor bias, double eps) {
  check(x, weight);
  check(x, bias);
  STD_TORCH_CHECK(bias.scalar_type() == weight.scalar_type(), "layer_norm: bias must have weight's dtype");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  x = as_contiguous(x);
  weight = as_contiguous(weight);
  bias = as_contiguous(bias);
  const int64_t C = x.size(-1);
  const int64_t rows = x.numel() / C;
  const std::vector<int64_t> stats_shape(x.sizes().begin(), x.sizes().end() - 1);
  Tensor y = make_like(x);
  Tensor mean = make_empty(x, stats_shape, sums_type(x));
  Tensor rstd = make_empty(x, stats_shape, sums_type(x));
  if (rows == 0) return {y, mean, rstd};
  STD_TORCH_CHECK(rows <= INT32_MAX, "layer_norm: more than 2^31 - 1 rows");

  dispatch_float(x, weight, kName, [&](auto x_tag, auto w_tag) {
    using T = decltype(x_tag);
    using W = decltype(w_tag);
    using A = acc_t<T>;
    constexpr int kWide = 16 / sizeof(T);
    auto run = [&](auto kernel) {
      kernel<<<static_cast<unsigned>(rows), kThreads, 0, current_stream(x)>>>(
          static_cast<const T*>(x.const_data_ptr()), static_cast<const W*>(weight.const_data_ptr()),
          static_cast<const W*>(bias.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()),
          static_cast<A*>(mean.mutable_data_ptr()), static_cast<A*>(rstd.mutable_data_ptr()), C, static_cast<A>(eps));
    };
    const bool wide = C % kWide == 0 && aligned16(x.const_data_ptr()) && aligned16(y.const_data_ptr());
    wide ? run(forward_kernel<kWide, T, W, A>) : run(forward_kernel<1, T, W, A>);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cuda(
    Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd) {
  check(x, weight);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t C = x.size(-1);
  const int64_t rows = x.numel() / C;
  STD_TORCH_CHECK(
      dy.numel() == x.numel() && dy.scalar_type() == x.scalar_type(), "layer_norm_backward: dy must have x's shape and dtype");
  STD_TORCH_CHECK(
      mean.numel() == rows && rstd.numel() == rows && mean.scalar_type() == sums_type(x) &&
          rstd.scalar_type() == sums_type(x),
      "layer_norm_backward: mean and rstd must be what layer_norm returned for this x");
  dy = as_contiguous(dy);
  x = as_contiguous(x);
  weight = as_contiguous(weight);
  mean = as_contiguous(mean);
  rstd = as_contiguous(rstd);
  Tensor dx = make_like(x);
  Tensor dweight = make_like(weight);
  Tensor dbias = make_like(weight);
  const int64_t blocks = std::max<int64_t>(1, std::min<int64_t>(rows, 2 * sm_count(x)));
  Tensor partial = make_empty(x, {blocks, 2, C}, sums_type(x));

  dispatch_float(x, weight, kName, [&](auto x_tag, auto w_tag) {
    using T = decltype(x_tag);
    using W = decltype(w_tag);
    using A = acc_t<T>;
    constexpr int kWide = 16 / sizeof(T);
    const int64_t accumulators = 2 * C * static_cast<int64_t>(sizeof(A));
    const bool in_shared = accumulators <= kSharedBytes;
    A* partial_p = static_cast<A*>(partial.mutable_data_ptr());
    auto run = [&](auto kernel) {
      kernel<<<static_cast<unsigned>(blocks), kThreads, in_shared ? accumulators : 0, current_stream(x)>>>(
          static_cast<const T*>(dy.const_data_ptr()), static_cast<const T*>(x.const_data_ptr()),
          static_cast<const W*>(weight.const_data_ptr()), static_cast<const A*>(mean.const_data_ptr()),
          static_cast<const A*>(rstd.const_data_ptr()), static_cast<T*>(dx.mutable_data_ptr()), partial_p, rows, C,
          in_shared);
    };
    const bool wide = C % kWide == 0 && aligned16(x.const_data_ptr()) && aligned16(dy.const_data_ptr()) &&
        aligned16(dx.const_data_ptr());
    wide ? run(backward_kernel<kWide, T, W, A>) : run(backward_kernel<1, T, W, A>);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    const int64_t grid = (2 * C + kThreads - 1) / kThreads;
    reduce_kernel<W, A><<<static_cast<unsigned>(grid), kThreads, 0, current_stream(x)>>>(
        partial_p, static_cast<W*>(dweight.mutable_data_ptr()), static_cast<W*>(dbias.mutable_data_ptr()), blocks, C);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {dx, dweight, dbias};
}

}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
  m.impl("layer_norm", TORCH_BOX(&fastgpt::layer_norm_cuda));
  m.impl("layer_norm_backward", TORCH_BOX(&fastgpt::layer_norm_backward_cuda));
}
