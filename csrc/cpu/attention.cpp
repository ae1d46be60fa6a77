// Causal attention of short sequences on CPUs, float32, forward and backward: see fastgpt/ops/attention.py for the math.
//
// A head at a time, in one thread, and in it kRows rows of q at a time, whose scores for all columns up to the diagonal
// fit into the core's cache. So the softmax is the plain one, in two passes over them, and nothing has to be rescaled:
//
//   forward    s = (scale q) k^T;  p = exp(s - max);  o = p v / sum;  logsumexp = max + log(sum)
//   backward   s = (scale q) k^T;  p = exp(s - logsumexp);  dp = do v^T;  ds = p (dp - delta), delta = do . o;
//              dq = scale ds k;  dv += p^T do;  dk += ds^T (scale q)
//
// All products go through one register tile of 8 rows and 32 columns. What it reads along columns (k^T, v, ...) is
// copied once a head, padded with zeros to whole tiles, so that no tile has an edge. Each sequence is a segment of a
// batch row: the whole row, or one of its documents.

// A multiplication and the addition after it are to be one instruction here.
#ifdef __clang__
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#include "cpu.h"
#include "tensor.h"

// No clones per instruction set, as other kernels have: a function that is cloned has its registers split up for the
// oldest of them first. This kernel is for AVX-512 (attention_cpu.py looks), whose 32 registers its tile fills.
#ifdef __x86_64__
#define FASTGPT_AVX512 __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,fma")))
#else
#define FASTGPT_AVX512
#endif
#define FASTGPT_AVX512_INLINE FASTGPT_INLINE FASTGPT_AVX512

namespace fastgpt {
namespace {

constexpr int64_t kRows = 32;   // of q in one go; half of a diagonal block of that size is computed for nothing
constexpr int64_t kTile = 32;   // columns of a tile: two registers
constexpr int64_t kHeight = 8;  // rows of a tile
constexpr int64_t kLane = kLanes<float>;

using Vector = Lanes<float>;
typedef int32_t Integers __attribute__((vector_size(64)));
constexpr Integers kIota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

FASTGPT_AVX512_INLINE Vector exp_lanes(Vector x) {
  Vector y;
  exp_nonpositive(x, y);
  return y;
}

constexpr int64_t padded(int64_t n) { return (n + kTile - 1) / kTile * kTile; }

// c (+)= a b: a tile of c over `depth` products. a(m, k) = a[m * am + k * ak]; b and c have their columns side by side.
template <bool kAdd>
FASTGPT_AVX512_INLINE void tile(
    const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth) {
  constexpr int64_t w = kLane;
  Vector sum[kHeight][2];
  for (int64_t m = 0; m < kHeight; ++m) {
    for (int64_t n = 0; n < 2; ++n) {
      if constexpr (kAdd) {
        load_lanes(c + m * ldc + n * w, sum[m][n]);
      } else {
        sum[m][n] = Vector{};
      }
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector b0, b1;
    load_lanes(b + k * ldb, b0);
    load_lanes(b + k * ldb + w, b1);
#pragma GCC unroll 8
    for (int64_t m = 0; m < kHeight; ++m) {
      const float x = a[m * am + k * ak];
      sum[m][0] += x * b0;
      sum[m][1] += x * b1;
    }
  }
  for (int64_t m = 0; m < kHeight; ++m) {
    for (int64_t n = 0; n < 2; ++n) store_lanes(c + m * ldc + n * w, sum[m][n]);
  }
}

// The same for `rows` x `columns` of c, multiples of a tile's. `panel` is how far apart b's panels of kTile columns are.
template <bool kAdd>
FASTGPT_AVX512_INLINE void product(
    const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, int64_t panel, float* c, int64_t ldc,
    int64_t rows, int64_t columns, int64_t depth) {
  for (int64_t n = 0; n < columns; n += kTile) {
    for (int64_t m = 0; m < rows; m += kHeight) {
      tile<kAdd>(a + m * am, am, ak, b + n / kTile * panel, ldb, c + m * ldc + n, ldc, depth);
    }
  }
}

// Rows of a tensor (B, H, T, D) that belong to one head of one segment.
struct Rows {
  const float* first;
  int64_t stride;
  const float* operator[](int64_t t) const { return first + t * stride; }
};

// Copies rows [0, n) times `factor` to (to_rows, width), zeros behind and beside them.
FASTGPT_AVX512_INLINE void copy_rows(
    const Rows& from, int64_t n, int64_t D, float factor, float* to, int64_t to_rows, int64_t width) {
  for (int64_t t = 0; t < to_rows; ++t) {
    float* row = to + t * width;
    if (t < n) {
      for (int64_t d = 0; d < D; ++d) row[d] = from[t][d] * factor;
    }
    std::fill(row + (t < n ? D : 0), row + width, 0.0f);
  }
}

// One step of a transposition: where bit `kBit` of a lane's number and of its row's differ, the two rows change lanes.
template <int kBit, size_t... kL>
FASTGPT_AVX512_INLINE void exchange(Vector& a, Vector& b, std::index_sequence<kL...>) {
#ifdef __clang__
  const Vector low = __builtin_shufflevector(a, b, (kL & kBit ? 16 + kL - kBit : kL)...);
  b = __builtin_shufflevector(a, b, (kL & kBit ? 16 + kL : kL + kBit)...);
#else
  const Vector low = __builtin_shuffle(a, b, Integers{(kL & kBit ? 16 + kL - kBit : kL)...});
  b = __builtin_shuffle(a, b, Integers{(kL & kBit ? 16 + kL : kL + kBit)...});
#endif
  a = low;
}

template <int kBit>
FASTGPT_AVX512_INLINE void exchange_all(Vector* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (!(i & kBit)) exchange<kBit>(rows[i], rows[i + kBit], std::make_index_sequence<16>());
  }
}

// Copies rows [0, n) as columns, in panels of kTile columns, each (D, kTile); zeros behind them.
FASTGPT_AVX512_INLINE void copy_columns(const Rows& from, int64_t n, int64_t D, float* to) {
  for (int64_t t = 0; t < padded(n); t += kLane) {
    float* panel = to + t / kTile * kTile * D + t % kTile;
    for (int64_t d = 0; d < D; d += kLane) {
      Vector rows[kLane];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLane; ++i) {
        if (t + i < n) {
          load_lanes(from[t + i] + d, rows[i]);
        } else {
          rows[i] = Vector{};
        }
      }
      exchange_all<1>(rows), exchange_all<2>(rows), exchange_all<4>(rows), exchange_all<8>(rows);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLane; ++i) store_lanes(panel + (d + i) * kTile, rows[i]);
    }
  }
}

