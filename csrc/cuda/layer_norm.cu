// Layer normalization on GPUs, alone (layer_norm) and of a sum (add_layer_norm); the math is csrc/cpu/layer_norm.cpp's:
//
//   x = residual + x, rounded to its dtype (add_layer_norm only)
//   xhat = (x - mean) * rstd,  y = xhat * weight + bias
//   dx = rstd * (g - sum(g) / C - xhat * sum(g * xhat) / C) [+ dsum]  with g = dy * weight
//   dweight = sum over rows of dy * xhat,  dbias = sum over rows of dy
//
// Memory decides, so each tensor crosses the bus once. R threads have a row, K vectors of 16 bytes each, in registers: a
// warp a row where that suffices, so that 8,192 rows of 768 fill the GPU, and a block a row where not. Mean and variance
// come from one pass around a guess m of the mean (the mean of the first vector), hence from one reduction; should the
// guess be off by more than a deviation, the pass is repeated around the mean that it gave.
// Backward runs one block of 384 or 512 threads an SM over the rows block * G + group + i * grid * G, with the columns' dweight
// and dbias in registers to the end (column_sums.cuh), and asks for its next row before it reduces this one.
// Widths or pointers that 16 bytes do not fit, wider rows and float64 take kernels that walk over a row with a block,
// again and again, from the caches.

#include "column_sums.cuh"
#include "layer_norm.h"

#include <algorithm>
#include <tuple>
#include <vector>

namespace fastgpt {
namespace {

constexpr const char* kName = "layer_norm";
constexpr int kLoopThreads = 256;
constexpr int64_t kSharedBytes = 48 * 1024 - 1024;  // what every GPU gives without asking, less the reductions' scratch

template <typename A>
struct Moments {
  A m, delta, rstd;  // the mean is m + delta; x - m is exact for close x, so x takes both apart
};

// `pass(m, a, b)` adds up x - m and its square over the thread's elements.
template <int R, typename A, typename F>
__device__ __forceinline__ Moments<A> moments(A m, int64_t C, A eps, A* scratch, F pass) {
  A a = 0, b = 0;
  pass(m, a, b);
  row_sums<R>(a, b, scratch);
  A delta = a / static_cast<A>(C), variance = b / static_cast<A>(C) - delta * delta;
  if (delta * delta > variance) {  // the same in all threads of the row
    m += delta;
    a = b = 0;
    pass(m, a, b);
    row_sums<R>(a, b, scratch + R / 16);
    delta = a / static_cast<A>(C);
    variance = b / static_cast<A>(C) - delta * delta;
  }
  return {m, delta, A(1) / sqrt((variance < A(0) ? A(0) : variance) + eps)};
}

template <typename T, int N>
__device__ __forceinline__ Vec<T, N> add(const Vec<T, N>& a, const Vec<T, N>& b) {
  Vec<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out.at[i] = static_cast<T>(load<float>(a.at[i]) + load<float>(b.at[i]));
  return out;
}

// What the kernels take; `residual` and `sum` are null for layer_norm.
template <typename T, typename A>
struct Forward {
  const T *x, *residual;
  const void *weight, *bias;
  T *sum, *y;
  A *mean, *rstd;
  int64_t rows, C;
  A eps;
  bool float_parameters;
};

template <int R, int K, typename T>
__global__ void __launch_bounds__(R < 128 ? 128 : R) forward_kernel(const Forward<T, float> p) {
  constexpr int N = 16 / sizeof(T), G = R < 128 ? 128 / R : 1;
  using V = Vec<T, N>;
  __shared__ float scratch[2 * (R / 16)];
  const int r = threadIdx.x % R;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * G + threadIdx.x / R, n = p.C / N;
  if (row >= p.rows) return;  // a whole warp; where a row has more of them it has the block
  const V* x = reinterpret_cast<const V*>(p.x + row * p.C);
  V v[K], head = x[0];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k * R + r < n) v[k] = x[k * R + r];
  }
  if (p.residual) {
    const V* residual = reinterpret_cast<const V*>(p.residual + row * p.C);
    V* sum = reinterpret_cast<V*>(p.sum + row * p.C);
    V other[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k * R + r < n) other[k] = residual[k * R + r];
    }
    head = add(head, residual[0]);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k * R + r < n) sum[k * R + r] = v[k] = add(v[k], other[k]);
    }
  }
  float guess = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) guess += load<float>(head.at[i]) * (1.0f / N);
  const Moments<float> of = moments<R>(guess, p.C, p.eps, scratch, [&](float m, float& a, float& b) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k * R + r < n) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float d = load<float>(v[k].at[i]) - m;
          a += d;
          b += d * d;
        }
      }
    }
  });
  V* y = reinterpret_cast<V*>(p.y + row * p.C);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k * R + r < n) {
      keep_packed(v[k]);
      float w[N], b[N];
      load_parameters<T>(p.weight, p.float_parameters, (k * R + r) * N, w);
      load_parameters<T>(p.bias, p.float_parameters, (k * R + r) * N, b);
      V out;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        out.at[i] = static_cast<T>((load<float>(v[k].at[i]) - of.m - of.delta) * of.rstd * w[i] + b[i]);
      }
      y[k * R + r] = out;
    }
  }
  if (r == 0) {
    p.mean[row] = of.m + of.delta;
    p.rstd[row] = of.rstd;
  }
}

