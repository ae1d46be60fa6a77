// The passes between the matmuls of attention with dropout, on CPUs: see fastgpt/ops/attention.py for the math and
// fastgpt/ops/philox.py for the random numbers. Each takes scores s = q k^T of some heads, before their scale, in place:
//
//   forward    s <- z p / keep, with p = softmax(scale * s) over the columns that a row sees; returns the logsumexp
//   backward   s <- z p / keep, with p = exp(scale * s - logsumexp);
//              dp <- p * (z dp / keep - delta), with delta = the row's sum of p z dp / keep
//
// and 0 in the columns that a row does not see. One pass over s (and dp) where plain torch makes six: mask, maximum,
// exponential, sum, random numbers, product. The random numbers of a row are made 8 to a counter, in its own buffer.

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu.h"
#include "tensor.h"

namespace fastgpt {
namespace {

static_assert(std::endian::native == std::endian::little, "the low half of a random word is its first number");

constexpr const char* kName = "attention";
// Below 16 thousand scores a second thread costs more than it brings.
constexpr int64_t kMinElements = 16384;

// 16-bit numbers for columns [8 * first, 8 * last) of a row; `words` holds the four of each counter.
FASTGPT_INLINE void random_octets(
    uint32_t* words, int64_t first, int64_t last, uint32_t row, uint32_t head, uint32_t key0, uint32_t key1) {
#pragma omp simd
  for (int64_t octet = first; octet < last; ++octet) {
    uint32_t c0 = static_cast<uint32_t>(octet), c1 = row, c2 = head, c3 = 0, k0 = key0, k1 = key1;
    for (int round = 0; round < 7; ++round) {
      const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
      const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
      c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
      c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
      c1 = static_cast<uint32_t>(product1);
      c3 = static_cast<uint32_t>(product0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[4 * octet] = c0;
    words[4 * octet + 1] = c1;
    words[4 * octet + 2] = c2;
    words[4 * octet + 3] = c3;
  }
}

// What all rows of a call have in common.
struct Call {
  const int32_t* starts;
  const int32_t* ends;
  int64_t rows, columns, first_head, threshold;
  uint64_t seed;
  double scale, inv_keep;
};

// Fills `words` for row `i` of all rows of all heads; returns the columns [first, second) that it sees.
FASTGPT_INLINE std::pair<int64_t, int64_t> begin_row(const Call& call, int64_t i, uint32_t* words) {
  const int64_t start = std::clamp<int64_t>(call.starts[i], 0, call.columns);
  const int64_t end = std::clamp<int64_t>(call.ends[i], start, call.columns);
  random_octets(
      words, start / 8, (end + 7) / 8, static_cast<uint32_t>(i % call.rows),
      static_cast<uint32_t>(call.first_head + i / call.rows), static_cast<uint32_t>(call.seed),
      static_cast<uint32_t>(call.seed >> 32));
  return {start, end};
}

template <typename A>
FASTGPT_INLINE void forward_rows(const Call& call, A* s, A* lse, uint32_t* words, int64_t first, int64_t last) {
  const uint16_t* numbers = reinterpret_cast<const uint16_t*>(words);
  const A scale = static_cast<A>(call.scale);
  const A kept = static_cast<A>(call.inv_keep);
  const int32_t threshold = static_cast<int32_t>(call.threshold);
  for (int64_t i = first; i < last; ++i) {
    A* row = s + i * call.columns;
    const auto [start, end] = begin_row(call, i, words);
    std::fill(row, row + start, A(0));
    std::fill(row + end, row + call.columns, A(0));
    A top = -std::numeric_limits<A>::infinity(), sum = 0;
#pragma omp simd reduction(max : top)
    for (int64_t j = start; j < end; ++j) top = row[j] > top ? row[j] : top;
    const A base = top * scale;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = start; j < end; ++j) {
      row[j] = exp_nonpositive(row[j] * scale - base);
      sum += row[j];
    }
    const A factor = kept / sum;
#pragma omp simd
    for (int64_t j = start; j < end; ++j) row[j] = numbers[j] >= threshold ? row[j] * factor : A(0);
    lse[i] = start == end ? std::numeric_limits<A>::infinity() : base + std::log(sum);
  }
}

template <typename A>
FASTGPT_INLINE void backward_rows(
    const Call& call, A* s, A* dp, const A* lse, uint32_t* words, int64_t first, int64_t last) {
  const uint16_t* numbers = reinterpret_cast<const uint16_t*>(words);
  const A scale = static_cast<A>(call.scale);
  const A kept = static_cast<A>(call.inv_keep);
  const int32_t threshold = static_cast<int32_t>(call.threshold);
  for (int64_t i = first; i < last; ++i) {
    A* row = s + i * call.columns;
    A* drow = dp + i * call.columns;
    const auto [start, end] = begin_row(call, i, words);
    std::fill(row, row + start, A(0));
    std::fill(row + end, row + call.columns, A(0));
    std::fill(drow, drow + start, A(0));
    std::fill(drow + end, drow + call.columns, A(0));
    const A l = lse[i];
    A delta = 0;
#pragma omp simd reduction(+ : delta)
    for (int64_t j = start; j < end; ++j) {
      row[j] = exp_nonpositive(row[j] * scale - l);
      drow[j] *= numbers[j] >= threshold ? kept : A(0);
      delta += row[j] * drow[j];
    }
#pragma omp simd
    for (int64_t j = start; j < end; ++j) {
      drow[j] = row[j] * (drow[j] - delta);
      row[j] *= numbers[j] >= threshold ? kept : A(0);
    }
  }
}

#define FASTGPT_ATTENTION_ROWS(A)                                                                                      \
  FASTGPT_CLONES void forward(const Call& call, A* s, A* lse, uint32_t* words, int64_t first, int64_t last) {          \
    forward_rows<A>(call, s, lse, words, first, last);                                                                 \
  }                                                                                                                    \
  FASTGPT_CLONES void backward(                                                                                        \
      const Call& call, A* s, A* dp, const A* lse, uint32_t* words, int64_t first, int64_t last) {                     \
    backward_rows<A>(call, s, dp, lse, words, first, last);                                                            \
  }
FASTGPT_ATTENTION_ROWS(float)
FASTGPT_ATTENTION_ROWS(double)
#undef FASTGPT_ATTENTION_ROWS

bool fits(const Tensor& t, const Tensor& like, ScalarType dtype) {
  return t.is_contiguous() && t.scalar_type() == dtype && t.numel() == like.size(0) * like.size(1);
}

Call make_call(
    const Tensor& scores, const Tensor& starts, const Tensor& ends, const Tensor& seed, int64_t first_head, double scale,
    int64_t threshold, double inv_keep) {
  STD_TORCH_CHECK(
      scores.dim() == 3 && scores.is_contiguous() &&
          (scores.scalar_type() == ScalarType::Float || scores.scalar_type() == ScalarType::Double),
      "attention_dropout_: scores must be (heads, rows, columns), contiguous, float32 or float64");
  STD_TORCH_CHECK(
      fits(starts, scores, ScalarType::Int) && fits(ends, scores, ScalarType::Int),
      "attention_dropout_: starts and ends must be (heads, rows), contiguous, int32");
  STD_TORCH_CHECK(
      seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "attention_dropout_: seed must be one int64");
  return {
      static_cast<const int32_t*>(starts.const_data_ptr()),
      static_cast<const int32_t*>(ends.const_data_ptr()),
      scores.size(1),
      scores.size(2),
      first_head,
      threshold,
      static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr())),
      scale,
      inv_keep};
}

// Rows are split over threads; a causal head's are unequal, so by more blocks than threads.
template <typename F>
void for_rows(const Call& call, int64_t heads, F&& f) {
  const int64_t rows = heads * call.rows;
  const int64_t blocks = rows * call.columns < kMinElements ? 1 : std::min<int64_t>(rows, 64);
  for_row_blocks(rows, blocks, [&](int64_t, int64_t first, int64_t last) {
    std::vector<uint32_t> words(4 * ((call.columns + 7) / 8));
    f(words.data(), first, last);
  });
}

}  // namespace