// One thread's memory, for sequences of up to T tokens. All of it begins at cache lines: a register that lies across two
// of them takes twice as long to load.
struct Scratch {
  Scratch(int64_t T, int64_t D, bool backward)
      : width(padded(D)), columns(padded(T)), ld(columns + kLane), memory(allocate(size(D, backward)), std::free) {
    float* at = memory.get();
    if (!at) throw std::bad_alloc();
    const auto take = [&at](int64_t n) { return std::exchange(at, at + n); };
    q = take(kRows * width);
    out = take(kRows * width);
    scores = take(kRows * ld);
    k_columns = take(columns * D);
    v = take(columns * width);
    if (!backward) return;
    dout = take(kRows * width);
    dscores = take(kRows * ld);
    v_columns = take(columns * D);
    k = take(columns * width);
    dk = take(columns * width);
    dv = v;  // backward reads v by columns only
  }
  int64_t size(int64_t D, bool backward) const {
    const int64_t forward = kRows * (2 * width + ld) + columns * (D + width);
    return backward ? forward + kRows * (width + ld) + columns * (D + 2 * width) : forward;
  }
  static float* allocate(int64_t n) { return static_cast<float*>(std::aligned_alloc(64, sizeof(float) * n)); }
  int64_t width, columns, ld;
  std::unique_ptr<float, decltype(&std::free)> memory;
  float *q, *out, *scores, *k_columns, *v;
  float *dout = nullptr, *dscores = nullptr, *v_columns = nullptr, *k = nullptr, *dk = nullptr, *dv = nullptr;
};

