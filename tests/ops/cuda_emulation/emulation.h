// The CUDA language, as far as csrc/cuda uses it, for a C++ compiler and a CPU. Included before each CUDA source, in
// place of CUDA's headers; emulation.py rewrites what no macro can (`<<<...>>>`, `__shared__`), and emulation.cpp runs
// the threads and checks what they do. Speed does not matter here; whatever a GPU would punish must be an error.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>
#include <type_traits>

#include <math.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __restrict__

// ---- vector types

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define EMULATED_VECTORS(T, name)                                                                   \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                                \
  struct name##3 { T x, y, z; };                                                                    \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; };                \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                        \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(double, double)
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(unsigned, uint)
EMULATED_VECTORS(short, short)
EMULATED_VECTORS(unsigned short, ushort)
EMULATED_VECTORS(long long, longlong)
EMULATED_VECTORS(unsigned long long, ulonglong)
#undef EMULATED_VECTORS

// ---- 16-bit floats, rounded to nearest, ties to even

#define EMULATED_16_BIT(name, Rounded)                                                              \
  struct name {                                                                                     \
    unsigned short bits;                                                                            \
    name() = default;                                                                               \
    template <typename N>                                                                           \
      requires std::is_arithmetic_v<N>                                                              \
    name(N v) : bits(Rounded(static_cast<float>(v)).x) {}                                           \
    operator float() const { return static_cast<float>(Rounded(bits, Rounded::from_bits())); }      \
  };                                                                                                \
  struct alignas(4) name##2 { name x, y; };
EMULATED_16_BIT(__nv_bfloat16, torch::headeronly::BFloat16)
EMULATED_16_BIT(__half, torch::headeronly::Half)
#undef EMULATED_16_BIT
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;

inline __nv_bfloat16 __float2bfloat16(float v) { return v; }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return v; }
inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
inline __half __float2half(float v) { return v; }
inline __half __float2half_rn(float v) { return v; }
inline float __half2float(__half v) { return v; }
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
template <typename T>
float __low2float(T v) { return v.x; }
template <typename T>
float __high2float(T v) { return v.y; }

// ---- the runtime API

using cudaError_t = int;
using cudaStream_t = struct EmulatedStream*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice,
                      cudaMemcpyDefault };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlock,
                      cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                      cudaDevAttrL2CacheSize, cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor,
                      cudaDevAttrMaxThreadsPerMultiProcessor, cudaDevAttrWarpSize };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };

namespace emulation {

constexpr int kSms = 3;  // few and odd, so that a grid of some blocks an SM loops, and not evenly
constexpr size_t kSharedBytes = 48 * 1024, kSharedBytesOptIn = 227 * 1024;

// What a launch is. `shared` is what it asks for in dynamic shared memory.
struct Config {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
  Config(dim3 grid, dim3 block, size_t shared = 0, cudaStream_t stream = nullptr)
      : grid(grid), block(block), shared(shared), stream(stream) {}
};

// Runs `thread(data)` in every thread of every block; throws std::runtime_error where a thread did what it may not.
void run(const char* kernel, const Config& config, void (*thread)(void*), void* data);

enum class Exchange { sync, shuffle, shuffle_up, shuffle_down, shuffle_xor, ballot };
struct Value {
  alignas(8) unsigned char bytes[8];
};
// The calling thread's part in what the lanes of `mask` do together; returns when all of them came.
Value exchange(
    Exchange kind, unsigned mask, Value mine, size_t size, int operand, int width, const char* file, int line);
// The calling thread's part in a barrier of its block; returns the number of threads that came with a predicate.
int barrier(int predicate, const char* file, int line);

void* dynamic_shared();
void* static_shared(const void* key, size_t size, size_t align);  // a __shared__ variable, known by `key`
void tensor(AtenTensorHandle t, const void* p, bool writable);  // a tensor's memory is handed to kernels
void memory(const void* p, size_t size, bool writable, size_t granule);
void copied(const void* device, size_t size, bool written);  // the host copies from or to device memory
void atomic();  // the thread has made or will make an atomic access: its block may see what others wrote
void allow_shared(size_t bytes);
void guard(int change);

template <typename F, typename... A>
struct Launched {
  F f;
  std::tuple<A...> args;
};

// kernel<<<config>>>(args...) becomes Launch("kernel", config, [&](const auto&... a) { kernel(a...); })(args...).
template <typename F>
struct Launch {
  const char* kernel;
  Config config;
  F f;
  Launch(const char* kernel, Config config, F f) : kernel(kernel), config(config), f(f) {}
  template <typename... A>
  void operator()(A... args) {
    static_assert((sizeof(A) + ... + 0) <= 32764, "a kernel's parameters may take 32,764 bytes");
    static_assert((std::is_trivially_copyable_v<A> && ...), "a kernel's parameters are copied as bytes");
    Launched<F, A...> launched{f, {args...}};
    run(kernel, config, [](void* data) {
      auto* l = static_cast<Launched<F, A...>*>(data);
      std::apply(l->f, l->args);
    }, &launched);
  }
};

template <typename T>
Value to_value(T v) {
  static_assert((sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8) && std::is_trivially_copyable_v<T>);
  Value out{};
  std::memcpy(out.bytes, &v, sizeof(T));
  return out;
}
template <typename T>
T from_value(Value v) {
  T out;
  std::memcpy(&out, v.bytes, sizeof(T));
  return out;
}

}  // namespace emulation

inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  constexpr int values[] = {emulation::kSms, emulation::kSharedBytes, emulation::kSharedBytesOptIn, 228 * 1024,
                            50 << 20, 9, 0, 2048, 32};
  return *value = values[attribute], cudaSuccess;
}
template <typename F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) emulation::allow_shared(static_cast<size_t>(value));
  return cudaSuccess;
}
template <typename F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F*, int, size_t) {
  return *blocks = 2, cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind kind, cudaStream_t = nullptr) {
  if (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice) emulation::copied(to, n, true);
  if (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice) emulation::copied(from, n, false);
  std::memcpy(to, from, n);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t n, cudaStream_t = nullptr) {
  emulation::copied(to, n, true);
  std::memset(to, value, n);
  return cudaSuccess;
}

// ---- what torch gives to CUDA code: all on "device" -1, the CPU

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) \
  do {                       \
    if ((call) != cudaSuccess) throw std::runtime_error(#call " failed"); \
  } while (0)

inline AOTITorchError emulated_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
#define aoti_torch_get_current_cuda_stream emulated_current_cuda_stream

// Tensors tell the emulator of their memory when a pointer to it is taken.
inline AOTITorchError emulated_get_data_ptr(AtenTensorHandle t, void** out) {
  const AOTITorchError error = aoti_torch_get_data_ptr(t, out);
  if (!error) emulation::tensor(t, *out, true);
  return error;
}
inline AOTITorchError emulated_get_mutable_data_ptr(AtenTensorHandle t, void** out) {
  const AOTITorchError error = torch_get_mutable_data_ptr(t, out);
  if (!error) emulation::tensor(t, *out, true);
  return error;
}
inline AOTITorchError emulated_get_const_data_ptr(AtenTensorHandle t, const void** out) {
  const AOTITorchError error = torch_get_const_data_ptr(t, out);
  if (!error) emulation::tensor(t, *out, false);
  return error;
}
#define aoti_torch_get_data_ptr emulated_get_data_ptr
#define torch_get_mutable_data_ptr emulated_get_mutable_data_ptr
#define torch_get_const_data_ptr emulated_get_const_data_ptr

#include <torch/csrc/stable/accelerator.h>

namespace torch::stable::accelerator {
struct EmulatedDeviceGuard {
  explicit EmulatedDeviceGuard(int32_t) { emulation::guard(1); }
  ~EmulatedDeviceGuard() { emulation::guard(-1); }
  EmulatedDeviceGuard(const EmulatedDeviceGuard&) = delete;
};
}  // namespace torch::stable::accelerator
#define DeviceGuard EmulatedDeviceGuard

// ---- what a thread sees

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define EMULATED_AT std::source_location at = std::source_location::current()

inline void __syncthreads(EMULATED_AT) { emulation::barrier(0, at.file_name(), at.line()); }
inline int __syncthreads_count(int p, EMULATED_AT) { return emulation::barrier(p != 0, at.file_name(), at.line()); }
inline int __syncthreads_or(int p, EMULATED_AT) { return emulation::barrier(p != 0, at.file_name(), at.line()) > 0; }
inline int __syncthreads_and(int p, EMULATED_AT) { return emulation::barrier(p == 0, at.file_name(), at.line()) == 0; }

#define EMULATED_SHUFFLE(name, kind, Operand)                                                                         \
  template <typename T>                                                                                               \
  T name(unsigned mask, T v, Operand operand, int width = 32, EMULATED_AT) {                                          \
    return emulation::from_value<T>(emulation::exchange(emulation::Exchange::kind, mask, emulation::to_value(v),      \
                                                        sizeof(T), static_cast<int>(operand), width, at.file_name(),  \
                                                        static_cast<int>(at.line())));                                \
  }
EMULATED_SHUFFLE(__shfl_sync, shuffle, int)
EMULATED_SHUFFLE(__shfl_up_sync, shuffle_up, unsigned)
EMULATED_SHUFFLE(__shfl_down_sync, shuffle_down, unsigned)
EMULATED_SHUFFLE(__shfl_xor_sync, shuffle_xor, int)
#undef EMULATED_SHUFFLE

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATED_AT) {
  emulation::exchange(emulation::Exchange::sync, mask, {}, 0, 0, 32, at.file_name(), at.line());
}
inline unsigned __ballot_sync(unsigned mask, int p, EMULATED_AT) {
  return emulation::from_value<unsigned>(emulation::exchange(
      emulation::Exchange::ballot, mask, emulation::to_value<int>(p != 0), 4, 0, 32, at.file_name(), at.line()));
}
inline int __any_sync(unsigned mask, int p, EMULATED_AT) { return __ballot_sync(mask, p, at) != 0; }
inline int __all_sync(unsigned mask, int p, EMULATED_AT) { return __ballot_sync(mask, !p, at) == 0; }

