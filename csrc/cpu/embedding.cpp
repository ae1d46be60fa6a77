// Token and position embedding on CPUs. For ids (B, T), wte (V, C) and wpe (P, C):
//
//   y[b, t] = wte[ids[b, t]] + wpe[offset + t]
//
// and backwards, with sums in token order:
//
//   dwte[v] = sum over the (b, t) with ids[b, t] = v of dy[b, t]        dwpe[offset + t] = sum over b of dy[b, t]
//
// Saved for backward: ids. Memory decides: forward reads a row of each table and writes one of y, and backward writes
// all of dwte, most of which is zeros. A counting sort of the ids makes each row of dwte one thread's, so that it is
// written once: no atomics, and the same bits for any number of threads.

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "cpu.h"

namespace fastgpt {
namespace {

constexpr const char* kName = "embedding";
// Below 16 thousand elements a second thread costs more than it brings.
constexpr int64_t kMinElements = 16384;
// A sum over many tokens is made of sums over 32: shorter fp32 sums round less. The CUDA kernel does the same.
constexpr int64_t kRun = 32;

template <typename T, typename A>
FASTGPT_INLINE void forward_rows(
    const int64_t* ids, const T* wte, const T* wpe, T* y, int64_t first, int64_t last, int64_t length, int64_t C) {
  for (int64_t row = first; row < last; ++row) {
    const T* token = wte + ids[row] * C;
    const T* position = wpe + row % length * C;
    T* out = y + row * C;
#pragma omp simd
    for (int64_t i = 0; i < C; ++i) store(out[i], load<A>(token[i]) + load<A>(position[i]));
  }
}

// out = the sum over i < count of the rows dy[row(i)], plus what it was if `add`; `sum` and `run` are scratch for C
// accumulators each.
template <typename T, typename A, typename F>
FASTGPT_INLINE void sum_rows(const T* dy, T* out, A* sum, A* run, int64_t count, int64_t C, bool add, F row) {
  for (int64_t start = 0; start < count; start += kRun) {
    A* to = start == 0 ? sum : run;
    const T* head = dy + row(start) * C;
#pragma omp simd
    for (int64_t i = 0; i < C; ++i) to[i] = load<A>(head[i]);
    for (int64_t k = start + 1; k < std::min(start + kRun, count); ++k) {
      const T* next = dy + row(k) * C;
#pragma omp simd
      for (int64_t i = 0; i < C; ++i) to[i] += load<A>(next[i]);
    }
    if (start > 0) {
#pragma omp simd
      for (int64_t i = 0; i < C; ++i) sum[i] += run[i];
    }
  }
  if (add) {
#pragma omp simd
    for (int64_t i = 0; i < C; ++i) sum[i] += load<A>(out[i]);
  }
#pragma omp simd
  for (int64_t i = 0; i < C; ++i) store(out[i], sum[i]);
}

// Rows first..last of dwte, or what is added to them; the tokens of row v are order[starts[v]..starts[v + 1]].
template <typename T, typename A>
FASTGPT_INLINE void token_rows(
    const T* dy, const int64_t* starts, const int64_t* order, T* dwte, A* scratch, int64_t first, int64_t last,
    int64_t C, bool add) {
  for (int64_t v = first; v < last;) {
    int64_t stop = v;
    while (stop < last && starts[stop + 1] == starts[v]) ++stop;  // rows that no token names, as one stretch of zeros
    if (!add) std::memset(static_cast<void*>(dwte + v * C), 0, (stop - v) * C * sizeof(T));
    v = stop;
    for (; v < last && starts[v + 1] > starts[v]; ++v) {
      const int64_t* tokens = order + starts[v];
      const int64_t count = starts[v + 1] - starts[v];
      sum_rows<T, A>(dy, dwte + v * C, scratch, scratch + C, count, C, add, [=](int64_t k) { return tokens[k]; });
    }
  }
}

template <typename T, typename A>
FASTGPT_INLINE void position_rows(
    const T* dy, T* dwpe, A* scratch, int64_t first, int64_t last, int64_t batch, int64_t length, int64_t C) {
  for (int64_t t = first; t < last; ++t) {
    sum_rows<T, A>(dy, dwpe + t * C, scratch, scratch + C, batch, C, false, [=](int64_t b) { return b * length + t; });
  }
}

// GCC clones plain functions only, not templates: one set a dtype.
#define FASTGPT_ROWS(T, A)                                                                                             \
  FASTGPT_CLONES void forward(                                                                                         \
      const int64_t* ids, const T* wte, const T* wpe, T* y, int64_t first, int64_t last, int64_t length, int64_t C) {  \
    forward_rows<T, A>(ids, wte, wpe, y, first, last, length, C);                                                      \
  }                                                                                                                    \
  FASTGPT_CLONES void token_backward(                                                                                  \
      const T* dy, const int64_t* starts, const int64_t* order, T* dwte, A* scratch, int64_t first, int64_t last,      \
      int64_t C, bool add) {                                                                                           \
    token_rows<T, A>(dy, starts, order, dwte, scratch, first, last, C, add);                                           \
  }                                                                                                                    \
  FASTGPT_CLONES void position_backward(                                                                               \
      const T* dy, T* dwpe, A* scratch, int64_t first, int64_t last, int64_t batch, int64_t length, int64_t C) {       \
    position_rows<T, A>(dy, dwpe, scratch, first, last, batch, length, C);                                             \
  }
FASTGPT_ROWS(float, float)
FASTGPT_ROWS(double, double)
FASTGPT_ROWS(BFloat16, float)
FASTGPT_ROWS(Half, float)
#undef FASTGPT_ROWS

// The public Python function says all this better; here it keeps a direct call from reading past an end.
void check_ids(const Tensor& ids, int64_t vocab) {
  STD_TORCH_CHECK(ids.dim() == 2 && ids.scalar_type() == ScalarType::Long, "embedding: ids must be (B, T) int64");
  const int64_t* p = static_cast<const int64_t*>(ids.const_data_ptr());
  const int64_t n = ids.numel();
  int64_t low = 0, high = 0;
  for (int64_t i = 0; i < n; ++i) {
    low = std::min(low, p[i]);
    high = std::max(high, p[i]);
  }
  STD_TORCH_CHECK(
      n == 0 || (low >= 0 && high < vocab), "embedding: ids must be in [0, ", vocab, "), got ", low < 0 ? low : high);
}

// dwte as given, written or added to; dwpe new.
Tensor backward_of(Tensor dy, Tensor ids, Tensor dwte, bool add, int64_t positions, int64_t offset) {
  const int64_t vocab = dwte.size(0);
  ids = as_contiguous(ids);
  dy = as_contiguous(dy);
  check_ids(ids, vocab);
  STD_TORCH_CHECK(
      dy.dim() == 3 && dy.size(0) == ids.size(0) && dy.size(1) == ids.size(1),
      "embedding_backward: dy must be (B, T, C) for ids (B, T)");
  const int64_t batch = ids.size(0), length = ids.size(1), C = dy.size(2), rows = ids.numel();
  STD_TORCH_CHECK(
      offset >= 0 && offset + length <= positions, "embedding_backward: offset + T must be at most the positions");
  Tensor dwpe = make_empty(dy, {positions, C}, dy.scalar_type());
  if (C == 0) return dwpe;

  // Counting sort, stable: order holds the tokens by id, starts[v] where those of id v begin.
  const int64_t* ip = static_cast<const int64_t*>(ids.const_data_ptr());
  std::vector<int64_t> starts(vocab + 1, 0), order(rows);
  for (int64_t i = 0; i < rows; ++i) ++starts[ip[i] + 1];
  for (int64_t v = 0; v < vocab; ++v) starts[v + 1] += starts[v];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t i = 0; i < rows; ++i) order[next[ip[i]]++] = i;

