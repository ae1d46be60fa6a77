// fastgpt._bpe: the BPE trainer as fastgpt/bpe.py calls it. The GIL is held only to take texts from their iterator, to
// look for signals, and to report progress; counting and merging run without it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>

#include "counter.h"
#include "merges.h"
#include "splitter.h"

namespace py = pybind11;

namespace fastgpt::bpe {
namespace {

using std::chrono::steady_clock;
constexpr std::chrono::milliseconds kPulse(50);  // between two looks at signals
constexpr size_t kTaskBytes = 1 << 18;           // what a thread counts at once
constexpr size_t kTextCost = 128;                // bytes that a text counts for besides its own

void raise_signals() {
  if (PyErr_CheckSignals()) throw py::error_already_set();
}

// A text's UTF-8, in an object that keeps it. Lone surrogates, which UTF-8 has not, become "?". ASCII, which is UTF-8
// already, is not copied; for others, str's own cached copy would stay as long as the str does.
std::pair<py::object, std::string_view> utf8(py::object text) {
  if (!PyUnicode_Check(text.ptr())) {
    throw py::type_error(std::string("a text is ") + Py_TYPE(text.ptr())->tp_name + ", not str");
  }
  if (PyUnicode_IS_ASCII(text.ptr())) {
    const auto size = static_cast<size_t>(PyUnicode_GET_LENGTH(text.ptr()));
    const auto* bytes = reinterpret_cast<const char*>(PyUnicode_1BYTE_DATA(text.ptr()));
    return {std::move(text), {bytes, size}};
  }
  auto bytes = py::reinterpret_steal<py::object>(PyUnicode_AsEncodedString(text.ptr(), "utf-8", "replace"));
  if (!bytes) throw py::error_already_set();
  const std::string_view view(PyBytes_AS_STRING(bytes.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(bytes.ptr())));
  return {std::move(bytes), view};
}

// Where threads leave objects that they are done with, for the one that holds the GIL to release.
class Bin {
 public:
  void take(std::vector<py::object>&& objects) {
    const std::lock_guard lock(mutex_);
    for (py::object& object : objects) objects_.push_back(std::move(object));
  }

  void empty() {
    std::vector<py::object> objects;
    {
      const std::lock_guard lock(mutex_);
      objects.swap(objects_);
    }
  }

 private:
  std::mutex mutex_;
  std::vector<py::object> objects_;
};

struct Owner {
  explicit Owner(Bin& bin) : bin(bin) {}
  ~Owner() { bin.take(std::move(objects)); }
  Bin& bin;
  std::vector<py::object> objects;
};

WordCounts count_words(const py::iterable& texts, const Splitter& splitter, size_t threads) {
  Bin bin;  // outlives the counter, whose tasks end in it
  Counter counter(splitter, threads);
  Task task;
  auto owner = std::make_shared<Owner>(bin);
  size_t size = 0;
  const auto send = [&] {
    task.owner = std::exchange(owner, std::make_shared<Owner>(bin));
    for (bool sent = false; !sent;) {
      {
        const py::gil_scoped_release release;
        sent = counter.push(task, kPulse);
      }
      bin.empty();
      raise_signals();
    }
    task = {};
    size = 0;
  };
  for (const py::handle item : texts) {
    auto [object, rest] = utf8(py::reinterpret_borrow<py::object>(item));
    while (!rest.empty()) {
      std::string_view piece;
      std::tie(piece, rest) = cut(rest, kTaskBytes);
      task.texts.push_back(piece);
      owner->objects.push_back(object);
      size += piece.size() + kTextCost;
      if (size >= kTaskBytes) send();
    }
  }
  if (size) send();
  counter.close();
  for (;;) {
    std::optional<WordCounts> counts;
    {
      const py::gil_scoped_release release;
      counts = counter.result(kPulse);
    }
    bin.empty();
    raise_signals();
    if (counts) return std::move(*counts);
  }
}

std::vector<Pair> train(const py::iterable& texts, bool cl100k, const py::bytes& classes, size_t merges,
                        const std::array<uint32_t, 256>& byte_ids, size_t threads, const py::object& progress) {
  const Splitter splitter(cl100k, classes);
  WordCounts words = count_words(texts, splitter, threads);
  auto last = steady_clock::now();
  const auto report = [&](size_t made) {
    const py::gil_scoped_acquire acquire;
    raise_signals();
    if (!progress.is_none()) progress(made);
  };
  std::vector<Pair> made;
  {
    const py::gil_scoped_release release;
    made = train_merges(std::move(words), merges, byte_ids, [&](size_t done) {
      if (const auto now = steady_clock::now(); now - last >= kPulse) {
        last = now;
        report(done);
      }
    });
  }
  report(made.size());
  return made;
}

std::vector<py::bytes> split(const py::object& text, bool cl100k, const py::bytes& classes) {
  const Splitter splitter(cl100k, classes);
  const auto [object, view] = utf8(text);
  std::vector<py::bytes> words;
  const char* end = view.data() + view.size();
  for (const char* p = view.data(); p < end;) {
    const char* q = splitter.next(p, end);
    words.emplace_back(p, q - p);
    p = q;
  }
  return words;
}

}  // namespace

PYBIND11_MODULE(_bpe, m) {
  m.def("train", &train, py::arg("texts"), py::arg("cl100k"), py::arg("classes"), py::arg("merges"),
        py::arg("byte_ids"), py::arg("threads"), py::arg("progress"));
  m.def("split", &split, py::arg("text"), py::arg("cl100k"), py::arg("classes"));
}

}  // namespace fastgpt::bpe