template <typename T>
T __ldg(const T* p) { return *p; }
template <typename T>
T __ldcs(const T* p) { return *p; }
template <typename T>
T __ldcg(const T* p) { return *p; }
template <typename T>
T __ldca(const T* p) { return *p; }
template <typename T>
T __ldlu(const T* p) { return *p; }
template <typename T>
void __stcs(T* p, T v) { *p = v; }
template <typename T>
void __stcg(T* p, T v) { *p = v; }
template <typename T>
void __stwt(T* p, T v) { *p = v; }

// Atomics: threads are switched at barriers and exchanges alone, so a plain access is atomic.
#define EMULATED_ATOMIC(name, expression)                       \
  template <typename T>                                         \
  T name(T* p, std::type_identity_t<T> v) {                     \
    emulation::atomic();                                        \
    const T old = __atomic_load_n(p, __ATOMIC_RELAXED);         \
    __atomic_store_n(p, static_cast<T>(expression), __ATOMIC_RELAXED); \
    return old;                                                 \
  }
EMULATED_ATOMIC(atomicExch, v)
EMULATED_ATOMIC(atomicMax, old > v ? old : v)
EMULATED_ATOMIC(atomicMin, old < v ? old : v)
EMULATED_ATOMIC(atomicAnd, old & v)
EMULATED_ATOMIC(atomicOr, old | v)
EMULATED_ATOMIC(atomicInc, old >= v ? T(0) : T(old + 1))
#undef EMULATED_ATOMIC
template <typename T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  emulation::atomic();
  T old, next;
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  const Bits loaded = __atomic_load_n(reinterpret_cast<Bits*>(p), __ATOMIC_RELAXED);
  std::memcpy(&old, &loaded, sizeof(T));
  next = old + v;
  Bits stored;
  std::memcpy(&stored, &next, sizeof(T));
  __atomic_store_n(reinterpret_cast<Bits*>(p), stored, __ATOMIC_RELAXED);
  return old;
}
template <typename T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  emulation::atomic();
  const T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  if (old == expected) __atomic_store_n(p, v, __ATOMIC_RELAXED);
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- arithmetic

template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(b) : static_cast<C>(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  return static_cast<C>(b) < static_cast<C>(a) ? static_cast<C>(b) : static_cast<C>(a);
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __expf(float x) { return std::exp(x); }
inline float __exp2f(float x) { return std::exp2(x); }
inline float __logf(float x) { return std::log(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __float_as_uint(float v) { return emulation::from_value<unsigned>(emulation::to_value(v)); }
inline float __uint_as_float(unsigned v) { return emulation::from_value<float>(emulation::to_value(v)); }
inline int __float_as_int(float v) { return emulation::from_value<int>(emulation::to_value(v)); }
inline float __int_as_float(int v) { return emulation::from_value<float>(emulation::to_value(v)); }
