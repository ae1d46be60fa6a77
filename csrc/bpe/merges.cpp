// Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909): the pair of neighbours that occurs most often becomes a
// token and is merged wherever it stands, of overlapping occurrences the left one; again and again. Ties go to the
// smallest pair of ids.
//
// The distinct words lie behind each other in one array with a cell a byte. A token's first and last cell hold its id,
// and it never moves: the next token starts `length` cells on, the one before ends a cell back. So a merge writes three
// cells, however long the word is.
//
// A pair (a, b) comes to stand somewhere when the younger of its two tokens is made there, and never after that step.
// Hence, with the token n, all places of all pairs (x, n), (n, x) and (n, n) are known at once: they are laid into one
// list, pair by pair, from left to right. A place may go stale, as its tokens get merged with others; then its cells
// no longer say a and b (ids of the cells inside a token are overwritten), and it is passed over.
// For the same reason a pair's count only ever falls. So each pair has one entry in the heap, with a count that may be
// too high; if so when it comes up, it goes back with the present one.
//
// A step adds up what changes by neighbouring token first, so that the table of pairs is asked once for each distinct
// neighbour, not for each occurrence. With S bytes of distinct words: at most S merged occurrences and 3 S places in
// all, each visited once, so O(S + P log P) time for P distinct pairs, also where all of S is one word.

#include "merges.h"

#include <algorithm>
#include <limits>
#include <queue>
#include <stdexcept>

namespace fastgpt::bpe {
namespace {

constexpr uint32_t kLarge = 1 << 16;
constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();  // the id of the cells between words

uint64_t key(uint32_t left, uint32_t right) { return static_cast<uint64_t>(left) << 32 | right; }

// Pair -> its count and its places: open addressing with linear probing, at most half full.
class PairTable {
 public:
  struct Slot {
    uint64_t pair = key(kNone, kNone);
    uint64_t count = 0;
    uint32_t begin = 0, size = 0;  // of its places, in the list of its younger token
  };

  // The slot of a pair that was added. Pairs whose count is 0 may have gone.
  Slot* find(uint64_t pair) {
    for (size_t i = first(pair);; i = (i + 1) & mask()) {
      if (slots_[i].pair == pair) return &slots_[i];
      if (slots_[i].pair == Slot{}.pair) return nullptr;
    }
  }

  // A pair that is not there.
  void add(const Slot& slot) {
    if (2 * (used_ + 1) > slots_.size()) grow();
    insert(slot);
  }

 private:
  size_t mask() const { return slots_.size() - 1; }

  size_t first(uint64_t pair) const { return (pair * 0x9e3779b97f4a7c15 >> 32) & mask(); }

  void insert(const Slot& slot) {
    size_t i = first(slot.pair);
    while (slots_[i].pair != Slot{}.pair) i = (i + 1) & mask();
    slots_[i] = slot;
    ++used_;
  }

  void grow() {
    size_t alive = 0;
    for (const Slot& slot : slots_) alive += slot.count > 0;
    size_t size = slots_.size();
    while (4 * alive > size) size *= 2;
    std::vector<Slot> old(size);
    old.swap(slots_);
    used_ = 0;
    for (const Slot& slot : old) {
      if (slot.count) insert(slot);
    }
  }

  std::vector<Slot> slots_ = std::vector<Slot>(1024);
  size_t used_ = 0;
};

struct Entry {
  uint64_t count, pair;
  bool operator<(const Entry& other) const {  // std::priority_queue gives the largest first
    return count != other.count ? count < other.count : pair > other.pair;
  }
};

// What stands on one side of a step's occurrences, for one neighbouring token.
struct Neighbour {
  uint64_t count = 0;
  uint32_t places = 0;
  uint32_t next = 0;  // where in the step's list the next place goes
};

class Trainer {
 public:
  Trainer(const std::array<uint32_t, 256>& byte_ids, const std::function<void(size_t)>& pulse)
      : pulse_(pulse), byte_ids_(byte_ids), lengths_(256, 1) {}

  std::vector<Pair> train(WordCounts words, size_t merges) {
    lay_out(words);
    words = {};  // its memory is needed
    find_byte_pairs();
    while (made_.size() < merges && !heap_.empty()) {
      const Entry top = heap_.top();
      heap_.pop();
      PairTable::Slot* slot = pairs_.find(top.pair);
      if (!slot || !slot->count) continue;
      if (slot->count < top.count) {
        heap_.push({slot->count, top.pair});
        continue;
      }
      merge(static_cast<uint32_t>(top.pair >> 32), static_cast<uint32_t>(top.pair), *slot);
      pulse_(made_.size());
    }
    return std::move(made_);
  }

 private:
  struct Cell {
    uint32_t id;
    uint32_t count;  // of its word; from kLarge on, where in large_ it is
  };
  struct Occurrence {
    uint32_t place, left, right;  // its first cell, and the tokens beside it
  };

  void lay_out(const WordCounts& words) {
    uint64_t cells = 1;
    for (const WordCounts::Slot& slot : words.slots()) cells += slot.size < 2 ? 0 : slot.size + 1;
    if (cells > kNone) throw std::overflow_error("the distinct words of the texts have more than 4 GiB");
    cells_.reserve(cells);
    cells_.push_back({kNone, 0});
    char buffer[16];
    for (const WordCounts::Slot& slot : words.slots()) {
      if (slot.size < 2) continue;
      auto count = static_cast<uint32_t>(slot.count);
      if (slot.count >= kLarge) {
        count = kLarge + static_cast<uint32_t>(large_.size());
        large_.push_back(slot.count);
      }
      for (const char c : words.spell(slot, buffer)) add_cell({byte_ids_[static_cast<unsigned char>(c)], count});
      add_cell({kNone, 0});
    }
  }

