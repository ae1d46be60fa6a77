// Bias and GELU in its tanh form, on CPUs. With u = x + bias, k = sqrt(2 / pi) and c = 0.044715:
//
//   y = u / 2 * (1 + tanh(k * (u + c * u^3))) = u * s        with s = 1 / (1 + exp(-z)), z = 2 * k * (u + c * u^3)
//
// and backwards:
//
//   dx = dy * (s + u * s * (1 - s) * z')  with z' = 2 * k * (1 + 3 * c * u^2)        dbias = sum over rows of dx
//
// With e = exp(-|z|), which cannot overflow, s is 1 or e over 1 + e and s * (1 - s) is e / (1 + e)^2: nothing cancels, so
// both tails keep all their digits, where 1 + tanh loses them. From |u| = 32 on, e is 0 in float64 too, and y is u or 0.
// Saved for backward: x and bias; e is computed again, for that is cheaper than to write and read it. Memory decides: x is
// read and y written once; backward reads x and dy and writes dx once.

#pragma GCC optimize("fp-contract=fast")

#include <algorithm>
#include <tuple>

#include "cpu.h"

namespace fastgpt {
namespace {

constexpr const char* kName = "bias_gelu";
// Below 4 thousand elements a second thread costs more than it brings.
constexpr int64_t kMinElements = 4096;
// dbias is summed over runs of 64 rows first: shorter fp32 sums round less than one over all rows.
constexpr int64_t kRun = 64;

template <typename A>
struct Gate {
  A u, e, t, s;  // u within +-32; exp(-|z|); 1 / (1 + e); s

  FASTGPT_INLINE explicit Gate(A v) {
    constexpr A k2 = 1.5957691216057308, k2c = k2 * A(0.044715);  // 2 * k and 2 * k * c
    u = v > A(32) ? A(32) : v < A(-32) ? A(-32) : v;
    const A z = u * (k2 + k2c * (u * u));
    e = exp_nonpositive(z > A(0) ? -z : z);
    t = A(1) / (A(1) + e);
    s = (z > A(0) ? A(1) : e) * t;
  }
  FASTGPT_INLINE A slope() const {
    constexpr A k2 = 1.5957691216057308, k6c = k2 * A(3 * 0.044715);  // 2 * k and 6 * k * c
    return s + u * (e * t * t) * (k2 + k6c * (u * u));
  }
};

// Of 16 floats at once.
struct Gates {
  using V = Lanes<float>;
  V u, e, t, s;

