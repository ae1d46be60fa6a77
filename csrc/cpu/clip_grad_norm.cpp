// The norm of all gradients, and the factor that clips it (Pascanu, Mikolov, Bengio 2013), on CPUs:
//
//   norm = sqrt(sum over all elements of g^2)        factor = min(1, max_norm / (norm + 1e-6)), or NaN
//
// The gradients are read once and not written: the factor goes to adamw_step's grad_scale. Squares are taken and summed
// in double, which costs nothing where memory decides: fp32 squares overflow from 1.8e19 and vanish below 1e-23.
// Sums are over pieces of 64 thousand elements, then over the pieces in order: the same bits for any number of threads.
// NaN and infinity pass through: their norm is NaN or infinity. The factor is then NaN, which tells adamw_step to leave
// everything as it is.

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu.h"

namespace fastgpt {
namespace {

constexpr const char* kName = "clip_grad_norm";
constexpr int64_t kPiece = 65536;

// As four chains: one is bound by the latency of an addition, at half the speed.
template <typename T, typename A>
FASTGPT_INLINE double squares_of(const T* g, int64_t n) {
  const int64_t q = n / 4;
  double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < q; ++i) {
    const double a = load<A>(g[i]), b = load<A>(g[i + q]), c = load<A>(g[i + 2 * q]), d = load<A>(g[i + 3 * q]);
    s0 += a * a;
    s1 += b * b;
    s2 += c * c;
    s3 += d * d;
  }
  for (int64_t i = 4 * q; i < n; ++i) {
    const double d = load<A>(g[i]);
    s0 += d * d;
  }
  return (s0 + s1) + (s2 + s3);
}

// GCC clones plain functions only, not templates: one a dtype.
#define FASTGPT_SQUARES(T, A) \
  FASTGPT_CLONES double squares(const T* g, int64_t n) { return squares_of<T, A>(g, n); }
FASTGPT_SQUARES(float, float)
FASTGPT_SQUARES(double, double)
FASTGPT_SQUARES(BFloat16, float)
FASTGPT_SQUARES(Half, float)
#undef FASTGPT_SQUARES

template <typename O>
void put(Tensor& norm, Tensor& factor, double n, double max_norm) {
  const O rounded = static_cast<O>(n);
  const double f = std::isfinite(rounded) ? std::min(1.0, max_norm / (n + 1e-6)) : std::nan("");
  *static_cast<O*>(norm.mutable_data_ptr()) = rounded;
  *static_cast<O*>(factor.mutable_data_ptr()) = static_cast<O>(f);
}

}  // namespace

std::tuple<Tensor, Tensor> clip_grad_norm(std::vector<Tensor> grads, double max_norm) {
  STD_TORCH_CHECK(!grads.empty(), "clip_grad_norm: grads must not be empty");
  struct Piece {
    size_t tensor;
    int64_t first, count;
  };
  std::vector<Piece> pieces;
  ScalarType out = ScalarType::Float;
  for (size_t i = 0; i < grads.size(); ++i) {
    STD_TORCH_CHECK(grads[i].is_cpu(), "clip_grad_norm: grads must be on one device");
    grads[i] = as_contiguous(grads[i]);
    if (grads[i].scalar_type() == ScalarType::Double) out = ScalarType::Double;
    const int64_t n = grads[i].numel();
    for (int64_t first = 0; first < n; first += kPiece) pieces.push_back({i, first, std::min(kPiece, n - first)});
  }
  std::vector<double> sums(pieces.size());
  const int64_t count = static_cast<int64_t>(pieces.size());
  for_row_blocks(count, row_blocks(count, 1), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const Tensor& g = grads[pieces[k].tensor];
      dispatch_float(g, kName, [&](auto tag) {
        using T = decltype(tag);
        sums[k] = squares(static_cast<const T*>(g.const_data_ptr()) + pieces[k].first, pieces[k].count);
      });
    }
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  Tensor norm = make_empty(grads[0], {}, out);
  Tensor factor = make_empty(grads[0], {}, out);
  out == ScalarType::Double ? put<double>(norm, factor, std::sqrt(total), max_norm)
                            : put<float>(norm, factor, std::sqrt(total), max_norm);
  return {norm, factor};
}

}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) { m.impl("clip_grad_norm", TORCH_BOX(&fastgpt::clip_grad_norm)); }
