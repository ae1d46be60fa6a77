// Layer normalization on CPUs. For each row x of width C:
//
//   mean = sum(x) / C        rstd = 1 / sqrt(sum((x - mean)^2) / C + eps)
//   xhat = (x - mean) * rstd
//   y    = xhat * weight + bias
//
// and backwards, with g = dy * weight:
//
//   dx      = rstd * (g - sum(g) / C - xhat * sum(g * xhat) / C)
//   dweight = sum over rows of dy * xhat        dbias = sum over rows of dy
//
// Saved for backward: x itself, and mean and rstd in fp32 (8 bytes a row; xhat would be a second copy of x).
// The variance is summed around the mean, in a second pass over a row that is in L1 by then: E[x^2] - mean^2 would
// cancel where the mean is large. Memory decides: x is read and y written once; backward reads x and dy and writes dx once.

#include <cmath>
#include <tuple>

#include "cpu.h"

namespace fastgpt {
namespace {

constexpr const char* kName = "layer_norm";
// Below 16 thousand elements a second thread costs more than it brings.
constexpr int64_t kMinElements = 16384;
// dweight is summed over runs of 64 rows first: shorter fp32 sums round less than one over all rows, at no cost in time.
constexpr int64_t kRun = 64;

template <typename T, typename A>
FASTGPT_INLINE void forward_rows(
    const T* x, const A* weight, const A* bias, T* y, A* mean, A* rstd, int64_t first, int64_t last, int64_t C, A eps) {
  for (int64_t row = first; row < last; ++row) {
    const T* xr = x + row * C;
    T* yr = y + row * C;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < C; ++i) sum += load<A>(xr[i]);
    const A m = sum / static_cast<A>(C);
    A square = 0, rest = 0;
#pragma omp simd reduction(+ : square, rest)
    for (int64_t i = 0; i < C; ++i) {
      const A d = load<A>(xr[i]) - m;
      square += d * d;
      rest += d;
    }
    // m carries the rounding of its sum; what is left over is exact enough to take it out again, at no extra pass.
    const A delta = rest / static_cast<A>(C);
    const A r = A(1) / std::sqrt(std::max(square / static_cast<A>(C) - delta * delta, A(0)) + eps);
#pragma omp simd
    for (int64_t i = 0; i < C; ++i) store(yr[i], (load<A>(xr[i]) - m - delta) * r * weight[i] + bias[i]);
    mean[row] = m + delta;
    rstd[row] = r;
  }
}

// Adds the rows' dweight and dbias to `dweight` and `dbias`; `run` is scratch for 2 * C accumulators.
template <typename T, typename A>
FASTGPT_INLINE void backward_rows(
    const T* dy, const T* x, const A* weight, const A* mean, const A* rstd, T* dx, A* dweight, A* dbias, A* run,
    int64_t first, int64_t last, int64_t C) {
  A* run_w = run;
  A* run_b = run + C;
  for (int64_t start = first; start < last; start += kRun) {
    std::fill(run, run + 2 * C, A(0));
    for (int64_t row = start; row < std::min(start + kRun, last); ++row) {
      const T* dyr = dy + row * C;
      const T* xr = x + row * C;
      T* dxr = dx + row * C;
      const A m = mean[row];
      const A r = rstd[row];
      A sum_g = 0, sum_gx = 0;
#pragma omp simd reduction(+ : sum_g, sum_gx)
      for (int64_t i = 0; i < C; ++i) {
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
        store(dxr[i], r * (load<A>(dyr[i]) * weight[i] - c1 - xhat * c2));
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
      const T* x, const A* w, const A* b, T* y, A* mean, A* rstd, int64_t first, int64_t last, int64_t C, A eps) {     \
    forward_rows<T, A>(x, w, b, y, mean, rstd, first, last, C, eps);                                                   \
  }                                                                                                                    \
  FASTGPT_CLONES void backward(                                                                                        \
      const T* dy, const T* x, const A* w, const A* mean, const A* rstd, T* dx, A* dw, A* db, A* run, int64_t first,   \
      int64_t last, int64_t C) {                                                                                       \
    backward_rows<T, A>(dy, x, w, mean, rstd, dx, dw, db, run, first, last, C);                                        \
  }
FASTGPT_ROWS(float, float)
FASTGPT_ROWS(double, double)
FASTGPT_ROWS(BFloat16, float)
FASTGPT_ROWS(Half, float)
#undef FASTGPT_ROWS

// The public Python function says all this better; here it only keeps a direct call from reading past an end.
void check(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, "layer_norm: x must have a last dimension of at least 1");
  STD_TORCH_CHECK(
      weight.dim() == 1 && weight.size(0) == x.size(-1), "layer_norm: weight must be 1-D, as long as x's last dimension");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor x, Tensor weight, Tensor bias, double eps) {
  check(x, weight);
  check(x, bias);
  x = as_contiguous(x);
  weight = as_contiguous(weight);
  bias = as_contiguous(bias);
  const int64_t C = x.size(-1);
  const int64_t rows = x.numel() / C;
  const std::vector<int64_t> stats_shape(x.sizes().begin(), x.sizes().end() - 1);

  Tensor y = make_like(x);
  Tensor mean = make_empty(x, stats_shape, sums_type(x));
  Tensor rstd = make_empty(x, stats_shape, sums_type(x));
  dispatch_float(x, kName, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const std::vector<A> w = to_accumulators<A>(weight, kName);
    const std::vector<A> b = to_accumulators<A>(bias, kName);
    const T* xp = static_cast<const T*>(x.const_data_ptr());
    T* yp = static_cast<T*>(y.mutable_data_ptr());
    A* mp = static_cast<A*>(mean.mutable_data_ptr());
    A* rp = static_cast<A*>(rstd.mutable_data_ptr());
    for_row_blocks(rows, row_blocks(rows, kMinElements / C), [&](int64_t, int64_t first, int64_t last) {
      forward(xp, w.data(), b.data(), yp, mp, rp, first, last, C, static_cast<A>(eps));
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd) {
  check(x, weight);
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
  dispatch_float(x, kName, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const std::vector<A> w = to_accumulators<A>(weight, kName);
    const int64_t blocks = row_blocks(rows, kMinElements / C);
    // One row of [dweight | dbias] a block, summed in the blocks' order afterwards: no atomics, bitwise repeatable.
    std::vector<A> partial(blocks * 2 * C, A(0));
    const T* dyp = static_cast<const T*>(dy.const_data_ptr());
    const T* xp = static_cast<const T*>(x.const_data_ptr());
    const A* mp = static_cast<const A*>(mean.const_data_ptr());
    const A* rp = static_cast<const A*>(rstd.const_data_ptr());
    T* dxp = static_cast<T*>(dx.mutable_data_ptr());
    for_row_blocks(rows, blocks, [&](int64_t block, int64_t first, int64_t last) {
      std::vector<A> run(2 * C);
      A* mine = partial.data() + block * 2 * C;
      backward(dyp, xp, w.data(), mp, rp, dxp, mine, mine + C, run.data(), first, last, C);
    });
    for (int64_t block = 1; block < blocks; ++block) {
      for (int64_t i = 0; i < 2 * C; ++i) partial[i] += partial[block * 2 * C + i];
    }
    from_accumulators<A>(std::vector<A>(partial.begin(), partial.begin() + C), dweight, kName);
    from_accumulators<A>(std::vector<A>(partial.begin() + C, partial.begin() + 2 * C), dbias, kName);
  });
  return {dx, dweight, dbias};
}

}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&fastgpt::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&fastgpt::layer_norm_backward));
}