FASTGPT_AVX512_INLINE void forward_head(
    const Rows& q, const Rows& k, const Rows& v, float* out, int64_t out_stride, float* lse, int64_t lse_stride,
    int64_t T, int64_t D, float scale, Scratch& s) {
  copy_columns(k, T, D, s.k_columns);
  copy_rows(v, T, D, 1.0f, s.v, padded(T), s.width);
  for (int64_t i = 0; i < T; i += kRows) {
    const int64_t rows = std::min(kRows, T - i), end = i + kRows;  // end <= padded(T), as kRows is kTile
    copy_rows({q[i], q.stride}, rows, D, scale, s.q, kRows, s.width);
    product<false>(s.q, s.width, 1, s.k_columns, kTile, D * kTile, s.scores, s.ld, kRows, end, D);
    float sums[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      float* row = s.scores + r * s.ld;
      const int32_t seen = static_cast<int32_t>(i + r + 1);
      Vector tops = Vector{} + row[0], parts = {};
      for (int64_t j = 0; j < end; j += kLane) {
        Vector x;
        load_lanes(row + j, x);
        tops = (kIota + static_cast<int32_t>(j) < seen) & (x > tops) ? x : tops;
      }
      float each[kLane];
      store_lanes(each, tops);
      const float top = *std::max_element(each, each + kLane);
      for (int64_t j = 0; j < end; j += kLane) {
        Vector x;
        load_lanes(row + j, x);
        x = kIota + static_cast<int32_t>(j) < seen ? exp_lanes(x - top) : Vector{};
        store_lanes(row + j, x);
        parts += x;
      }
      const float sum = total(parts);
      sums[r] = sum;
      if (r < rows) lse[(i + r) * lse_stride] = top + std::log(sum);
    }
    product<false>(s.scores, s.ld, 1, s.v, s.width, kTile, s.out, s.width, kRows, s.width, end);
    for (int64_t r = 0; r < rows; ++r) {
      const float factor = 1.0f / sums[r];
      for (int64_t d = 0; d < D; ++d) out[(i + r) * out_stride + d] = s.out[r * s.width + d] * factor;
    }
  }
}

FASTGPT_AVX512_INLINE void backward_head(
    const Rows& dout, const Rows& q, const Rows& k, const Rows& v, const Rows& out, const float* lse,
    int64_t lse_stride, float* dq, float* dk, float* dv, int64_t grad_stride, int64_t T, int64_t D, float scale,
    Scratch& s) {
  copy_columns(k, T, D, s.k_columns);
  copy_columns(v, T, D, s.v_columns);
  copy_rows(k, T, D, 1.0f, s.k, padded(T), s.width);
  std::fill(s.dk, s.dk + padded(T) * s.width, 0.0f);
  std::fill(s.dv, s.dv + padded(T) * s.width, 0.0f);
  for (int64_t i = 0; i < T; i += kRows) {
    const int64_t rows = std::min(kRows, T - i), end = i + kRows;
    copy_rows({q[i], q.stride}, rows, D, scale, s.q, kRows, s.width);
    copy_rows({dout[i], dout.stride}, rows, D, 1.0f, s.dout, kRows, s.width);
    product<false>(s.q, s.width, 1, s.k_columns, kTile, D * kTile, s.scores, s.ld, kRows, end, D);
    product<false>(s.dout, s.width, 1, s.v_columns, kTile, D * kTile, s.dscores, s.ld, kRows, end, D);
    for (int64_t r = 0; r < kRows; ++r) {
      float* row = s.scores + r * s.ld;
      float* drow = s.dscores + r * s.ld;
      const int32_t seen = static_cast<int32_t>(r < rows ? i + r + 1 : 0);
      float delta = 0, l = 0;
      if (seen) {
        Vector parts = {}, o, g;
        for (int64_t d = 0; d < D; d += kLane) {
          load_lanes(out[i + r] + d, o);
          load_lanes(dout[i + r] + d, g);
          parts += o * g;
        }
        delta = total(parts);
        l = lse[(i + r) * lse_stride];
      }
      for (int64_t j = 0; j < end; j += kLane) {
        Vector x, dp;
        load_lanes(row + j, x);
        load_lanes(drow + j, dp);
        x = kIota + static_cast<int32_t>(j) < seen ? exp_lanes(x - l) : Vector{};
        store_lanes(row + j, x);
        store_lanes(drow + j, x * (dp - delta));
      }
    }
    product<false>(s.dscores, s.ld, 1, s.k, s.width, kTile, s.out, s.width, kRows, s.width, end);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < D; ++d) dq[(i + r) * grad_stride + d] = s.out[r * s.width + d] * scale;
    }
    product<true>(s.scores, 1, s.ld, s.dout, s.width, kTile, s.dv, s.width, end, s.width, kRows);
    product<true>(s.dscores, 1, s.ld, s.q, s.width, kTile, s.dk, s.width, end, s.width, kRows);
  }
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t d = 0; d < D; ++d) {
      dk[t * grad_stride + d] = s.dk[t * s.width + d];
      dv[t * grad_stride + d] = s.dv[t * s.width + d];
    }
  }
}

FASTGPT_AVX512 void forward(
    const Rows& q, const Rows& k, const Rows& v, float* out, int64_t out_stride, float* lse, int64_t lse_stride,
    int64_t T, int64_t D, float scale, Scratch& s) {
  forward_head(q, k, v, out, out_stride, lse, lse_stride, T, D, scale, s);
}

