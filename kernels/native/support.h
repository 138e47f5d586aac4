// What every instruction set shares: scratch memory, thread teams and the order of floats.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "abi.h"

namespace silvershard {

constexpr int64_t kMaxStack = 32;
constexpr int64_t kNullKey = std::numeric_limits<int64_t>::min();
constexpr int64_t kPadTerm = std::numeric_limits<int64_t>::max();
constexpr int kWordSlots = 64;

// Scratch that grows and is kept by its thread: allocating anew would fault its pages in each call.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // At least `count` elements; what they held is lost.
  T* get(int64_t count) {
    if (count > capacity_) {
      std::free(data_);
      data_ = nullptr;
      capacity_ = 0;
      const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      capacity_ = count;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

// The status that the threads of one call agree on: the first one that is not OK stays.
class SharedStatus {
 public:
  void set(int32_t status) {
    int32_t expected = STATUS_OK;
    value_.compare_exchange_strong(expected, status, std::memory_order_relaxed);
  }
  int32_t get() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<int32_t> value_{STATUS_OK};
};

// Calls body(task) for every task in [0, tasks) on at most `threads` threads. One thread, or one
// task, never starts a team. Returns the status of the first failing task.
template <class Body>
int32_t for_each_task(int64_t tasks, int64_t threads, const Body& body) {
  SharedStatus status;
  const auto guarded = [&](int64_t task) {
    try {
      const int32_t result = body(task);
      if (result != STATUS_OK) status.set(result);
    } catch (const std::bad_alloc&) {
      status.set(STATUS_OUT_OF_MEMORY);
    }
  };
#ifdef _OPENMP
  const int64_t team = std::min(tasks, threads);
  if (team > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(team))
    for (int64_t task = 0; task < tasks; ++task) guarded(task);
    return status.get();
  }
#else
  (void)threads;
#endif
  for (int64_t task = 0; task < tasks && status.get() == STATUS_OK; ++task) guarded(task);
  return status.get();
}

// Maps floats to integers of the same order. NaN counts as the greatest value; both zeros must have
// been made the same before.
inline uint32_t order_key(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0xFFFFFFFFu;
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

inline float from_order_key(uint32_t key) {
  const uint32_t bits = key ^ (~static_cast<uint32_t>(static_cast<int32_t>(key) >> 31) | 0x80000000u);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int bit_width(uint64_t value) { return value == 0 ? 0 : 64 - __builtin_clzll(value); }

}  // namespace silvershard
