// The norm of all gradients, and the factor that clips it, on GPUs; the math is the CPU kernel's:
//
//   norm = sqrt(sum over all elements of g^2)        factor = min(1, max_norm / (norm + 1e-6)), or NaN
//
// Memory decides: the gradients are read once and not written. A fixed grid of four blocks an SM takes chunks of 8,192
// elements in turn, in one launch for each dtype, and leaves one sum a block in `partial`; a second kernel of one block
// adds those in order: no atomics, bitwise the same every time on one GPU, and nothing waits for the result. Squares
// are in double: fp32 squares overflow from 1.8e19 and vanish below 1e-23, and at one conversion and one fused
// multiply-add an element the loads still decide.

#include "tensor_list.cuh"

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>
#include <vector>

namespace fastgpt {
namespace {

constexpr const char* kName = "clip_grad_norm";
constexpr int kThreads = 256;
constexpr int kBlocksPerSM = 4;
constexpr int kChunk = 8192;
constexpr int kAhead = 4;  // vectors that a thread loads before it adds

using Table = TensorTable<1, 1024>;
static_assert(sizeof(Table) + 64 <= 32764);

template <typename T>
__device__ __forceinline__ double square(T x) {
  const double d = load<acc_t<T>>(x);
  return d * d;
}

// What this thread adds of the elements g[0..count).
template <typename T>
__device__ __forceinline__ double squares(const T* g, int count) {
  constexpr int N = 16 / sizeof(T);
  const int whole = on_16_bytes(g) ? count / N * N : 0;
  double sum = 0;
  for (int base = threadIdx.x * N; base < whole; base += kThreads * N * kAhead) {
    T v[kAhead][N];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int i = base + j * kThreads * N;
      if (i < whole) get(v[j], g + i);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (base + j * kThreads * N >= whole) break;
#pragma unroll
      for (int k = 0; k < N; ++k) sum += square(v[j][k]);
    }
  }
  for (int i = whole + threadIdx.x; i < count; i += kThreads) sum += square(g[i]);
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM) squares_kernel(
    const __grid_constant__ Table table, double* partial) {
  __shared__ double scratch[64];
  double sum = 0, none = 0;
  for_chunks(table, kChunk, [&](int t, int64_t first, int count) {
    sum += squares(static_cast<const T*>(table.at[0][t]) + first, count);
  });
  block_sum(sum, none, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

template <typename O>
__global__ void __launch_bounds__(kThreads) norm_kernel(
    const double* partial, int64_t blocks, double max_norm, O* norm, O* factor) {
  __shared__ double scratch[64];
  double sum = 0, none = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) sum += partial[i];
  block_sum(sum, none, scratch);
  if (threadIdx.x == 0) {
    const double n = sqrt(sum), f = max_norm / (n + 1e-6);
    const O rounded = static_cast<O>(n);
    *norm = rounded;
    *factor = static_cast<O>(!isfinite(rounded) ? NAN : f > 1 ? 1 : f);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> clip_grad_norm_cuda(std::vector<Tensor> grads, double max_norm) {
  STD_TORCH_CHECK(!grads.empty(), "clip_grad_norm: grads must not be empty");
  const torch::stable::accelerator::DeviceGuard guard(grads[0].get_device_index());
  std::map<ScalarType, std::vector<Tensor>> by_dtype;
  for (const Tensor& g : grads) {
    STD_TORCH_CHECK(
        g.get_device_index() == grads[0].get_device_index(), "clip_grad_norm: grads must be on one device");
    by_dtype[g.scalar_type()].push_back(as_contiguous(g));
  }
  const ScalarType out = by_dtype.count(ScalarType::Double) ? ScalarType::Double : ScalarType::Float;
  const cudaStream_t stream = current_stream(grads[0]);
  const int most = kBlocksPerSM * sm_count(grads[0]);
  int64_t tables = 0;
  for (const auto& [dtype, list] : by_dtype) tables += (static_cast<int64_t>(list.size()) + 1023) / 1024;
  Tensor partial = make_empty(grads[0], {tables * most}, ScalarType::Double);
  Tensor norm = make_empty(grads[0], {}, out);
  Tensor factor = make_empty(grads[0], {}, out);
  double* sums = static_cast<double*>(partial.mutable_data_ptr());
  int64_t blocks = 0;
  for (const auto& [dtype, list] : by_dtype) {
    dispatch_float(list[0], list[0], kName, [&](auto tag, auto) {
      for_tables<1, 1024>({{list, false}}, kChunk, kName, [&](const Table& table) {
        const int grid = std::min(most, table.first_chunk[table.tensors]);
        squares_kernel<decltype(tag)><<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(table, sums + blocks);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
        blocks += grid;
      });
    });
  }
  auto finish = [&](auto tag) {
    using O = decltype(tag);
    norm_kernel<O><<<1, kThreads, 0, stream>>>(
        sums, blocks, max_norm, static_cast<O*>(norm.mutable_data_ptr()), static_cast<O*>(factor.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  out == ScalarType::Double ? finish(double{}) : finish(float{});
  return {norm, factor};
}

}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) { m.impl("clip_grad_norm", TORCH_BOX(&fastgpt::clip_grad_norm_cuda)); }