  dispatch_float(dy, kName, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const T* dyp = static_cast<const T*>(dy.const_data_ptr());
    T* tp = static_cast<T*>(dwte.mutable_data_ptr());
    T* pp = static_cast<T*>(dwpe.mutable_data_ptr());
    // A row costs one write and as many reads as it has tokens: row v ends where v + starts[v] says, so blocks of equal
    // work are found by bisection.
    const int64_t work = vocab + rows;
    const int64_t blocks = row_blocks(work, kMinElements / C);
    auto boundary = [&](int64_t block) {
      int64_t low = 0, high = vocab;
      while (low < high) {
        const int64_t mid = (low + high) / 2;
        mid + starts[mid] < work * block / blocks ? low = mid + 1 : high = mid;
      }
      return low;
    };
    for_row_blocks(work, blocks, [&](int64_t block, int64_t, int64_t) {
      std::vector<A> scratch(2 * C);
      token_backward(
          dyp, starts.data(), order.data(), tp, scratch.data(), boundary(block), boundary(block + 1), C, add);
    });
    std::fill(pp, pp + offset * C, T(0));
    std::fill(pp + (offset + length) * C, pp + positions * C, T(0));
    T* seen = pp + offset * C;
    if (batch == 0) {
      std::fill(seen, seen + length * C, T(0));
      return;
    }
    const int64_t min_rows = kMinElements / std::max<int64_t>(1, batch * C);
    for_row_blocks(length, row_blocks(length, min_rows), [&](int64_t, int64_t first, int64_t last) {
      std::vector<A> scratch(2 * C);
      position_backward(dyp, seen, scratch.data(), first, last, batch, length, C);
    });
  });
  return dwpe;
}

}  // namespace

