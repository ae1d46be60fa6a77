// Layer normalization on CPUs, alone (layer_norm) and of a sum (add_layer_norm). For each row x of width C:
//
//   x    = residual + x, rounded to its dtype (add_layer_norm only)
//   mean = sum(x) / C        rstd = 1 / sqrt(sum((x - mean)^2) / C + eps)
//   xhat = (x - mean) * rstd
//   y    = xhat * weight + bias
//
// and backwards, with g = dy * weight:
//
//   dx      = rstd * (g - sum(g) / C - xhat * sum(g * xhat) / C)  [+ dsum, the gradient of the sum itself]
//   dweight = sum over rows of dy * xhat        dbias = sum over rows of dy
//
// Saved for backward: x itself, and mean and rstd in fp32 (8 bytes a row; xhat would be a second copy of x).
// One pass over a row gives mean and variance, around a guess m of the mean, from four of its elements: with x - m in
// place of x, E[x^2] - E[x]^2 does not cancel. Should the guess be off by more than a deviation, the pass is repeated
// around the mean that it gave. y takes x - m - delta, which is exact for close x, not x - (m + delta). Memory decides:
// each tensor is read or written once. A sum is normed while it is in L1, and its one gradient serves x and residual.
// Stores past the caches were tried for large outputs: 2.1 times as slow, and the reader's next pass 1.4 times.

#include <cmath>
#include <tuple>

#include "cpu.h"
#include "layer_norm.h"

namespace fastgpt {
namespace {

constexpr const char* kName = "layer_norm";
// Below 16 thousand elements a second thread costs more than it brings.
constexpr int64_t kMinElements = 16384;
// dweight is summed over runs of 64 rows first: shorter fp32 sums round less than one over all rows, at no cost in time.
constexpr int64_t kRun = 64;

// The mean of a row's x - shift, and its variance; the sums are four independent chains of lanes each.
template <typename T, typename A>
FASTGPT_INLINE void moments(const T* x, int64_t C, A shift, A& mean, A& variance) {
  constexpr int64_t L = kLanes<A>;
  Lanes<A> s[4] = {}, q[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= C; i += 4 * L) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      Lanes<A> v;
      load_lanes(x + i + k * L, v);
      v -= shift;
      s[k] += v;
      q[k] += v * v;
    }
  }
  for (; i + L <= C; i += L) {
    Lanes<A> v;
    load_lanes(x + i, v);
    v -= shift;
    s[0] += v;
    q[0] += v * v;
  }
  A sum = total((s[0] + s[1]) + (s[2] + s[3]));
  A square = total((q[0] + q[1]) + (q[2] + q[3]));
  for (; i < C; ++i) {
    const A v = load<A>(x[i]) - shift;
    sum += v;
    square += v * v;
  }
  mean = sum / static_cast<A>(C);
  variance = square / static_cast<A>(C) - mean * mean;
}

// Near the mean of a row, from four of its elements; a quarter of each is taken first, so that no sum overflows.
template <typename T, typename A>
FASTGPT_INLINE A guess(const T* x, int64_t C) {
  const A quarter = 0.25;
  return (quarter * load<A>(x[0]) + quarter * load<A>(x[C / 4])) +
      (quarter * load<A>(x[C / 2]) + quarter * load<A>(x[3 * C / 4]));
}

// `residual` and `sum` are null for layer_norm, whose x is then what is normed.
template <typename T, typename A>
FASTGPT_INLINE void forward_rows(
    const T* x, const T* residual, const A* weight, const A* bias, T* sum, T* y, A* mean, A* rstd, int64_t first,
    int64_t last, int64_t C, A eps) {
  A next = first < last ? guess<T, A>(x + first * C, C) : A(0);
  for (int64_t row = first; row < last; ++row) {
    const T* xr = x + row * C;
    T* yr = y + row * C;
    if (residual) {
      const T* rr = residual + row * C;
      T* sr = sum + row * C;
#pragma omp simd
      for (int64_t i = 0; i < C; ++i) store(sr[i], load<A>(rr[i]) + load<A>(xr[i]));
      xr = sr;
    }
    A m = residual ? guess<T, A>(xr, C) : next;
    A delta, variance;
    moments(xr, C, m, delta, variance);
    if (delta * delta > variance) {  // as for 5 of 100 normal rows
      m += delta;
      moments(xr, C, m, delta, variance);
    }
    const A r = A(1) / std::sqrt(std::max(variance, A(0)) + eps);
    // The next row's guess waits for four cache lines: they come while this row is written.
    if (!residual && row + 1 < last) next = guess<T, A>(xr + C, C);
#pragma omp simd
    for (int64_t i = 0; i < C; ++i) store(yr[i], (load<A>(xr[i]) - m - delta) * r * weight[i] + bias[i]);
    mean[row] = m + delta;
    rstd[row] = r;
  }
}

