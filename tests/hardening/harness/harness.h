// The CPU kernels (csrc/cpu, no torch) on arrays of the harness's own, for sanitizers. test_cpu_kernels.py compiles and runs
// this program.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/isa/kernels.h"

namespace harness {

// ---- openmp.cpp ----
// What OpenMP offers from now on, and what a region is given of it at most.
void set_threads(int most, int granted = 1 << 20);

// ---- sets.cpp ----
// The instruction sets that were linked in and that this machine can run; "parts" is parts.cpp.
std::vector<std::string> sets();
void select_set(const std::string& name);

// ---- memory.cpp ---- How an array lies: between redzones of the heap, or with a page that nobody may touch right behind
// it or right before it. Such a page also stops masked accesses of AVX-512 and tiles of AMX, which AddressSanitizer does
// not see.
enum class Place { kHeap, kEnd, kStart };

class Array {
 public:
  Array() = default;
  Array(int64_t bytes, Place place);
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  Array(Array&& other) noexcept;
  Array& operator=(Array&& other) noexcept;
  ~Array();
  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  void* base_ = nullptr;
  int64_t bytes_ = 0, mapped_ = 0;
};

// Fills with bytes of ones: a NaN in every format, so that reading what was never written shows in a result.
void fill_with_nan(void* data, int64_t bytes);
// Whether all bytes that AddressSanitizer holds for gaps (csrc/cpu/arena.h) are as they were filled.
bool gaps_are_untouched(const void* data, int64_t bytes);

// Of the allocations that follow on the calling thread, by operator new or through allocation_point, number n (0: the first)
// fails. disarm() says whether that happened.
void fail_allocation(int64_t n);
bool disarm();
// For allocators of the harness: throws std::bad_alloc if it is their turn.
void allocation_point();

class NoFailures {
 public:
  NoFailures();
  ~NoFailures();

 private:
  int64_t left_;
};

// ---- report ----
// What the process prints should it die from here on.
void set_case(const std::string& text);
std::string get_case();
void report_case_at_death();

}  // namespace harness
