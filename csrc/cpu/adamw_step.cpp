// One AdamW update (Loshchilov & Hutter 2019) of a list of parameters on CPUs. For each element, at step k:
//
//   g = grad * grad_scale
//   p = p * (1 - lr * weight_decay)
//   m = m + (1 - beta1) * (g - m)            v = beta2 * v + (1 - beta2) * g^2
//   p = p - lr / (1 - beta1^k) * m / (sqrt(v) / sqrt(1 - beta2^k) + eps)
//
// and nothing where grad_scale is not finite. With masters, p is read from and written to its fp32 master, and the parameter gets the rounded copy. Memory decides:
// 28 bytes an element in fp32 (g read; p, m and v read and written). Threads share the elements of all tensors as if
// they were one, so neither many small tensors nor one large one leaves a thread idle. An element's result depends on
// no other: the same bits for any number of threads.

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu.h"

namespace fastgpt {
namespace {

constexpr const char* kName = "adamw_step";
// Below 16 thousand elements a second thread costs more than it brings.
constexpr int64_t kMinElements = 16384;

// What is the same for all elements, computed once in double.
template <typename A>
struct Step {
  A scale, decay, beta1_rest, beta2, beta2_rest, size, inverse_root, eps;
};

template <typename T, typename A, bool kMasters>
FASTGPT_INLINE void update_range(
    T* p, const T* g, A* m, A* v, A* master, int64_t first, int64_t last, const Step<A>& s) {
#pragma omp simd
  for (int64_t i = first; i < last; ++i) {
    const A grad = load<A>(g[i]) * s.scale;
    // From the nearer end, as torch's lerp: from m it loses a small g's digits where beta1 is near 0.
    const A mean = s.beta1_rest < A(0.5) ? m[i] + s.beta1_rest * (grad - m[i])
                                         : grad - (A(1) - s.beta1_rest) * (grad - m[i]);
    const A square = s.beta2 * v[i] + s.beta2_rest * grad * grad;
    const A before = (kMasters ? master[i] : load<A>(p[i])) * s.decay;
    const A after = before - s.size * mean / (std::sqrt(square) * s.inverse_root + s.eps);
    m[i] = mean;
    v[i] = square;
    if constexpr (kMasters) master[i] = after;
    store(p[i], after);
  }
}

// GCC clones plain functions only, not templates: one a dtype.
#define FASTGPT_UPDATE(T, A, MASTERS, NAME)                                                                            \
  FASTGPT_CLONES void NAME(                                                                                            \
      T* p, const T* g, A* m, A* v, A* master, int64_t first, int64_t last, const Step<A>& s) {                        \
    update_range<T, A, MASTERS>(p, g, m, v, master, first, last, s);                                                   \
  }
FASTGPT_UPDATE(float, float, false, update)
FASTGPT_UPDATE(double, double, false, update)
FASTGPT_UPDATE(BFloat16, float, false, update)
FASTGPT_UPDATE(Half, float, false, update)
FASTGPT_UPDATE(BFloat16, float, true, update_masters)
FASTGPT_UPDATE(Half, float, true, update_masters)
#undef FASTGPT_UPDATE

double read_scalar(const Tensor& t, const char* what) {
  STD_TORCH_CHECK(t.numel() == 1 && t.is_cpu(), "adamw_step: ", what, " must be one number on the CPU");
  switch (t.scalar_type()) {
    case ScalarType::Float: return *static_cast<const float*>(t.const_data_ptr());
    case ScalarType::Double: return *static_cast<const double*>(t.const_data_ptr());
    case ScalarType::Long: return static_cast<double>(*static_cast<const int64_t*>(t.const_data_ptr()));
    default: STD_TORCH_CHECK(false, "adamw_step: ", what, " must be float32, float64 or int64");
  }
}

// The public Python function says all this better; here it keeps a direct call from writing past an end.
void check(const std::vector<Tensor>& list, const std::vector<Tensor>& params, ScalarType dtype, const char* what) {
  STD_TORCH_CHECK(list.size() == params.size(), "adamw_step: ", what, " must be as many as params");
  for (size_t i = 0; i < list.size(); ++i) {
    STD_TORCH_CHECK(
        list[i].numel() == params[i].numel() && list[i].scalar_type() == dtype && list[i].is_contiguous() &&
            list[i].is_cpu(),
        "adamw_step: ", what, "[", i, "] must be contiguous and have its parameter's size and the right dtype");
  }
}

}  // namespace

void adamw_step(
    std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
    std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> masters, Tensor step, Tensor lr, Tensor grad_scale,
    double beta1, double beta2, double eps, double weight_decay) {
  if (params.empty()) return;
  const ScalarType dtype = params[0].scalar_type(), sums = sums_type(params[0]);
  for (Tensor& g : grads) g = as_contiguous(g);
  check(params, params, dtype, "params");
  check(grads, params, dtype, "grads");
  check(exp_avgs, params, sums, "exp_avgs");
  check(exp_avg_sqs, params, sums, "exp_avg_sqs");
  if (!masters.empty()) {
    check(masters, params, ScalarType::Float, "masters");
    STD_TORCH_CHECK(dtype != sums, "adamw_step: masters are for 16-bit params");
  }
  std::vector<int64_t> starts{0};  // where each tensor begins if they all stood in one row
  for (const Tensor& p : params) starts.push_back(starts.back() + p.numel());
  const double k = read_scalar(step, "step"), rate = read_scalar(lr, "lr");

  dispatch_float(params[0], kName, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    if (!std::isfinite(static_cast<A>(read_scalar(grad_scale, "grad_scale")))) return;
    const Step<A> s{
        static_cast<A>(read_scalar(grad_scale, "grad_scale")),
        static_cast<A>(1 - rate * weight_decay),
        static_cast<A>(1 - beta1),
        static_cast<A>(beta2),
        static_cast<A>(1 - beta2),
        static_cast<A>(rate / (1 - std::pow(beta1, k))),
        static_cast<A>(1 / std::sqrt(1 - std::pow(beta2, k))),
        static_cast<A>(eps)};
    const int64_t total = starts.back();
    for_row_blocks(total, row_blocks(total, kMinElements), [&](int64_t, int64_t first, int64_t last) {
      size_t i = std::upper_bound(starts.begin(), starts.end(), first) - starts.begin() - 1;
      for (; i < params.size() && starts[i] < last; ++i) {
        const int64_t begin = std::max(first, starts[i]) - starts[i], end = std::min(last, starts[i + 1]) - starts[i];
        T* p = static_cast<T*>(params[i].mutable_data_ptr());
        const T* g = static_cast<const T*>(grads[i].const_data_ptr());
        A* m = static_cast<A*>(exp_avgs[i].mutable_data_ptr());
        A* v = static_cast<A*>(exp_avg_sqs[i].mutable_data_ptr());
        if constexpr (!std::is_same_v<T, A>) {
          if (!masters.empty()) {
            update_masters(p, g, m, v, static_cast<A*>(masters[i].mutable_data_ptr()), begin, end, s);
            continue;
          }
        }
        update(p, g, m, v, static_cast<A*>(nullptr), begin, end, s);
      }
    });
  });
}

}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) { m.impl("adamw_step", TORCH_BOX(&fastgpt::adamw_step)); }
