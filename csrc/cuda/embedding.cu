// Token and position embedding on GPUs; the math is the CPU kernel's (csrc/cpu/embedding.cpp):
//
//   y[b, t] = wte[ids[b, t]] + wpe[offset + t]
//   dwte[v] = sum over the (b, t) with ids[b, t] = v of dy[b, t],  dwpe[offset + t] = sum over b of dy[b, t]
//
// Memory decides. Forward: a row of y is 64 lanes', with 16-byte accesses where the width and the pointers allow it.
// Backward sorts the ids, stably, so that the tokens of an id are one run of positions in the order of the batch. A
// block sums 32 positions: a run that lies within them goes to dwte, one that crosses their ends to a row of `partial`,
// two at most; a second kernel adds those rows in order. So no atomics, bitwise the same every time, and an id that is
// half the batch costs one block a sum over 1/32 of its tokens. Grids depend on shapes alone: nothing waits for ids.
// An id that is not in [0, V) gives a row of NaN and no gradient: no access is out of bounds.

#include "cuda.cuh"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>

namespace fastgpt {
namespace {

constexpr const char* kName = "embedding";
constexpr int kLanes = 64;  // along a row: 768 fp32 elements are three times 64 16-byte vectors
constexpr int kRows = 4;    // a block, forward
constexpr int kRun = 32;    // positions a block, backward
constexpr int kAhead = 4;   // rows that a thread loads before it adds them

template <int N, typename T, typename A>
__global__ void __launch_bounds__(kLanes * kRows) forward_kernel(
    const int64_t* ids, const T* wte, const T* wpe, T* y, int64_t rows, int64_t length, int64_t vocab, int64_t C) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.y;
  if (row >= rows) return;
  const int64_t id = ids[row];
  const bool known = id >= 0 && id < vocab;
  const auto* token = reinterpret_cast<const Vec<T, N>*>(wte + (known ? id : 0) * C);
  const auto* position = reinterpret_cast<const Vec<T, N>*>(wpe + row % length * C);
  auto* out = reinterpret_cast<Vec<T, N>*>(y + row * C);
  for (int64_t i = threadIdx.x; i < C / N; i += kLanes) {
    Vec<T, N> v = position[i];
    if (known) {
      const Vec<T, N> w = token[i];
#pragma unroll
      for (int k = 0; k < N; ++k) v.at[k] = static_cast<T>(load<A>(w.at[k]) + load<A>(v.at[k]));
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) v.at[k] = static_cast<T>(static_cast<A>(NAN));
    }
    out[i] = v;
  }
}

template <int N, typename T, typename A>
__device__ __forceinline__ void add(A (&sum)[N], const Vec<T, N>& v) {
#pragma unroll
  for (int k = 0; k < N; ++k) sum[k] += load<A>(v.at[k]);
}

template <int N, typename To, typename A>
__device__ __forceinline__ void put(To* to, const A (&sum)[N]) {
  Vec<To, N> v;
#pragma unroll
  for (int k = 0; k < N; ++k) v.at[k] = static_cast<To>(sum[k]);
  *reinterpret_cast<Vec<To, N>*>(to) = v;
}

// Block (chunk, tile) sums sorted positions 32 * chunk and on, in columns of tile. `partial` is (chunks, 2, C): of a
// run that began before the chunk, and of one that begins in it and goes on after it.
template <int N, typename T, typename A>
__global__ void __launch_bounds__(kLanes) runs_kernel(
    const T* dy, const int64_t* sorted, const int64_t* order, T* dwte, A* partial, int64_t rows, int64_t vocab,
    int64_t C) {
  __shared__ int64_t id[kRun + 2];  // with the neighbours on both sides; -1, which is no id, where there is none
  __shared__ int64_t row[kRun];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRun;
  const int count = static_cast<int>(rows - first < kRun ? rows - first : kRun);
  for (int k = threadIdx.x; k < kRun + 2; k += kLanes) {
    const int64_t at = first + k - 1;
    id[k] = at >= 0 && at < rows ? sorted[at] : -1;
  }
  for (int k = threadIdx.x; k < count; k += kLanes) row[k] = order[first + k];
  __syncthreads();
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * kLanes + threadIdx.x) * N;
  if (c >= C) return;

  A sum[N] = {};
  bool began_before = id[0] == id[1];
  for (int base = 0; base < count; base += kAhead) {
    Vec<T, N> ahead[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (base + j < count) ahead[j] = *reinterpret_cast<const Vec<T, N>*>(dy + row[base + j] * C + c);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int k = base + j;
      if (k >= count) break;
      add<N, T, A>(sum, ahead[j]);
      const int64_t v = id[k + 1];
      const bool goes_on = id[k + 2] == v;
      if (goes_on && k + 1 < count) continue;
      if (v >= 0 && v < vocab) {
        if (began_before || goes_on) {
          put<N>(partial + (static_cast<int64_t>(blockIdx.x) * 2 + (began_before ? 0 : 1)) * C + c, sum);
        } else {
          put<N>(dwte + v * C + c, sum);
        }
      }
      began_before = false;
#pragma unroll
      for (int n = 0; n < N; ++n) sum[n] = 0;
    }
  }
}