// Adds the rows' dweight and dbias to `dweight` and `dbias`; `run` is scratch for 2 * C accumulators.
template <typename T, typename A>
FASTGPT_INLINE void backward_rows(
    const T* dy, const T* dsum, const T* x, const A* weight, const A* mean, const A* rstd, T* dx, A* dweight, A* dbias,
    A* run, int64_t first, int64_t last, int64_t C) {
  A* run_w = run;
  A* run_b = run + C;
  for (int64_t start = first; start < last; start += kRun) {
    std::fill(run, run + 2 * C, A(0));
    for (int64_t row = start; row < std::min(start + kRun, last); ++row) {
      const T* dyr = dy + row * C;
      const T* xr = x + row * C;
      const T* dsr = dsum ? dsum + row * C : nullptr;
      T* dxr = dx + row * C;
      const A m = mean[row];
      const A r = rstd[row];
      constexpr int64_t L = kLanes<A>;
      Lanes<A> g_sum[2] = {}, gx_sum[2] = {};
      int64_t i = 0;
      for (; i + 2 * L <= C; i += 2 * L) {
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
          const int64_t at = i + k * L;
          Lanes<A> d, v, w, rw, rb;
          load_lanes(dyr + at, d);
          load_lanes(xr + at, v);
          load_lanes(weight + at, w);
          load_lanes(run_w + at, rw);
          load_lanes(run_b + at, rb);
          const Lanes<A> xhat = (v - m) * r;
          const Lanes<A> g = d * w;
          g_sum[k] += g;
          gx_sum[k] += g * xhat;
          rw += d * xhat;
          rb += d;
          store_lanes(run_w + at, rw);
          store_lanes(run_b + at, rb);
        }
      }
      A sum_g = total(g_sum[0] + g_sum[1]), sum_gx = total(gx_sum[0] + gx_sum[1]);
      for (; i < C; ++i) {
        const A d = load<A>(dyr[i]);
        const A xhat = (load<A>(xr[i]) - m) * r;
        const A g = d * weight[i];
        sum_g += g;
        sum_gx += g * xhat;
        run_w[i] += d * xhat;
        run_b[i] += d;
      }
      const A c1 = sum_g / static_cast<A>(C);
      const A c2 = sum_gx / static_cast<A>(C);
#pragma omp simd
      for (int64_t i = 0; i < C; ++i) {
        const A xhat = (load<A>(xr[i]) - m) * r;
        const A d = r * (load<A>(dyr[i]) * weight[i] - c1 - xhat * c2);
        store(dxr[i], dsr ? d + load<A>(dsr[i]) : d);
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < C; ++i) {
      dweight[i] += run_w[i];
      dbias[i] += run_b[i];
    }
  }
}

// GCC clones plain functions only, not templates: one pair a dtype.
#define FASTGPT_ROWS(T, A)                                                                                             \
  FASTGPT_CLONES void forward(                                                                                         \
      const T* x, const T* residual, const A* w, const A* b, T* sum, T* y, A* mean, A* rstd, int64_t first,            \
      int64_t last, int64_t C, A eps) {                                                                                \
    forward_rows<T, A>(x, residual, w, b, sum, y, mean, rstd, first, last, C, eps);                                    \
  }                                                                                                                    \
  FASTGPT_CLONES void backward(                                                                                        \
      const T* dy, const T* dsum, const T* x, const A* w, const A* mean, const A* rstd, T* dx, A* dw, A* db, A* run,   \
      int64_t first, int64_t last, int64_t C) {                                                                        \
    backward_rows<T, A>(dy, dsum, x, w, mean, rstd, dx, dw, db, run, first, last, C);                                  \
  }
FASTGPT_ROWS(float, float)
FASTGPT_ROWS(double, double)
FASTGPT_ROWS(BFloat16, float)
FASTGPT_ROWS(Half, float)
#undef FASTGPT_ROWS

