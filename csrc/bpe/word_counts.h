// How often each word occurs: a hash table with open addressing and linear probing, at most three quarters full.
//
// A slot is 32 bytes. A word of up to 16 bytes lies in the slot itself, as two overlapping loads that its length makes
// unambiguous; a longer one lies in an arena behind its 64-bit hash. Nine in ten words of a text are short, so that
// counting one costs one cache line, and nothing is allocated for it.
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

namespace fastgpt::bpe {

class WordCounts {
 public:
  struct Slot {
    uint64_t low, high;  // the word's bytes; of more than 16, their hash and where they are in the arena
    uint64_t count;
    uint64_t size;  // in bytes; 0 in an empty slot
  };

  void add(std::string_view word, uint64_t count) {
    if (4 * (used_ + 1) > 3 * slots_.size()) grow();
    Slot key = pack(word);
    for (size_t i = hash(key) & mask();; i = (i + 1) & mask()) {
      Slot& slot = slots_[i];
      if (slot.size == 0) {
        if (key.size > kInline) {
          key.high = arena_.size();
          arena_.insert(arena_.end(), word.begin(), word.end());
        }
        key.count = count;
        slot = key;
        ++used_;
        return;
      }
      if (slot.size == key.size && slot.low == key.low &&
          (key.size <= kInline ? slot.high == key.high : !std::memcmp(&arena_[slot.high], word.data(), word.size()))) {
        slot.count += count;
        return;
      }
    }
  }

  size_t size() const { return used_; }

  // With empty ones among them.
  const std::vector<Slot>& slots() const { return slots_; }

  // A slot's word; `buffer` holds it where the slot does.
  std::string_view spell(const Slot& slot, char (&buffer)[16]) const {
    if (slot.size > kInline) return {&arena_[slot.high], slot.size};
    if (slot.size >= 8) {
      std::memcpy(buffer, &slot.low, 8);
      std::memcpy(buffer + slot.size - 8, &slot.high, 8);
    } else if (slot.size >= 4) {
      const auto first = static_cast<uint32_t>(slot.low), last = static_cast<uint32_t>(slot.low >> 32);
      std::memcpy(buffer, &first, 4);
      std::memcpy(buffer + slot.size - 4, &last, 4);
    } else {
      buffer[0] = static_cast<char>(slot.low);
      buffer[slot.size / 2] = static_cast<char>(slot.low >> 8);
      buffer[slot.size - 1] = static_cast<char>(slot.low >> 16);
    }
    return {buffer, slot.size};
  }

 private:
  static constexpr size_t kInline = 16;

  template <typename T>
  static uint64_t load(const char* p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }

  // The 128-bit product's halves, together: each bit of the result depends on every bit of a and b.
  static uint64_t mix(uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  }

  static uint64_t hash(const Slot& key) {
    return key.size > kInline ? key.low
                              : mix(key.low ^ 0x9e3779b97f4a7c15, key.high ^ key.size ^ 0xd6e8feb86659fd93);
  }

  static Slot pack(std::string_view word) {
    const char* p = word.data();
    const size_t n = word.size();
    Slot key{0, 0, 0, n};
    if (n > kInline) {
      uint64_t h = n;
      for (size_t i = 0; i + 8 < n; i += 8) h = mix(h ^ load<uint64_t>(p + i), 0x9e3779b97f4a7c15);
      key.low = mix(h ^ load<uint64_t>(p + n - 8), 0xd6e8feb86659fd93);
    } else if (n >= 8) {
      key.low = load<uint64_t>(p);
      key.high = load<uint64_t>(p + n - 8);
    } else if (n >= 4) {
      key.low = load<uint32_t>(p) | load<uint32_t>(p + n - 4) << 32;
    } else {
      key.low = load<uint8_t>(p) | load<uint8_t>(p + n / 2) << 8 | load<uint8_t>(p + n - 1) << 16;
    }
    return key;
  }

  size_t mask() const { return slots_.size() - 1; }

  void grow() {
    std::vector<Slot> old(slots_.empty() ? 1024 : 2 * slots_.size(), Slot{});
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.size == 0) continue;
      size_t i = hash(slot) & mask();
      while (slots_[i].size) i = (i + 1) & mask();
      slots_[i] = slot;
    }
  }

  std::vector<Slot> slots_;
  std::vector<char> arena_;
  size_t used_ = 0;
};

}  // namespace fastgpt::bpe
