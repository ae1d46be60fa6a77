// Cross-entropy of rows of logits on CPUs, each row then overwritten with its gradient. For a row x of width V with target t:
//
//   m = max(x)      o = sum over j != t of exp(x_j - m)      s = o + exp(x_t - m)      lse = m + log(s)
//   loss = lse - x_t + z lse^2
//
// and with p = exp(x - m) / s, times the row's factor g:
//
//   dx_j = g (1 + 2 z lse) p_j          dx_t = g (2 z lse p_t - o / s)
//
// p_t - 1 is -o / s: where the target is nearly certain, both 1 and p_t round to the same number and their difference to
// nothing, while o keeps all its digits; so does log1p(o), which is the loss there.
//
// A row of 50,257 floats is 201 KB: the first pass brings it from memory to L2, block by block with a running maximum, and
// the second, which writes the gradient, finds it there. Rows that are ignored are neither read nor summed.

#include <limits>
#include <optional>

#include "cpu.h"

namespace fastgpt {
namespace {

constexpr const char* kName = "cross_entropy_";
constexpr int64_t kBlock = 1024;  // fits L1, where the sum reads what the maximum has; short fp32 sums round less
constexpr int64_t kMinElements = 16384;

template <typename T, typename A>
FASTGPT_INLINE void rows_of(
    T* logits, int64_t stride, const int64_t* targets, const A* factor, A* loss, int64_t first, int64_t last, int64_t V,
    int64_t ignore_index, A z, bool gradient) {
  constexpr A kInfinity = std::numeric_limits<A>::infinity();
  for (int64_t row = first; row < last; ++row) {
    T* x = logits + row * stride;
    const int64_t target = targets[row];
    if (target == ignore_index || target < 0 || target >= V) {
      const A fill = target == ignore_index ? A(0) : std::numeric_limits<A>::quiet_NaN();
      loss[row] = fill;
      if (gradient) {
        for (int64_t i = 0; i < V; ++i) store(x[i], fill);
      }
      continue;
    }
    const A xt = load<A>(x[target]);
    store(x[target], -kInfinity);  // adds nothing to the sum below, which is of the others
    A max = xt, others = 0;
    for (int64_t start = 0; start < V; start += kBlock) {
      const int64_t end = std::min(start + kBlock, V);
      A m = max;
#pragma omp simd reduction(max : m)
      for (int64_t i = start; i < end; ++i) {
        const A v = load<A>(x[i]);
        m = v > m ? v : m;
      }
      if (m > max) {
        others *= std::exp(max - m);
        max = m;
      }
      if (max == -kInfinity) continue;
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = start; i < end; ++i) sum += exp_nonpositive(load<A>(x[i]) - max);
      others += sum;
    }
    const A et = std::exp(xt - max);
    const A sum = others + et;
    const A log_sum = xt == max ? std::log1p(others) : std::log(sum);
    const A lse = max + log_sum;
    loss[row] = log_sum - (xt - max) + z * lse * lse;
    if (gradient) {
      const A g = (factor ? factor[row] : A(1)) / sum;
      const A scale = g * (1 + 2 * z * lse);
#pragma omp simd
      for (int64_t i = 0; i < V; ++i) store(x[i], exp_nonpositive(load<A>(x[i]) - max) * scale);
      store(x[target], g * (2 * z * lse * et - others));
    }
  }
}

// GCC clones plain functions only, not templates: one a dtype.
#define FASTGPT_ROWS(T, A)                                                                                             \
  FASTGPT_CLONES void run(                                                                                             \
      T* logits, int64_t stride, const int64_t* targets, const A* factor, A* loss, int64_t first, int64_t last,        \
      int64_t V, int64_t ignore_index, A z, bool gradient) {                                                           \
    rows_of<T, A>(logits, stride, targets, factor, loss, first, last, V, ignore_index, z, gradient);                   \
  }
FASTGPT_ROWS(float, float)
FASTGPT_ROWS(double, double)
FASTGPT_ROWS(BFloat16, float)
FASTGPT_ROWS(Half, float)
#undef FASTGPT_ROWS

}  // namespace

void cross_entropy_(
    Tensor logits, Tensor targets, Tensor loss, std::optional<Tensor> factor, int64_t ignore_index, double z_loss,
    bool gradient) {
  STD_TORCH_CHECK(
      logits.dim() == 2 && (logits.stride(1) == 1 || logits.size(1) <= 1),
      "cross_entropy_: logits must be 2-D with its rows contiguous");
  const int64_t rows = logits.size(0);
  const int64_t V = logits.size(1);
  STD_TORCH_CHECK(
      targets.numel() == rows && targets.is_contiguous() && targets.scalar_type() == ScalarType::Long,
      "cross_entropy_: targets must be contiguous int64, one a row");
  STD_TORCH_CHECK(
      loss.numel() == rows && loss.is_contiguous() && loss.scalar_type() == sums_type(logits),
      "cross_entropy_: loss must be contiguous, one a row, and float32, or float64 for float64 logits");
  STD_TORCH_CHECK(
      !factor || (factor->numel() == rows && factor->is_contiguous() && factor->scalar_type() == sums_type(logits)),
      "cross_entropy_: factor must be like loss");
  dispatch_float(logits, kName, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    T* xp = static_cast<T*>(logits.mutable_data_ptr());
    const int64_t* tp = static_cast<const int64_t*>(targets.const_data_ptr());
    A* lp = static_cast<A*>(loss.mutable_data_ptr());
    const A* fp = factor ? static_cast<const A*>(factor->const_data_ptr()) : nullptr;
    const int64_t blocks = row_blocks(rows, kMinElements / std::max<int64_t>(1, V));
    for_row_blocks(rows, blocks, [&](int64_t, int64_t first, int64_t last) {
      run(xp, logits.stride(0), tp, fp, lp, first, last, V, ignore_index, static_cast<A>(z_loss), gradient);
    });
  });
}

}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) { m.impl("cross_entropy_", TORCH_BOX(&fastgpt::cross_entropy_)); }