// Block (chunk, tile) adds the partial rows of the run that begins in the chunk and goes on after it, if there is one.
template <int N, typename T, typename A>
__global__ void __launch_bounds__(kLanes) join_kernel(
    const int64_t* sorted, const A* partial, T* dwte, int64_t rows, int64_t vocab, int64_t C) {
  const int64_t chunk = blockIdx.x, first = chunk * kRun, next = first + kRun;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * kLanes + threadIdx.x) * N;
  if (c >= C || next >= rows) return;
  const int64_t v = sorted[next];
  if (v < 0 || v >= vocab || sorted[next - 1] != v) return;
  if (first > 0 && sorted[first - 1] == v) return;  // it began in an earlier chunk, whose block adds it
  // The run has a row in every chunk up to the first that starts with another id.
  int64_t end = (rows + kRun - 1) / kRun;
  for (int64_t low = chunk + 1; low < end;) {
    const int64_t mid = (low + end) / 2;
    sorted[mid * kRun] == v ? low = mid + 1 : end = mid;
  }
  A sum[N] = {};
  add<N, A, A>(sum, *reinterpret_cast<const Vec<A, N>*>(partial + (chunk * 2 + 1) * C + c));
#pragma unroll 4
  for (int64_t k = chunk + 1; k < end; ++k) {
    add<N, A, A>(sum, *reinterpret_cast<const Vec<A, N>*>(partial + k * 2 * C + c));
  }
  put<N>(dwte + v * C + c, sum);
}

// Block (t, tile) sums dy[:, t]; a sum over a large batch is made of sums over 32, which round less.
template <int N, typename T, typename A>
__global__ void __launch_bounds__(kLanes) positions_kernel(
    const T* dy, T* dwpe, int64_t batch, int64_t length, int64_t C) {
  const int64_t t = blockIdx.x;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * kLanes + threadIdx.x) * N;
  if (c >= C) return;
  A sum[N] = {};
  for (int64_t start = 0; start < batch; start += kRun) {
    const int64_t stop = start + kRun < batch ? start + kRun : batch;
    A run[N] = {};
#pragma unroll 4
    for (int64_t b = start; b < stop; ++b) {
      add<N, T, A>(run, *reinterpret_cast<const Vec<T, N>*>(dy + (b * length + t) * C + c));
    }
#pragma unroll
    for (int k = 0; k < N; ++k) sum[k] += run[k];
  }
  put<N>(dwpe + t * C + c, sum);
}

void check(const Tensor& t, const Tensor& ids) {
  STD_TORCH_CHECK(ids.dim() == 2 && ids.scalar_type() == ScalarType::Long, "embedding: ids must be (B, T) int64");
  STD_TORCH_CHECK(t.get_device_index() == ids.get_device_index(), "embedding: all arguments must be on one GPU");
  STD_TORCH_CHECK(ids.numel() <= INT32_MAX, "embedding: more than 2^31 - 1 ids");
}

// (ids in ascending order, where in `ids` each stood), those that are equal in their old order. Waits for nothing.
std::tuple<Tensor, Tensor> stable_sort(const Tensor& ids) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(torch::stable::flatten(ids)), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(static_cast<int64_t>(0)), torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

dim3 grid(int64_t blocks, int64_t vectors) {
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>((vectors + kLanes - 1) / kLanes));
}

}  // namespace

