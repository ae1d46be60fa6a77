// Bias and GELU in its tanh form, on GPUs; the math is csrc/cpu/bias_gelu.cpp's: with u = x + bias, e = exp(-|z|) and
// z = 2 * k * (u + c * u^3),
//
//   y = u * s  with s = (z > 0 ? 1 : e) / (1 + e)
//   dx = dy * (s + u * e / (1 + e)^2 * z'),  dbias = sum over rows of dx
//
// Memory decides: 26 instructions an element are what a bf16 forward pass at 4.3 TB/s leaves time for, so exponential
// and division are the hardware's approximate ones, right to some 2^-21. A warp has 32 vectors of 16 bytes in a row and
// walks down the rows with its bias in registers, four of them in flight (two, and the dbias too, in backward, which runs
// three blocks an SM to the end; column_sums.cuh). Widths or pointers that 16 bytes do not fit move element by element.

#include "column_sums.cuh"

#include <algorithm>
#include <tuple>

namespace fastgpt {
namespace {

constexpr const char* kName = "bias_gelu";
constexpr int kThreads = 256, kWarps = kThreads / 32;

__device__ __forceinline__ float exponential(float x) { return __expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double quotient(double a, double b) { return a / b; }

template <typename A>
struct Gate {
  A u, e, t, s;  // u within +-32, from where on e is 0; exp(-|z|); 1 / (1 + e); s

  __device__ __forceinline__ explicit Gate(A v) {
    constexpr A k2 = 1.5957691216057308, k2c = k2 * A(0.044715);  // 2 * k and 2 * k * c
    u = v > A(32) ? A(32) : v < A(-32) ? A(-32) : v;                 // NaN stays NaN
    const A z = u * (k2 + k2c * (u * u));
    e = exponential(z > A(0) ? -z : z);
    t = quotient(A(1), A(1) + e);
    s = (z > A(0) ? A(1) : e) * t;
  }
  __device__ __forceinline__ A slope() const {
    constexpr A k2 = 1.5957691216057308, k6c = k2 * A(3 * 0.044715);  // 2 * k and 6 * k * c
    return s + u * (e * t * t) * (k2 + k6c * (u * u));
  }
};

// A block's columns are tile blockIdx.x % tiles; its rows start at those of blockIdx.x / tiles, of `splits`.
template <typename T>
struct Args {
  const T *dy, *x;  // dy and partial are for backward
  const void* bias;
  T* out;
  acc_t<T>* partial;
  int64_t rows, C;
  int tiles, splits;
  bool float_bias;
};

template <int N, typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Args<T> p) {
  using A = acc_t<T>;
  using V = Vec<T, N>;
  constexpr int U = 4;
  const int64_t c = (static_cast<int64_t>(blockIdx.x % p.tiles) * 32 + threadIdx.x % 32) * N;
  if (c >= p.C) return;
  A b[N];
  load_parameters<T>(p.bias, p.float_bias, c, b);
  const int64_t step = static_cast<int64_t>(p.splits) * kWarps * U;
  for (int64_t first = static_cast<int64_t>(blockIdx.x / p.tiles) * kWarps * U + threadIdx.x / 32; first < p.rows;
       first += step) {
    V v[U];
#pragma unroll
    for (int j = 0; j < U; ++j) {
      const int64_t row = first + j * kWarps;
      if (row < p.rows) v[j] = *reinterpret_cast<const V*>(p.x + row * p.C + c);
    }
#pragma unroll
    for (int j = 0; j < U; ++j) {
      const int64_t row = first + j * kWarps;
      if (row < p.rows) {
        V out;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const A u = load<A>(v[j].at[i]) + b[i];
          out.at[i] = static_cast<T>(u * Gate<A>(u).s);
        }
        *reinterpret_cast<V*>(p.out + row * p.C + c) = out;
      }
    }
  }
}

template <int N, typename T>
__global__ void __launch_bounds__(kThreads, 3) backward_kernel(const Args<T> p) {
  using A = acc_t<T>;
  using V = Vec<T, N>;
  constexpr int U = 2;
  __shared__ A scratch[kThreads * N];
  const int64_t tile = blockIdx.x % p.tiles, split = blockIdx.x / p.tiles;
  const int64_t c = (tile * 32 + threadIdx.x % 32) * N;
  A sums[N] = {};
  if (c < p.C) {
    A b[N];
    load_parameters<T>(p.bias, p.float_bias, c, b);
    const int64_t step = static_cast<int64_t>(p.splits) * kWarps * U;
    for (int64_t first = split * kWarps * U + threadIdx.x / 32; first < p.rows; first += step) {
      V d[U], v[U];
#pragma unroll
      for (int j = 0; j < U; ++j) {
        const int64_t row = first + j * kWarps;
        if (row < p.rows) {
          d[j] = *reinterpret_cast<const V*>(p.dy + row * p.C + c);
          v[j] = *reinterpret_cast<const V*>(p.x + row * p.C + c);
        }
      }
#pragma unroll
      for (int j = 0; j < U; ++j) {
        const int64_t row = first + j * kWarps;
        if (row < p.rows) {
          V out;
#pragma unroll
          for (int i = 0; i < N; ++i) {
            const A each = load<A>(d[j].at[i]) * Gate<A>(load<A>(v[j].at[i]) + b[i]).slope();
            out.at[i] = static_cast<T>(each);
            sums[i] += each;
          }
          *reinterpret_cast<V*>(p.out + row * p.C + c) = out;
        }
      }
    }
  }
  write_partial<kThreads, 32, N>(sums, scratch, p.partial + (split * p.tiles + tile) * N * 32);
}

void check(const Tensor& x, const Tensor& bias) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, "bias_gelu: x must have a last dimension of at least 1");
  STD_TORCH_CHECK(
      bias.dim() == 1 && bias.size(0) == x.size(-1), "bias_gelu: bias must be 1-D, as long as x's last dimension");
  STD_TORCH_CHECK(bias.get_device_index() == x.get_device_index(), "bias_gelu: x and bias must be on one GPU");
}

