// One AdamW update of a list of parameters on GPUs; the math is the CPU kernel's (csrc/cpu/adamw_step.cpp):
//
//   g = grad * grad_scale,  p = p * (1 - lr * weight_decay)
//   m = m + (1 - beta1) * (g - m),  v = beta2 * v + (1 - beta2) * g^2
//   p = p - lr / (1 - beta1^k) * m / (sqrt(v) / sqrt(1 - beta2^k) + eps)
//
// and nothing where grad_scale is not finite.
//
// Memory decides: 28 bytes an element, in fp32 as with 16-bit parameters and masters. One launch takes up to 600
// tensors, whose table is in the kernel's parameters; four blocks an SM take chunks of 4,096 elements in turn, and a
// thread has up to 8 loads of 16 bytes in flight. step, lr and grad_scale may be on the device: thread 0 of each block
// reads them and makes what all elements share, in double, so that a graph replays with new values and nothing waits.

#include "tensor_list.cuh"

#include <algorithm>
#include <cmath>
#include <vector>

namespace fastgpt {
namespace {

constexpr const char* kName = "adamw_step";
constexpr int kThreads = 256;
constexpr int kBlocksPerSM = 4;
constexpr int kChunk = 4096;

using Table = TensorTable<5, 600>;  // params, grads, exp_avgs, exp_avg_sqs, masters
static_assert(sizeof(Table) + 256 <= 32764);

// A number, or where it is on the device.
struct Scalar {
  const void* at = nullptr;
  ScalarType dtype = ScalarType::Double;
  double value = 0;
};

struct Scalars {
  Scalar step, lr, grad_scale;
  double beta1, beta2, eps, weight_decay;
};

__host__ __device__ inline double read(const void* at, ScalarType dtype) {
  if (dtype == ScalarType::Float) return *static_cast<const float*>(at);
  if (dtype == ScalarType::Double) return *static_cast<const double*>(at);
  return static_cast<double>(*static_cast<const int64_t*>(at));
}

__device__ inline double read(const Scalar& s) { return s.at ? read(s.at, s.dtype) : s.value; }

template <typename A>
struct Step {
  A scale, decay, beta1_rest, beta2, beta2_rest, size, inverse_root, eps;
};

template <typename A>
__device__ __forceinline__ void update(A& p, A g, A& m, A& v, const Step<A>& s) {
  g *= s.scale;
  // From the nearer end, as torch's lerp: from m it loses a small g's digits where beta1 is near 0.
  m = s.beta1_rest < A(0.5) ? m + s.beta1_rest * (g - m) : g - (A(1) - s.beta1_rest) * (g - m);
  v = s.beta2 * v + s.beta2_rest * g * g;
  p = p * s.decay - s.size * m / (sqrt(v) * s.inverse_root + s.eps);
}

template <typename T, typename A, bool kMasters>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : kBlocksPerSM) adamw_kernel(
    const __grid_constant__ Table table, const __grid_constant__ Scalars scalars) {
  __shared__ Step<A> shared;
  if (threadIdx.x == 0) {
    const double k = read(scalars.step), lr = read(scalars.lr);
    shared = {static_cast<A>(read(scalars.grad_scale)),
              static_cast<A>(1 - lr * scalars.weight_decay),
              static_cast<A>(1 - scalars.beta1),
              static_cast<A>(scalars.beta2),
              static_cast<A>(1 - scalars.beta2),
              static_cast<A>(lr / (1 - pow(scalars.beta1, k))),
              static_cast<A>(1 / sqrt(1 - pow(scalars.beta2, k))),
              static_cast<A>(scalars.eps)};
  }
  __syncthreads();
  const Step<A> s = shared;
  if (!isfinite(s.scale)) return;  // in all blocks alike
  constexpr int N = 16 / sizeof(T);
  constexpr int kAhead = sizeof(T) == 4 ? 2 : 1;  // vectors that a thread loads before it computes: what registers hold
  for_chunks(table, kChunk, [&](int t, int64_t first, int count) {
    T* p = static_cast<T*>(table.at[0][t]) + first;
    const T* g = static_cast<const T*>(table.at[1][t]) + first;
    A* m = static_cast<A*>(table.at[2][t]) + first;
    A* v = static_cast<A*>(table.at[3][t]) + first;
    A* master = kMasters ? static_cast<A*>(table.at[4][t]) + first : nullptr;
    const bool wide = on_16_bytes(p) && on_16_bytes(g) && on_16_bytes(m) && on_16_bytes(v) && on_16_bytes(master);
    const int whole = wide ? count / N * N : 0;
    for (int base = threadIdx.x * N; base < whole; base += kThreads * N * kAhead) {
      T gs[kAhead][N], ps[kAhead][N];
      A ms[kAhead][N], vs[kAhead][N], as[kAhead][N];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int i = base + j * kThreads * N;
        if (i >= whole) break;
        get(gs[j], g + i);
        get(ms[j], m + i);
        get(vs[j], v + i);
        if constexpr (kMasters) {
          get(as[j], master + i);
        } else {
          get(ps[j], p + i);
        }
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int i = base + j * kThreads * N;
        if (i >= whole) break;
#pragma unroll
        for (int k = 0; k < N; ++k) {
          if constexpr (!kMasters) as[j][k] = load<A>(ps[j][k]);
          update(as[j][k], load<A>(gs[j][k]), ms[j][k], vs[j][k], s);
          ps[j][k] = static_cast<T>(as[j][k]);
        }
        put(m + i, ms[j]);
        put(v + i, vs[j]);
        put(p + i, ps[j]);
        if constexpr (kMasters) put(master + i, as[j]);
      }
    }
    for (int i = whole + threadIdx.x; i < count; i += kThreads) {
      A value = kMasters ? master[i] : load<A>(p[i]);
      A mean = m[i], square = v[i];
      update(value, load<A>(g[i]), mean, square, s);
      m[i] = mean;
      v[i] = square;
      p[i] = static_cast<T>(value);
      if constexpr (kMasters) master[i] = value;
    }
  });
}

