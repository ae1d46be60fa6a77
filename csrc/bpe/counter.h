// Counts the words of texts in threads. Each thread counts into a table of its own; at the end, whoever is done first
// leaves its table, and the next one adds the two up. Sums do not depend on who counted what, nor in which order.
//
// Knows nothing of Python: its callers own the texts, and are told by the end of `owner` when a task is done with them.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>
#include <thread>
#include <vector>

#include "splitter.h"
#include "word_counts.h"

namespace fastgpt::bpe {

struct Task {
  std::vector<std::string_view> texts;
  std::shared_ptr<void> owner;  // of the texts
};

class Counter {
 public:
  Counter(const Splitter& splitter, size_t threads) : splitter_(splitter), most_threads_(threads) {}

  ~Counter() {
    stop_ = true;
    close();
    for (std::thread& thread : threads_) thread.join();
  }

  // Hands a task over; false, and the task stays, if no thread had room for it within `wait`.
  bool push(Task& task, std::chrono::milliseconds wait) {
    std::unique_lock lock(mutex_);
    if (!idle_ && threads_.size() < most_threads_) threads_.emplace_back([this] { work(); });
    if (!changed_.wait_for(lock, wait, [&] { return error_ || tasks_.size() < 2 * threads_.size(); })) return false;
    if (error_) std::rethrow_exception(error_);
    tasks_.push_back(std::move(task));
    changed_.notify_all();
    return true;
  }

  // No more tasks will come.
  void close() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }

  // After `close`: the counts, or nothing yet if it takes longer than `wait`.
  std::optional<WordCounts> result(std::chrono::milliseconds wait) {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_for(lock, wait, [&] { return finished_ == threads_.size(); })) return std::nullopt;
    if (error_) std::rethrow_exception(error_);
    return result_ ? std::move(result_) : WordCounts();
  }

 private:
  void work() {
    try {
      WordCounts counts;
      while (const std::optional<Task> task = pop()) {
        for (const std::string_view text : task->texts) count(text, counts);
      }
      while (std::optional<WordCounts> other = leave(counts)) {
        if (other->size() > counts.size()) std::swap(*other, counts);
        char buffer[16];
        for (const WordCounts::Slot& slot : other->slots()) {
          if (stop_.load(std::memory_order_relaxed)) break;
          if (slot.size) counts.add(other->spell(slot, buffer), slot.count);
        }
      }
    } catch (...) {  // no memory
      const std::lock_guard lock(mutex_);
      error_ = std::current_exception();
    }
    const std::lock_guard lock(mutex_);
    ++finished_;
    changed_.notify_all();
  }

  std::optional<Task> pop() {
    std::unique_lock lock(mutex_);
    ++idle_;
    changed_.wait(lock, [&] { return closed_ || !tasks_.empty(); });
    --idle_;
    if (stop_ || error_ || tasks_.empty()) return std::nullopt;
    Task task = std::move(tasks_.front());
    tasks_.pop_front();
    changed_.notify_all();
    return task;
  }

  void count(std::string_view text, WordCounts& counts) const {
    const char* end = text.data() + text.size();
    for (const char* p = text.data(); p < end && !stop_.load(std::memory_order_relaxed);) {
      const char* q = splitter_.next(p, end);
      counts.add({p, static_cast<size_t>(q - p)}, 1);
      p = q;
    }
  }

  // Takes what another thread has left, or leaves `counts`.
  std::optional<WordCounts> leave(WordCounts& counts) {
    const std::lock_guard lock(mutex_);
    if (!result_) {
      result_ = std::move(counts);
      return std::nullopt;
    }
    return std::exchange(result_, std::nullopt);
  }

  const Splitter& splitter_;
  const size_t most_threads_;
  std::atomic<bool> stop_ = false;

  std::mutex mutex_;  // of all that follows
  std::condition_variable changed_;
  std::vector<std::thread> threads_;
  std::deque<Task> tasks_;
  std::optional<WordCounts> result_;
  std::exception_ptr error_;
  size_t idle_ = 0, finished_ = 0;
  bool closed_ = false;
};

}  // namespace fastgpt::bpe