template <typename T, typename A>
__global__ void __launch_bounds__(kLoopThreads) forward_loop_kernel(const Forward<T, A> p) {
  __shared__ A scratch[2 * (kLoopThreads / 16)];
  const int64_t row = blockIdx.x;
  const T* x = p.x + row * p.C;
  if (p.residual) {  // a thread reads back only what it wrote itself, but for the guess
    const T* residual = p.residual + row * p.C;
    T* sum = p.sum + row * p.C;
    for (int64_t i = threadIdx.x; i < p.C; i += kLoopThreads) {
      sum[i] = static_cast<T>(load<A>(x[i]) + load<A>(residual[i]));
    }
    x = sum;
    __syncthreads();
  }
  const Moments<A> of = moments<kLoopThreads>(load<A>(x[0]), p.C, p.eps, scratch, [&](A m, A& a, A& b) {
    for (int64_t i = threadIdx.x; i < p.C; i += kLoopThreads) {
      const A d = load<A>(x[i]) - m;
      a += d;
      b += d * d;
    }
  });
  T* y = p.y + row * p.C;
  for (int64_t i = threadIdx.x; i < p.C; i += kLoopThreads) {
    A w[1], b[1];
    load_parameters<T>(p.weight, p.float_parameters, i, w);
    load_parameters<T>(p.bias, p.float_parameters, i, b);
    y[i] = static_cast<T>((load<A>(x[i]) - of.m - of.delta) * of.rstd * w[0] + b[0]);
  }
  if (threadIdx.x == 0) {
    p.mean[row] = of.m + of.delta;
    p.rstd[row] = of.rstd;
  }
}

// `x` is what was normed; `dsum`, its gradient by other ways than the norm, may be null; `partial` is column_sums.cuh's.
template <typename T, typename A>
struct Backward {
  const T *dy, *dsum, *x;
  const void* weight;
  const A *mean, *rstd;
  T* dx;
  A* partial;
  int64_t rows, C;
  bool float_parameters, in_shared;
};

// 384 threads have 168 registers each, 512 have 128, which ptxas overruns by one or two in some versions of this kernel.
template <int R>
constexpr int kBackwardThreads = R > 128 ? R : 384;