  uint64_t count_at(const Cell& cell) const { return cell.count < kLarge ? cell.count : large_[cell.count - kLarge]; }

  void add_cell(Cell cell) {
    cells_.push_back(cell);
    breathe(cells_.size());
  }

  // Calls pulse_ now and then in a loop that takes long.
  void breathe(size_t i) {
    if (i % (1 << 16) == 0) pulse_(made_.size());
  }

  void find_byte_pairs() {
    std::vector<Neighbour> found(256 * 256);
    size_t all = 0;
    const auto each = [&](const auto& visit) {
      for (size_t i = 1; i + 1 < cells_.size(); ++i) {
        breathe(i);
        const uint32_t left = cells_[i].id, right = cells_[i + 1].id;
        if (left != kNone && right != kNone) visit(i, found[left << 8 | right]);
      }
    };
    each([&](size_t i, Neighbour& pair) {
      pair.count += count_at(cells_[i]);
      ++pair.places;
      ++all;
    });
    uint32_t next = 0;
    for (uint32_t i = 0; i < found.size(); ++i) {
      if (found[i].places) add_pair(i >> 8, i & 0xff, found[i].count, found[i], next);
    }
    std::vector<uint32_t> places(all);
    each([&](size_t i, Neighbour& pair) { places[pair.next++] = static_cast<uint32_t>(i); });
    places_.push_back(std::move(places));
  }

  // Enters a pair whose places shall stand from `next` on in the newest list.
  void add_pair(uint32_t left, uint32_t right, uint64_t count, Neighbour& places, uint32_t& next) {
    pairs_.add({key(left, right), count, next, places.places});
    heap_.push({count, key(left, right)});
    places.next = next;
    next += places.places;
  }

  void note(std::vector<Neighbour>& side, std::vector<uint32_t>& seen, uint32_t token, uint64_t count) {
    if (!side[token].count) seen.push_back(token);
    side[token].count += count;
    ++side[token].places;
  }

  void lower(uint32_t left, uint32_t right, uint64_t count) {
    PairTable::Slot* slot = pairs_.find(key(left, right));
    if (slot && slot->count) slot->count -= count;  // the pair that is being merged has none any more
  }

  void merge(uint32_t a, uint32_t b, PairTable::Slot& pair) {
    const auto token = static_cast<uint32_t>(lengths_.size());
    const uint32_t a_length = lengths_[a], length = a_length + lengths_[b];
    lengths_.push_back(length);
    left_.resize(lengths_.size());
    right_.resize(lengths_.size());
    occurrences_.clear();
    uint64_t together = 0;  // how often two of the new tokens stand side by side

    const std::vector<uint32_t>& list = places_[std::max(a, b) < 256 ? 0 : std::max(a, b) - 255];
    const uint32_t end = pair.begin + pair.size;
    pair.count = 0;
    for (uint32_t i = pair.begin; i < end; ++i) {
      breathe(i);
      if (i + 16 < end) __builtin_prefetch(&cells_[list[i + 16]], 1);
      const uint32_t place = list[i];
      Cell* cell = &cells_[place];
      if (cell->id != a || cell[a_length].id != b) continue;
      const uint64_t count = count_at(*cell);
      uint32_t left = cell[-1].id;
      const uint32_t right = cell[length].id;
      cell[0].id = cell[a_length].id = cell[length - 1].id = token;
      if (left == token) {  // what the occurrence before this one has on its right is not a any more
        occurrences_.back().right = token;
        --right_[a].places;
        together += count;
        note(right_, right_seen_, token, count);
        left = kNone;
      }
      if (left != kNone) note(left_, left_seen_, left, count);
      if (right != kNone) note(right_, right_seen_, right, count);
      occurrences_.push_back({place, left, right});
    }

    uint32_t next = 0;
    for (const uint32_t x : left_seen_) {
      lower(x, a, left_[x].count);
      add_pair(x, token, left_[x].count, left_[x], next);
    }
    for (const uint32_t x : right_seen_) {
      const uint64_t count = right_[x].count - (x == a ? together : 0);
      if (x != token) lower(b, x, right_[x].count);
      if (count) add_pair(token, x, count, right_[x], next);
    }
    std::vector<uint32_t> places(next);
    for (size_t i = 0; i < occurrences_.size(); ++i) {
      breathe(i);
      const auto [place, left, right] = occurrences_[i];
      if (left != kNone) places[left_[left].next++] = place - lengths_[left];
      if (right != kNone) places[right_[right].next++] = place;
    }
    for (const uint32_t x : left_seen_) left_[x] = {};
    for (const uint32_t x : right_seen_) right_[x] = {};
    left_seen_.clear();
    right_seen_.clear();
    places_.push_back(std::move(places));
    made_.push_back({a, b});
  }

  const std::function<void(size_t)>& pulse_;
  const std::array<uint32_t, 256>& byte_ids_;
  std::vector<Cell> cells_;
  std::vector<uint64_t> large_;
  std::vector<uint32_t> lengths_;              // in bytes, of each token
  std::vector<std::vector<uint32_t>> places_;  // of the pairs of bytes, then of those that each merge made
  PairTable pairs_;
  std::priority_queue<Entry> heap_;
  std::vector<Pair> made_;

  // Of one step, kept for their memory; left_ and right_ have an entry for each token.
  std::vector<Occurrence> occurrences_;
  std::vector<Neighbour> left_, right_;
  std::vector<uint32_t> left_seen_, right_seen_;
};

}  // namespace

std::vector<Pair> train_merges(WordCounts words, size_t merges, const std::array<uint32_t, 256>& byte_ids,
                               const std::function<void(size_t)>& pulse) {
  return Trainer(byte_ids, pulse).train(std::move(words), merges);
}

}  // namespace fastgpt::bpe