  FASTGPT_INLINE explicit Gates(const V& v) {
    constexpr float k2 = 1.5957691216057308, k2c = k2 * 0.044715f;
    const V zero = {}, limit = zero + 32.0f, one = zero + 1.0f;
    u = v > limit ? limit : v < -limit ? -limit : v;
    const V z = u * (k2 + k2c * (u * u));
    exp_nonpositive(z > zero ? -z : z, e);
    t = one / (one + e);
    s = (z > zero ? one : e) * t;
  }
  FASTGPT_INLINE void times_slope(V& d) const {
    constexpr float k2 = 1.5957691216057308, k6c = k2 * (3 * 0.044715f);
    d *= s + u * (e * t * t) * (k2 + k6c * (u * u));
  }
};

template <typename T, typename A>
FASTGPT_INLINE void forward_rows(const T* x, const A* bias, T* y, int64_t first, int64_t last, int64_t C) {
  for (int64_t row = first; row < last; ++row) {
    const T* xr = x + row * C;
    T* yr = y + row * C;
    int64_t i = 0;
    if constexpr (std::is_same_v<T, float>) {
      for (; i + kLanes<float> <= C; i += kLanes<float>) {
        Lanes<float> u, b;
        load_lanes(xr + i, u);
        load_lanes(bias + i, b);
        u += b;
        store_lanes(yr + i, u * Gates(u).s);
      }
    }
#pragma omp simd
    for (int64_t k = i; k < C; ++k) {
      const A u = load<A>(xr[k]) + bias[k];
      store(yr[k], u * Gate<A>(u).s);
    }
  }
}

// Adds the rows' dbias to `dbias`; `run` is scratch for C accumulators.
template <typename T, typename A>
FASTGPT_INLINE void backward_rows(
    const T* dy, const T* x, const A* bias, T* dx, A* dbias, A* run, int64_t first, int64_t last, int64_t C) {
  for (int64_t start = first; start < last; start += kRun) {
    std::fill(run, run + C, A(0));
    for (int64_t row = start; row < std::min(start + kRun, last); ++row) {
      const T* dyr = dy + row * C;
      const T* xr = x + row * C;
      T* dxr = dx + row * C;
      int64_t i = 0;
      if constexpr (std::is_same_v<T, float>) {
        for (; i + kLanes<float> <= C; i += kLanes<float>) {
          Lanes<float> d, u, b, sum;
          load_lanes(dyr + i, d);
          load_lanes(xr + i, u);
          load_lanes(bias + i, b);
          load_lanes(run + i, sum);
          Gates(u + b).times_slope(d);
          store_lanes(dxr + i, d);
          store_lanes(run + i, sum + d);
        }
      }
#pragma omp simd
      for (int64_t k = i; k < C; ++k) {
        const A d = load<A>(dyr[k]) * Gate<A>(load<A>(xr[k]) + bias[k]).slope();
        store(dxr[k], d);
        run[k] += d;
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < C; ++i) dbias[i] += run[i];
  }
}

// GCC clones plain functions only, not templates: one pair a dtype.
#define FASTGPT_ROWS(T, A)                                                                                             \
  FASTGPT_CLONES void forward(const T* x, const A* bias, T* y, int64_t first, int64_t last, int64_t C) {               \
    forward_rows<T, A>(x, bias, y, first, last, C);                                                                    \
  }                                                                                                                    \
  FASTGPT_CLONES void backward(                                                                                        \
      const T* dy, const T* x, const A* bias, T* dx, A* dbias, A* run, int64_t first, int64_t last, int64_t C) {       \
    backward_rows<T, A>(dy, x, bias, dx, dbias, run, first, last, C);                                                  \
  }
FASTGPT_ROWS(float, float)
FASTGPT_ROWS(double, double)
FASTGPT_ROWS(BFloat16, float)
FASTGPT_ROWS(Half, float)
#undef FASTGPT_ROWS

// The public Python function says all this better; here it only keeps a direct call from reading past an end.
void check(const Tensor& x, const Tensor& bias) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, "bias_gelu: x must have a last dimension of at least 1");
  STD_TORCH_CHECK(
      bias.dim() == 1 && bias.size(0) == x.size(-1), "bias_gelu: bias must be 1-D, as long as x's last dimension");
}

}  // namespace

Tensor bias_gelu(Tensor x, Tensor bias) {
  check(x, bias);
  x = as_contiguous(x);
  bias = as_contiguous(bias);
  const int64_t C = x.size(-1);
  const int64_t rows = x.numel() / C;
  Tensor y = make_like(x);
  dispatch_float(x, kName, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const std::vector<A> b = to_accumulators<A>(bias, kName);
    const T* xp = static_cast<const T*>(x.const_data_ptr());
    T* yp = static_cast<T*>(y.mutable_data_ptr());
    for_row_blocks(rows, row_blocks(rows, kMinElements / C), [&](int64_t, int64_t first, int64_t last) {
      forward(xp, b.data(), yp, first, last, C);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor dy, Tensor x, Tensor bias) {
  check(x, bias);
  STD_TORCH_CHECK(
      dy.numel() == x.numel() && dy.scalar_type() == x.scalar_type(), "bias_gelu_backward: dy must have x's shape and dtype");
  dy = as_contiguous(dy);
  x = as_contiguous(x);
  bias = as_contiguous(bias);
  const int64_t C = x.size(-1);
  const int64_t rows = x.numel() / C;
  Tensor dx = make_like(x);
  Tensor dbias = make_like(bias);
  dispatch_float(x, kName, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const std::vector<A> b = to_accumulators<A>(bias, kName);
    const int64_t blocks = row_blocks(rows, kMinElements / C);
    // One row of dbias a block, summed in the blocks' order afterwards: no atomics, bitwise repeatable.
    std::vector<A> partial(blocks * C, A(0));
    const T* dyp = static_cast<const T*>(dy.const_data_ptr());
    const T* xp = static_cast<const T*>(x.const_data_ptr());
    T* dxp = static_cast<T*>(dx.mutable_data_ptr());
    for_row_blocks(rows, blocks, [&](int64_t block, int64_t first, int64_t last) {
      std::vector<A> run(C);
      backward(dyp, xp, b.data(), dxp, partial.data() + block * C, run.data(), first, last, C);
    });
    for (int64_t block = 1; block < blocks; ++block) {
      for (int64_t i = 0; i < C; ++i) partial[i] += partial[block * C + i];
    }
    from_accumulators<A>(std::vector<A>(partial.begin(), partial.begin() + C), dbias, kName);
  });
  return {dx, dbias};
}

}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&fastgpt::bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&fastgpt::bias_gelu_backward));
}