// A number on the CPU goes into the launch; one on the device is read there.
Scalar make_scalar(const Tensor& t, const Tensor& param, const char* what) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(
      t.numel() == 1 && (dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Long),
      "adamw_step: ", what, " must be one float32, float64 or int64 number");
  if (t.get_device_index() == param.get_device_index()) return {t.const_data_ptr(), dtype, 0};
  STD_TORCH_CHECK(t.is_cpu(), "adamw_step: ", what, " must be on the parameters' device");
  return {nullptr, dtype, read(t.const_data_ptr(), dtype)};
}

// The public Python function says all this better; here it keeps a direct call from writing past an end.
void check(const std::vector<Tensor>& list, const std::vector<Tensor>& params, ScalarType dtype, const char* what) {
  STD_TORCH_CHECK(list.size() == params.size(), "adamw_step: ", what, " must be as many as params");
  for (size_t i = 0; i < list.size(); ++i) {
    STD_TORCH_CHECK(
        list[i].numel() == params[i].numel() && list[i].scalar_type() == dtype && list[i].is_contiguous() &&
            list[i].get_device_index() == params[0].get_device_index(),
        "adamw_step: ", what, "[", i, "] must be contiguous and have its parameter's size and the right dtype");
  }
}

}  // namespace

void adamw_step_cuda(
    std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
    std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> masters, Tensor step, Tensor lr, Tensor grad_scale,
    double beta1, double beta2, double eps, double weight_decay) {
  if (params.empty()) return;
  const torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
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
  const Scalars scalars{
      make_scalar(step, params[0], "step"), make_scalar(lr, params[0], "lr"),
      make_scalar(grad_scale, params[0], "grad_scale"), beta1, beta2, eps, weight_decay};
  const cudaStream_t stream = current_stream(params[0]);
  const int most = kBlocksPerSM * sm_count(params[0]);

  dispatch_float(params[0], params[0], kName, [&](auto tag, auto) {
    using T = decltype(tag);
    using A = acc_t<T>;
    auto launch = [&](const Table& table) {
      const unsigned blocks = std::min(most, table.first_chunk[table.tensors]);
      if constexpr (sizeof(T) == 2) {
        if (!masters.empty()) {
          adamw_kernel<T, A, true><<<blocks, kThreads, 0, stream>>>(table, scalars);
          STD_CUDA_KERNEL_LAUNCH_CHECK();
          return;
        }
      }
      adamw_kernel<T, A, false><<<blocks, kThreads, 0, stream>>>(table, scalars);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    for_tables<5, 600>(
        {{params, true}, {grads, false}, {exp_avgs, true}, {exp_avg_sqs, true}, {masters, true}}, kChunk, kName,
        launch);
  });
}

}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) { m.impl("adamw_step", TORCH_BOX(&fastgpt::adamw_step_cuda)); }