template <int R, int K, typename T>
__global__ void __launch_bounds__(kBackwardThreads<R>, 1) backward_kernel(const Backward<T, float> p) {
  constexpr int N = 16 / sizeof(T), B = kBackwardThreads<R>, G = B / R, J = 2 * N;
  using V = Vec<T, N>;
  __shared__ float row_scratch[2][B / 16];
  __shared__ float column_scratch[G > 1 ? B * J : 1];
  const int r = threadIdx.x % R, n = static_cast<int>(p.C / N);
  // Rows in 32 bits, which 2^31 of them and a step fit into, because there is no register to spare.
  const uint32_t rows = static_cast<uint32_t>(p.rows), step = gridDim.x * G;
  float sums[K][J] = {};
  int turn = 0;
  // All groups of a block go round together, because row_sums may have a barrier; those past the last row do nothing else.
  for (uint32_t first = blockIdx.x * G; first < rows; first += step, turn ^= 1) {
    const uint32_t row = first + threadIdx.x / R;
    const int live = row < rows ? n : 0;  // vectors that this row has
    const V* dy = reinterpret_cast<const V*>(p.dy + row * p.C);
    const V* x = reinterpret_cast<const V*>(p.x + row * p.C);
    V d[K], v[K];
    float m = 0, rstd = 0;
    if (live) {
      m = p.mean[row];
      rstd = p.rstd[row];
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k * R + r < live) {
        d[k] = dy[k * R + r];
        v[k] = x[k * R + r];
      }
    }
    float sum_g = 0, sum_gx = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k * R + r < live) {
        float w[N];
        load_parameters<T>(p.weight, p.float_parameters, (k * R + r) * N, w);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float each = load<float>(d[k].at[i]), xhat = (load<float>(v[k].at[i]) - m) * rstd, g = each * w[i];
          sum_g += g;
          sum_gx += g * xhat;
          sums[k][i] += each * xhat;
          sums[k][N + i] += each;
        }
      }
    }
    if (row + step < rows) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (k * R + r < n) {
          const int64_t at = static_cast<int64_t>(row + step) * p.C + (k * R + r) * N;
          prefetch_l2(p.dy + at);
          prefetch_l2(p.x + at);
          if (p.dsum) prefetch_l2(p.dsum + at);
        }
      }
    }
    row_sums<R>(sum_g, sum_gx, row_scratch[turn]);
    const float c1 = sum_g / static_cast<float>(p.C), c2 = sum_gx / static_cast<float>(p.C);
    V* dx = reinterpret_cast<V*>(p.dx + row * p.C);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k * R + r < live) {
        keep_packed(d[k]);
        keep_packed(v[k]);
        float w[N];
        load_parameters<T>(p.weight, p.float_parameters, (k * R + r) * N, w);
        V other = {};
        if (p.dsum) other = reinterpret_cast<const V*>(p.dsum + row * p.C)[k * R + r];
        V out;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float xhat = (load<float>(v[k].at[i]) - m) * rstd;
          const float each = rstd * (load<float>(d[k].at[i]) * w[i] - c1 - xhat * c2);
          out.at[i] = static_cast<T>(each + load<float>(other.at[i]));
        }
        dx[k * R + r] = out;
      }
    }
  }
  float* mine = p.partial + static_cast<int64_t>(blockIdx.x) * K * J * R;
#pragma unroll
  for (int k = 0; k < K; ++k) write_partial<B, R, J>(sums[k], column_scratch, mine + k * J * R);
}