// Calls f(p, N) with the widest N that fits, N as a constant; `blocks` bounds the blocks, each of `U` rows a warp.
template <typename T, typename F>
void with_width(Args<T> p, int64_t blocks, int U, F&& f) {
  auto run = [&](auto N) {
    p.tiles = static_cast<int>((p.C + 32 * N - 1) / (32 * N));
    const int64_t rows_a_block = kWarps * U;
    const int64_t most = std::max<int64_t>(1, blocks / p.tiles), needed = (p.rows + rows_a_block - 1) / rows_a_block;
    p.splits = static_cast<int>(std::max<int64_t>(1, std::min(most, needed)));
    f(p, N);
  };
  constexpr int N = 16 / sizeof(T);
  const bool wide =
      p.C % N == 0 && aligned16(p.x) && aligned16(p.dy) && aligned16(p.bias) && aligned16(p.out);
  wide ? run(std::integral_constant<int, N>{}) : run(std::integral_constant<int, 1>{});
}

Tensor bias_gelu(Tensor x, Tensor bias) {
  check(x, bias);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  x = as_contiguous(x);
  bias = as_contiguous(bias);
  const int64_t C = x.size(-1), rows = x.numel() / C;
  Tensor y = make_like(x);
  if (rows == 0) return y;
  dispatch_float(x, bias, kName, [&](auto tag, bool float_bias) {
    using T = decltype(tag);
    const Args<T> args{
        nullptr, static_cast<const T*>(x.const_data_ptr()), bias.const_data_ptr(),
        static_cast<T*>(y.mutable_data_ptr()), nullptr, rows, C, 0, 0, float_bias};
    with_width(args, INT32_MAX, 4, [&](const Args<T>& p, auto N) {
      const int64_t grid = static_cast<int64_t>(p.tiles) * p.splits;
      forward_kernel<N(), T><<<static_cast<unsigned>(grid), kThreads, 0, current_stream(x)>>>(p);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor dy, Tensor x, Tensor bias) {
  check(x, bias);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  STD_TORCH_CHECK(
      dy.numel() == x.numel() && dy.scalar_type() == x.scalar_type() && dy.get_device_index() == x.get_device_index(),
      "bias_gelu_backward: dy must have x's shape, dtype and device");
  dy = as_contiguous(dy);
  x = as_contiguous(x);
  bias = as_contiguous(bias);
  const int64_t C = x.size(-1), rows = x.numel() / C;
  Tensor dx = make_like(x);
  Tensor dbias = make_like(bias);
  dispatch_float(x, bias, kName, [&](auto tag, bool float_bias) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Args<T> args{
        static_cast<const T*>(dy.const_data_ptr()), static_cast<const T*>(x.const_data_ptr()), bias.const_data_ptr(),
        static_cast<T*>(dx.mutable_data_ptr()), nullptr, rows, C, 0, 0, float_bias};
    with_width(args, 3 * sm_count(x), 2, [&](Args<T> p, auto N) {
      Tensor partial = make_empty(x, {p.splits, static_cast<int64_t>(p.tiles) * N() * 32}, sums_type(x));
      p.partial = static_cast<A*>(partial.mutable_data_ptr());
      const int64_t grid = static_cast<int64_t>(p.tiles) * p.splits;
      backward_kernel<N(), T><<<static_cast<unsigned>(grid), kThreads, 0, current_stream(x)>>>(p);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      reduce_columns<A>(partial, 32, N(), N(), dbias, nullptr, kName);
    });
  });
  return {dx, dbias};
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
  m.impl("bias_gelu", TORCH_BOX(&fastgpt::bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&fastgpt::bias_gelu_backward));
}
