// Splits UTF-8 text into words as GPT-2's and cl100k's patterns do:
//
//   GPT-2   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   cl100k  (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*
//           |\s*[\r\n]+|\s+(?!\S)|\s+
//
// Both match at every character, so words cover the text. At a character, its class and the next one's decide which
// alternative matches, and what an alternative takes is a run of one class: so there is no backtracking, and a text
// takes time linear in its length. Only white space is looked at twice: \s+(?!\S) leaves the last of it to the word
// behind. What is a letter, a number and white space comes from the caller (\p{L}, \p{N}, \s of the `regex` package).
#pragma once

#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace fastgpt::bpe {

enum class Class : uint8_t { kOther, kLetter, kNumber, kSpace };

class Splitter {
 public:
  // As cl100k or as GPT-2; `classes` has the Class of each of the 0x110000 code points.
  Splitter(bool cl100k, std::string_view classes) : cl100k_(cl100k), classes_(classes.begin(), classes.end()) {}

  // Where the word that starts at p ends; p < end, and [p, end) is valid UTF-8.
  const char* next(const char* p, const char* end) const {
    if (*p == '\'') {
      const char* q = contraction(p, end);
      if (q != p) return q;
    }
    return cl100k_ ? next_cl100k(p, end) : next_gpt2(p, end);
  }

 private:
  struct Char {
    Class kind;
    int bytes;
  };

  Char at(const char* p) const {
    const auto byte = [p](int i) { return static_cast<uint32_t>(static_cast<unsigned char>(p[i])); };
    const auto low = [&byte](int i) { return byte(i) & 0x3f; };
    const uint32_t lead = byte(0);
    if (lead < 0x80) return {kind(lead), 1};
    if (lead < 0xe0) return {kind((lead & 0x1f) << 6 | low(1)), 2};
    if (lead < 0xf0) return {kind((lead & 0x0f) << 12 | low(1) << 6 | low(2)), 3};
    return {kind((lead & 0x07) << 18 | low(1) << 12 | low(2) << 6 | low(3)), 4};
  }

  Class kind(uint32_t code_point) const { return static_cast<Class>(classes_[code_point]); }

  static bool is_newline(char c) { return c == '\n' || c == '\r'; }

  // The end of the characters of one class from p on, at most `most` of them.
  const char* run(const char* p, const char* end, Class kind, int most = -1) const {
    while (p < end && most-- != 0) {
      const Char c = at(p);
      if (c.kind != kind) break;
      p += c.bytes;
    }
    return p;
  }

  // The end of 's, 't, 'm, 'd, 're, 've or 'll, or p if there is none. cl100k ignores case, and so takes U+017F, the
  // long s, for an s.
  const char* contraction(const char* p, const char* end) const {
    const char upper = cl100k_ ? 0x20 : 0;  // the bit by which 'S' and 's' differ
    const auto letter = [=](int i) { return end - p > i ? static_cast<char>(p[i] | upper) : '\0'; };
    const char first = letter(1), second = letter(2);
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return p + 2;
    if (second == 'e' && (first == 'r' || first == 'v')) return p + 3;
    if (second == 'l' && first == 'l') return p + 3;
    if (cl100k_ && std::string_view(p + 1, end).starts_with("\u017f")) return p + 3;
    return p;
  }

  const char* next_gpt2(const char* p, const char* end) const {
    Char c = at(p);
    const char* q = p + c.bytes;
    if (*p == ' ' && q < end) {
      const Char behind = at(q);
      if (behind.kind != Class::kSpace) {
        c = behind;
        q += behind.bytes;
      }
    }
    return c.kind == Class::kSpace ? white_space(p, end) : run(q, end, c.kind);
  }

  const char* next_cl100k(const char* p, const char* end) const {
    const Char c = at(p);
    const char* q = p + c.bytes;
    if (c.kind == Class::kLetter) return run(q, end, Class::kLetter);
    if (c.kind == Class::kNumber) return run(q, end, Class::kNumber, 2);
    const Class behind = q < end ? at(q).kind : Class::kSpace;
    if (behind == Class::kLetter && !is_newline(*p)) return run(q, end, Class::kLetter);
    if (c.kind == Class::kOther || (*p == ' ' && behind == Class::kOther)) {
      q = run(q, end, Class::kOther);
      while (q < end && is_newline(*q)) ++q;
      return q;
    }
    return white_space(p, end);
  }

  // \s*[\r\n]+ (cl100k only), else \s+(?!\S), else \s+; at p is white space.
  const char* white_space(const char* p, const char* end) const {
    const char *q = p, *last = p, *newline = nullptr;
    while (q < end) {
      const Char c = at(q);
      if (c.kind != Class::kSpace) break;
      last = q;
      q += c.bytes;
      if (is_newline(*last)) newline = q;
    }
    if (cl100k_ && newline) return newline;
    return q == end || last == p ? q : last;
  }

  bool cl100k_;
  std::vector<char> classes_;
};

// Cuts `text` after at least `size` bytes, at a place where both patterns start a word whatever stands around it: at a
// space behind a visible ASCII character. Returns the piece before the cut and what is left.
inline std::pair<std::string_view, std::string_view> cut(std::string_view text, size_t size) {
  for (size_t i = size; i < text.size(); ++i) {
    if (i && text[i] == ' ' && text[i - 1] > 0x20 && text[i - 1] < 0x7f) return {text.substr(0, i), text.substr(i)};
  }
  return {text, {}};
}

}  // namespace fastgpt::bpe