// Here a row of `partial` is dweight, then dbias: R = C, N = 1.
template <typename T, typename A>
__global__ void __launch_bounds__(kLoopThreads) backward_loop_kernel(const Backward<T, A> p) {
  __shared__ A scratch[2][kLoopThreads / 16];
  extern __shared__ __align__(16) unsigned char shared[];
  A* mine = p.partial + static_cast<int64_t>(blockIdx.x) * 2 * p.C;
  // A thread touches no sums but those of its own columns: in shared memory where they fit, else where they end up.
  A* dweight = p.in_shared ? reinterpret_cast<A*>(shared) : mine;
  A* dbias = dweight + p.C;
  for (int64_t i = threadIdx.x; i < p.C; i += kLoopThreads) dweight[i] = dbias[i] = 0;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, turn ^= 1) {
    const T* dy = p.dy + row * p.C;
    const T* x = p.x + row * p.C;
    const A m = p.mean[row], rstd = p.rstd[row];
    A sum_g = 0, sum_gx = 0;
    for (int64_t i = threadIdx.x; i < p.C; i += kLoopThreads) {
      A w[1];
      load_parameters<T>(p.weight, p.float_parameters, i, w);
      const A each = load<A>(dy[i]), xhat = (load<A>(x[i]) - m) * rstd, g = each * w[0];
      sum_g += g;
      sum_gx += g * xhat;
      dweight[i] += each * xhat;
      dbias[i] += each;
    }
    row_sums<kLoopThreads>(sum_g, sum_gx, scratch[turn]);
    const A c1 = sum_g / static_cast<A>(p.C), c2 = sum_gx / static_cast<A>(p.C);
    for (int64_t i = threadIdx.x; i < p.C; i += kLoopThreads) {
      A w[1];
      load_parameters<T>(p.weight, p.float_parameters, i, w);
      const A xhat = (load<A>(x[i]) - m) * rstd;
      const A each = rstd * (load<A>(dy[i]) * w[0] - c1 - xhat * c2);
      p.dx[row * p.C + i] = static_cast<T>(p.dsum ? each + load<A>(p.dsum[row * p.C + i]) : each);
    }
  }
  if (!p.in_shared) return;
  for (int64_t i = threadIdx.x; i < p.C; i += kLoopThreads) {
    mine[i] = dweight[i];
    mine[p.C + i] = dbias[i];
  }
}

template <typename... P>
bool all_aligned16(const P*... pointers) {
  return (aligned16(pointers) && ...);
}