std::tuple<Tensor, Tensor, Tensor, Tensor> normalize(
    Tensor x, std::optional<Tensor> residual, Tensor weight, Tensor bias, double eps) {
  check_norm(x, residual, weight, bias);
  x = as_contiguous(x);
  weight = as_contiguous(weight);
  bias = as_contiguous(bias);
  if (residual) residual = as_contiguous(*residual);
  const int64_t C = x.size(-1);
  const int64_t rows = x.numel() / C;
  const std::vector<int64_t> stats_shape(x.sizes().begin(), x.sizes().end() - 1);

  Tensor sum = residual ? make_like(x) : x;
  Tensor y = make_like(x);
  Tensor mean = make_empty(x, stats_shape, sums_type(x));
  Tensor rstd = make_empty(x, stats_shape, sums_type(x));
  dispatch_float(x, kName, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const std::vector<A> w = to_accumulators<A>(weight, kName);
    const std::vector<A> b = to_accumulators<A>(bias, kName);
    const T* xp = static_cast<const T*>(x.const_data_ptr());
    const T* resp = residual ? static_cast<const T*>(residual->const_data_ptr()) : nullptr;
    T* sp = residual ? static_cast<T*>(sum.mutable_data_ptr()) : nullptr;
    T* yp = static_cast<T*>(y.mutable_data_ptr());
    A* mp = static_cast<A*>(mean.mutable_data_ptr());
    A* rp = static_cast<A*>(rstd.mutable_data_ptr());
    for_row_blocks(rows, row_blocks(rows, kMinElements / C), [&](int64_t, int64_t first, int64_t last) {
      forward(xp, resp, w.data(), b.data(), sp, yp, mp, rp, first, last, C, static_cast<A>(eps));
    });
  });
  return {sum, y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> normalize_backward(
    Tensor dy, std::optional<Tensor> dsum, Tensor x, Tensor weight, Tensor mean, Tensor rstd) {
  check_norm_backward(dy, dsum, x, weight, mean, rstd);
  const int64_t C = x.size(-1);
  const int64_t rows = x.numel() / C;
  dy = as_contiguous(dy);
  x = as_contiguous(x);
  weight = as_contiguous(weight);
  mean = as_contiguous(mean);
  rstd = as_contiguous(rstd);
  if (dsum) dsum = as_contiguous(*dsum);

  Tensor dx = make_like(x);
  Tensor dweight = make_like(weight);
  Tensor dbias = make_like(weight);
  dispatch_float(x, kName, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const std::vector<A> w = to_accumulators<A>(weight, kName);
    const int64_t blocks = row_blocks(rows, kMinElements / C);
    // One row of [dweight | dbias] a block, summed in the blocks' order afterwards: no atomics, bitwise repeatable.
    std::vector<A> partial(blocks * 2 * C, A(0));
    const T* dyp = static_cast<const T*>(dy.const_data_ptr());
    const T* dsp = dsum ? static_cast<const T*>(dsum->const_data_ptr()) : nullptr;
    const T* xp = static_cast<const T*>(x.const_data_ptr());
    const A* mp = static_cast<const A*>(mean.const_data_ptr());
    const A* rp = static_cast<const A*>(rstd.const_data_ptr());
    T* dxp = static_cast<T*>(dx.mutable_data_ptr());
    for_row_blocks(rows, blocks, [&](int64_t block, int64_t first, int64_t last) {
      std::vector<A> run(2 * C);
      A* mine = partial.data() + block * 2 * C;
      backward(dyp, dsp, xp, w.data(), mp, rp, dxp, mine, mine + C, run.data(), first, last, C);
    });
    for (int64_t block = 1; block < blocks; ++block) {
      for (int64_t i = 0; i < 2 * C; ++i) partial[i] += partial[block * 2 * C + i];
    }
    from_accumulators<A>(std::vector<A>(partial.begin(), partial.begin() + C), dweight, kName);
    from_accumulators<A>(std::vector<A>(partial.begin() + C, partial.begin() + 2 * C), dbias, kName);
  });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&fastgpt::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&fastgpt::layer_norm_backward));
  m.impl("add_layer_norm", TORCH_BOX(&fastgpt::add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&fastgpt::add_layer_norm_backward));
}