FASTGPT_AVX512 void backward(
    const Rows& dout, const Rows& q, const Rows& k, const Rows& v, const Rows& out, const float* lse,
    int64_t lse_stride, float* dq, float* dk, float* dv, int64_t grad_stride, int64_t T, int64_t D, float scale,
    Scratch& s) {
  backward_head(dout, q, k, v, out, lse, lse_stride, dq, dk, dv, grad_stride, T, D, scale, s);
}

void check(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(
      t.dim() == 4 && t.scalar_type() == ScalarType::Float && t.stride(3) == 1 && t.size(3) % kLane == 0,
      "attention_causal: ", name, " must be (B, H, T, D), float32, D a multiple of 16, with rows that are contiguous");
}

template <typename T>
T* at(T* data, const Tensor& t, int64_t b, int64_t h, int64_t row) {
  return data + b * t.stride(0) + h * t.stride(1) + row * t.stride(2);
}
const float* input(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* output(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// Calls f(b, h, first row, rows, scratch) for each head of each segment; which thread has which makes no difference.
template <typename F>
void for_heads(const Tensor& q, const Tensor& segments, bool backward, F&& f) {
  STD_TORCH_CHECK(
      segments.dim() == 2 && segments.size(1) == 3 && segments.is_contiguous() &&
          segments.scalar_type() == ScalarType::Long,
      "attention_causal: segments must be (n, 3), int64: batch row, first token, end");
  const int64_t H = q.size(1), D = q.size(3), n = segments.size(0);
  const int64_t* s = static_cast<const int64_t*>(segments.const_data_ptr());
  int64_t longest = 0;
  for (int64_t i = 0; i < n; ++i) longest = std::max(longest, s[3 * i + 2] - s[3 * i + 1]);
  torch::stable::parallel_for(0, n * H, 1, [&](int64_t first, int64_t last) {
    Scratch scratch(longest, D, backward);
    for (int64_t i = first; i < last; ++i) {
      const int64_t* segment = s + i / H * 3;
      f(segment[0], i % H, segment[1], segment[2] - segment[1], scratch);
    }
  });
}

}  // namespace

void attention_causal_(
    Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor segments, double scale) {
  check(q, "q"), check(k, "k"), check(v, "v"), check(out, "out");
  const int64_t D = q.size(3);
  const float *q0 = input(q), *k0 = input(k), *v0 = input(v);
  float *out0 = output(out), *lse0 = output(lse);
  for_heads(q, segments, false, [&](int64_t b, int64_t h, int64_t t, int64_t rows, Scratch& scratch) {
    forward(
        {at(q0, q, b, h, t), q.stride(2)}, {at(k0, k, b, h, t), k.stride(2)}, {at(v0, v, b, h, t), v.stride(2)},
        at(out0, out, b, h, t), out.stride(2), at(lse0, lse, b, h, t), lse.stride(2), rows, D,
        static_cast<float>(scale), scratch);
  });
}

void attention_causal_backward_(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor dq, Tensor dk, Tensor dv,
    Tensor segments, double scale) {
  check(dout, "dout"), check(q, "q"), check(k, "k"), check(v, "v"), check(out, "out");
  check(dq, "dq"), check(dk, "dk"), check(dv, "dv");
  STD_TORCH_CHECK(
      dq.stride(2) == dk.stride(2) && dq.stride(2) == dv.stride(2),
      "attention_causal: dq, dk and dv must have their rows equally far apart");
  const int64_t D = q.size(3);
  const float *g0 = input(dout), *q0 = input(q), *k0 = input(k), *v0 = input(v), *out0 = input(out), *lse0 = input(lse);
  float *dq0 = output(dq), *dk0 = output(dk), *dv0 = output(dv);
  for_heads(q, segments, true, [&](int64_t b, int64_t h, int64_t t, int64_t rows, Scratch& scratch) {
    backward(
        {at(g0, dout, b, h, t), dout.stride(2)}, {at(q0, q, b, h, t), q.stride(2)},
        {at(k0, k, b, h, t), k.stride(2)}, {at(v0, v, b, h, t), v.stride(2)}, {at(out0, out, b, h, t), out.stride(2)},
        at(lse0, lse, b, h, t), lse.stride(2), at(dq0, dq, b, h, t), at(dk0, dk, b, h, t), at(dv0, dv, b, h, t),
        dq.stride(2), rows, D, static_cast<float>(scale), scratch);
  });
}

}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("attention_causal_", TORCH_BOX(&fastgpt::attention_causal_));
  m.impl("attention_causal_backward_", TORCH_BOX(&fastgpt::attention_causal_backward_));
}