template <typename T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> normalize(
    Tensor x, std::optional<Tensor> residual, Tensor weight, Tensor bias, double eps) {
  check_norm(x, residual, weight, bias);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  x = as_contiguous(x);
  weight = as_contiguous(weight);
  bias = as_contiguous(bias);
  if (residual) residual = as_contiguous(*residual);
  const int64_t C = x.size(-1), rows = x.numel() / C;
  const std::vector<int64_t> stats_shape(x.sizes().begin(), x.sizes().end() - 1);
  Tensor sum = residual ? make_like(x) : x;
  Tensor y = make_like(x);
  Tensor mean = make_empty(x, stats_shape, sums_type(x));
  Tensor rstd = make_empty(x, stats_shape, sums_type(x));
  if (rows == 0) return {sum, y, mean, rstd};
  STD_TORCH_CHECK(rows <= INT32_MAX, "layer_norm: more than 2^31 - 1 rows");

  dispatch_float(x, weight, kName, [&](auto x_tag, bool float_parameters) {
    using T = decltype(x_tag);
    using A = acc_t<T>;
    const Forward<T, A> p{
        static_cast<const T*>(x.const_data_ptr()), pointer<T>(residual), weight.const_data_ptr(), bias.const_data_ptr(),
        residual ? static_cast<T*>(sum.mutable_data_ptr()) : nullptr, static_cast<T*>(y.mutable_data_ptr()),
        static_cast<A*>(mean.mutable_data_ptr()), static_cast<A*>(rstd.mutable_data_ptr()), rows, C,
        static_cast<A>(eps), float_parameters};
    auto run = [&](auto kernel, int threads, int rows_a_block) {
      const int64_t blocks = (rows + rows_a_block - 1) / rows_a_block;
      kernel<<<static_cast<unsigned>(blocks), threads, 0, current_stream(x)>>>(p);
    };
    if constexpr (!std::is_same_v<T, double>) {
      const int64_t bytes = C * static_cast<int64_t>(sizeof(T));
      if (bytes % 16 == 0 && bytes <= 65536 && all_aligned16(p.x, p.residual, p.weight, p.bias, p.sum, p.y)) {
        if (bytes <= 2048) return run(forward_kernel<32, 4, T>, 128, 4);
        if (bytes <= 4096) return run(forward_kernel<32, 8, T>, 128, 4);
        if (bytes <= 16384) return run(forward_kernel<256, 4, T>, 256, 1);
        return run(forward_kernel<512, 8, T>, 512, 1);
      }
    }
    run(forward_loop_kernel<T, A>, kLoopThreads, 1);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {sum, y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> normalize_backward(
    Tensor dy, std::optional<Tensor> dsum, Tensor x, Tensor weight, Tensor mean, Tensor rstd) {
  check_norm_backward(dy, dsum, x, weight, mean, rstd);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t C = x.size(-1), rows = x.numel() / C;
  dy = as_contiguous(dy);
  x = as_contiguous(x);
  weight = as_contiguous(weight);
  mean = as_contiguous(mean);
  rstd = as_contiguous(rstd);
  if (dsum) dsum = as_contiguous(*dsum);
  STD_TORCH_CHECK(rows <= INT32_MAX, "layer_norm_backward: more than 2^31 - 1 rows");
  Tensor dx = make_like(x);
  Tensor dweight = make_like(weight);
  Tensor dbias = make_like(weight);

  dispatch_float(x, weight, kName, [&](auto x_tag, bool float_parameters) {
    using T = decltype(x_tag);
    using A = acc_t<T>;
    const int64_t sums_bytes = 2 * C * static_cast<int64_t>(sizeof(A));
    Backward<T, A> p{
        static_cast<const T*>(dy.const_data_ptr()), pointer<T>(dsum), static_cast<const T*>(x.const_data_ptr()),
        weight.const_data_ptr(), static_cast<const A*>(mean.const_data_ptr()),
        static_cast<const A*>(rstd.const_data_ptr()), static_cast<T*>(dx.mutable_data_ptr()), nullptr, rows, C,
        float_parameters, sums_bytes <= kSharedBytes};
    // Blocks of `threads`, of G rows at a time, as many an SM as `blocks`; then the columns' sums, laid out by R, N, K.
    auto run = [&](auto kernel, int threads, int G, int blocks, int64_t shared, int64_t R, int N, int64_t K) {
      const int64_t grid = std::max<int64_t>(1, std::min<int64_t>((rows + G - 1) / G, blocks * sm_count(x)));
      Tensor partial = make_empty(x, {grid, K * 2 * N * R}, sums_type(x));
      p.partial = static_cast<A*>(partial.mutable_data_ptr());
      kernel<<<static_cast<unsigned>(grid), threads, shared, current_stream(x)>>>(p);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      reduce_columns<A>(partial, R, N, 2 * N, dweight, &dbias, kName);
    };
    if constexpr (!std::is_same_v<T, double>) {
      constexpr int N = 16 / sizeof(T), K = N == 8 ? 4 : 6;  // what 128 registers hold, with 4 * K * N in sums and row
      const int64_t n = C / N;
      if (C % N == 0 && n <= 512 * K && all_aligned16(p.dy, p.dsum, p.x, p.weight, p.dx)) {
        auto run_wide = [&](auto R) {
          constexpr int B = kBackwardThreads<R()>;
          run(backward_kernel<R(), K, T>, B, B / R(), 1, 0, R(), N, K);
        };
        if (n <= 32 * K) return run_wide(std::integral_constant<int, 32>{});
        if (n <= 128 * K) return run_wide(std::integral_constant<int, 128>{});
        return run_wide(std::integral_constant<int, 512>{});
      }
    }
    run(backward_loop_kernel<T, A>, kLoopThreads, 1, 2, p.in_shared ? sums_bytes : 0, C, 1, 1);
  });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
  m.impl("layer_norm", TORCH_BOX(&fastgpt::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&fastgpt::layer_norm_backward));
  m.impl("add_layer_norm", TORCH_BOX(&fastgpt::add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&fastgpt::add_layer_norm_backward));
}