Tensor attention_dropout_(
    Tensor scores, Tensor starts, Tensor ends, Tensor seed, int64_t first_head, double scale, int64_t threshold,
    double inv_keep) {
  const Call call = make_call(scores, starts, ends, seed, first_head, scale, threshold, inv_keep);
  Tensor lse = make_empty(scores, scores.sizes().slice(0, 2), scores.scalar_type());
  dispatch_float(scores, kName, [&](auto tag) {
    using A = acc_t<decltype(tag)>;
    A* s = static_cast<A*>(scores.mutable_data_ptr());
    A* l = static_cast<A*>(lse.mutable_data_ptr());
    for_rows(call, scores.size(0), [&](uint32_t* words, int64_t first, int64_t last) {
      forward(call, s, l, words, first, last);
    });
  });
  return lse;
}

void attention_dropout_backward_(
    Tensor scores, Tensor dp, Tensor lse, Tensor starts, Tensor ends, Tensor seed, int64_t first_head,
    double scale, int64_t threshold, double inv_keep) {
  const Call call = make_call(scores, starts, ends, seed, first_head, scale, threshold, inv_keep);
  STD_TORCH_CHECK(
      dp.numel() == scores.numel() && dp.is_contiguous() && dp.scalar_type() == scores.scalar_type(),
      "attention_dropout_backward_: dp must be as scores");
  STD_TORCH_CHECK(
      fits(lse, scores, scores.scalar_type()),
      "attention_dropout_backward_: lse must be (heads, rows), contiguous, of scores' dtype");
  dispatch_float(scores, kName, [&](auto tag) {
    using A = acc_t<decltype(tag)>;
    A* s = static_cast<A*>(scores.mutable_data_ptr());
    A* d = static_cast<A*>(dp.mutable_data_ptr());
    const A* l = static_cast<const A*>(lse.const_data_ptr());
    for_rows(call, scores.size(0), [&](uint32_t* words, int64_t first, int64_t last) {
      backward(call, s, d, l, words, first, last);
    });
  });
}

}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("attention_dropout_", TORCH_BOX(&fastgpt::attention_dropout_));
  m.impl("attention_dropout_backward_", TORCH_BOX(&fastgpt::attention_dropout_backward_));
}