Tensor embedding(Tensor ids, Tensor wte, Tensor wpe, int64_t offset) {
  ids = as_contiguous(ids);
  wte = as_contiguous(wte);
  wpe = as_contiguous(wpe);
  STD_TORCH_CHECK(
      wte.dim() == 2 && wpe.dim() == 2 && wte.size(1) == wpe.size(1) && wte.scalar_type() == wpe.scalar_type(),
      "embedding: wte and wpe must be (V, C) and (P, C) of one dtype");
  check_ids(ids, wte.size(0));
  const int64_t length = ids.size(1), C = wte.size(1), rows = ids.numel();
  STD_TORCH_CHECK(
      offset >= 0 && offset + length <= wpe.size(0), "embedding: offset + T must be at most wpe's number of rows");
  Tensor y = make_empty(wte, {ids.size(0), length, C}, wte.scalar_type());
  if (y.numel() == 0) return y;
  dispatch_float(wte, kName, [&](auto tag) {
    using T = decltype(tag);
    const int64_t* ip = static_cast<const int64_t*>(ids.const_data_ptr());
    const T* token = static_cast<const T*>(wte.const_data_ptr());
    const T* position = static_cast<const T*>(wpe.const_data_ptr()) + offset * C;
    T* yp = static_cast<T*>(y.mutable_data_ptr());
    for_row_blocks(rows, row_blocks(rows, kMinElements / C), [&](int64_t, int64_t first, int64_t last) {
      forward(ip, token, position, yp, first, last, length, C);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> embedding_backward(
    Tensor dy, Tensor ids, int64_t vocab, int64_t positions, int64_t offset) {
  Tensor dwte = make_empty(dy, {vocab, dy.size(-1)}, dy.scalar_type());
  return {dwte, backward_of(dy, ids, dwte, false, positions, offset)};
}

Tensor embedding_backward_add_(Tensor dy, Tensor ids, Tensor dwte, int64_t positions, int64_t offset) {
  STD_TORCH_CHECK(
      dwte.dim() == 2 && dwte.is_contiguous() && dwte.size(1) == dy.size(-1) && dwte.scalar_type() == dy.scalar_type(),
      "embedding_backward_add_: dwte must be contiguous, (V, C) for dy (B, T, C), and of its dtype");
  return backward_of(dy, ids, dwte, true, positions, offset);
}

}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("embedding", TORCH_BOX(&fastgpt::embedding));
  m.impl("embedding_backward", TORCH_BOX(&fastgpt::embedding_backward));
  m.impl("embedding_backward_add_", TORCH_BOX(&fastgpt::embedding_backward_add_));
}