Tensor embedding_cuda(Tensor ids, Tensor wte, Tensor wpe, int64_t offset) {
  STD_TORCH_CHECK(
      wte.dim() == 2 && wpe.dim() == 2 && wte.size(1) == wpe.size(1) && wte.scalar_type() == wpe.scalar_type(),
      "embedding: wte and wpe must be (V, C) and (P, C) of one dtype");
  check(wte, ids);
  check(wpe, ids);
  const torch::stable::accelerator::DeviceGuard guard(wte.get_device_index());
  ids = as_contiguous(ids);
  wte = as_contiguous(wte);
  wpe = as_contiguous(wpe);
  const int64_t length = ids.size(1), C = wte.size(1), rows = ids.numel();
  STD_TORCH_CHECK(
      offset >= 0 && offset + length <= wpe.size(0), "embedding: offset + T must be at most wpe's number of rows");
  Tensor y = make_empty(wte, {ids.size(0), length, C}, wte.scalar_type());
  if (y.numel() == 0) return y;
  dispatch_float(wte, wpe, kName, [&](auto tag, auto) {
    using T = decltype(tag);
    using A = acc_t<T>;
    constexpr int kWide = 16 / sizeof(T);
    const T* token = static_cast<const T*>(wte.const_data_ptr());
    const T* position = static_cast<const T*>(wpe.const_data_ptr()) + offset * C;
    T* yp = static_cast<T*>(y.mutable_data_ptr());
    auto run = [&](auto kernel) {
      kernel<<<static_cast<unsigned>((rows + kRows - 1) / kRows), dim3(kLanes, kRows), 0, current_stream(wte)>>>(
          static_cast<const int64_t*>(ids.const_data_ptr()), token, position, yp, rows, length, wte.size(0), C);
    };
    const bool wide = C % kWide == 0 && aligned16(token) && aligned16(position) && aligned16(yp);
    wide ? run(forward_kernel<kWide, T, A>) : run(forward_kernel<1, T, A>);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

std::tuple<Tensor, Tensor> embedding_backward_cuda(
    Tensor dy, Tensor ids, int64_t vocab, int64_t positions, int64_t offset) {
  check(dy, ids);
  STD_TORCH_CHECK(
      dy.dim() == 3 && dy.size(0) == ids.size(0) && dy.size(1) == ids.size(1),
      "embedding_backward: dy must be (B, T, C) for ids (B, T)");
  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  dy = as_contiguous(dy);
  const int64_t batch = ids.size(0), length = ids.size(1), C = dy.size(2), rows = ids.numel();
  STD_TORCH_CHECK(
      offset >= 0 && offset + length <= positions, "embedding_backward: offset + T must be at most the positions");
  Tensor dwte = make_empty(dy, {vocab, C}, dy.scalar_type());
  Tensor dwpe = make_empty(dy, {positions, C}, dy.scalar_type());
  const cudaStream_t stream = current_stream(dy);
  dispatch_float(dy, dy, kName, [&](auto tag, auto) {
    using T = decltype(tag);
    using A = acc_t<T>;
    constexpr int kWide = 16 / sizeof(T);
    const T* dyp = static_cast<const T*>(dy.const_data_ptr());
    T* tp = static_cast<T*>(dwte.mutable_data_ptr());
    T* pp = static_cast<T*>(dwpe.mutable_data_ptr());
    if (dwte.numel() > 0) STD_CUDA_CHECK(cudaMemsetAsync(tp, 0, dwte.numel() * sizeof(T), stream));
    if (dwpe.numel() > 0) STD_CUDA_CHECK(cudaMemsetAsync(pp, 0, dwpe.numel() * sizeof(T), stream));
    if (dy.numel() == 0) return;
    const auto [sorted, order] = stable_sort(ids);
    const int64_t chunks = (rows + kRun - 1) / kRun;
    Tensor partial = make_empty(dy, {chunks, 2, C}, sums_type(dy));
    const int64_t* sp = static_cast<const int64_t*>(sorted.const_data_ptr());
    const int64_t* op = static_cast<const int64_t*>(order.const_data_ptr());
    A* ap = static_cast<A*>(partial.mutable_data_ptr());
    T* seen = pp + offset * C;
    auto run = [&](auto wide) {
      constexpr int N = decltype(wide)::value;
      runs_kernel<N, T, A><<<grid(chunks, C / N), kLanes, 0, stream>>>(dyp, sp, op, tp, ap, rows, vocab, C);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      join_kernel<N, T, A><<<grid(chunks, C / N), kLanes, 0, stream>>>(sp, ap, tp, rows, vocab, C);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      positions_kernel<N, T, A><<<grid(length, C / N), kLanes, 0, stream>>>(dyp, seen, batch, length, C);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    if (C % kWide == 0 && aligned16(dyp) && aligned16(tp) && aligned16(seen)) {
      run(std::integral_constant<int, kWide>{});
    } else {
      run(std::integral_constant<int, 1>{});
    }
  });
  return {dwte, dwpe};
}

}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
  m.impl("embedding", TORCH_BOX(&fastgpt::embedding_cuda));
  m.impl("embedding_backward", TORCH_BOX(&fastgpt::embedding_backward_cuda));
}
