#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "word_counts.h"

namespace fastgpt::bpe {

using Pair = std::pair<uint32_t, uint32_t>;

// The first `merges` merges of byte-level BPE on `words`, or as many as there are; merge i makes the id 256 + i.
//
// `byte_ids` has the id of each of the 256 bytes. `pulse` is called often, with how many merges there are; what it
// throws ends the training. Throws std::overflow_error where the distinct words have more than 2^32 bytes together.
std::vector<Pair> train_merges(WordCounts words, size_t merges, const std::array<uint32_t, 256>& byte_ids,
                               const std::function<void(size_t)>& pulse);

}  // namespace fastgpt::bpe
