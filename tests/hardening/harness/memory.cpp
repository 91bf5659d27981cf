// Arrays with guards, allocations that fail on demand, and what is printed when the process dies.
#include <sys/mman.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "harness.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace {

thread_local int64_t allocations_left = -1;  // before the one that fails; -1: none does
thread_local bool has_failed = false;

bool fails_now() {
  if (allocations_left < 0) return false;
  if (allocations_left-- > 0) return false;
  has_failed = true;
  return true;
}

}  // namespace

void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  return fails_now() ? nullptr : std::malloc(bytes ? bytes : 1);
}
void* operator new(size_t bytes) {
  void* memory = operator new(bytes, std::nothrow);
  if (!memory) throw std::bad_alloc();
  return memory;
}
void* operator new[](size_t bytes, const std::nothrow_t&) noexcept { return operator new(bytes, std::nothrow); }
void* operator new[](size_t bytes) { return operator new(bytes); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }

namespace harness {

void fail_allocation(int64_t n) { allocations_left = n, has_failed = false; }
bool disarm() {
  allocations_left = -1;
  return has_failed;
}
void allocation_point() {
  if (fails_now()) throw std::bad_alloc();
}
NoFailures::NoFailures() : left_(std::exchange(allocations_left, -1)) {}
NoFailures::~NoFailures() { allocations_left = left_; }

Array::Array(int64_t bytes, Place place) : bytes_(bytes) {
  if (place == Place::kHeap) {
    // Aligned to 64, and nothing behind: redzones begin at the first byte that is not asked for.
    if (posix_memalign(&base_, 64, static_cast<size_t>(bytes ? bytes : 1)) != 0) throw std::bad_alloc();
    data_ = base_;
  } else {
    const int64_t page = sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
    mapped_ = inside + 2 * page;
    base_ = mmap(nullptr, static_cast<size_t>(mapped_), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    char* first = static_cast<char*>(base_) + page;
    if (inside && mprotect(first, static_cast<size_t>(inside), PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    data_ = place == Place::kEnd ? first + inside - bytes : first;
  }
  fill_with_nan(data_, bytes);
}
Array::Array(Array&& other) noexcept { *this = std::move(other); }
Array& Array::operator=(Array&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(base_, other.base_);
  std::swap(bytes_, other.bytes_);
  std::swap(mapped_, other.mapped_);
  return *this;
}
Array::~Array() {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(data_, static_cast<size_t>(bytes_));
#endif
  if (mapped_) {
    munmap(base_, static_cast<size_t>(mapped_));
  } else {
    std::free(base_);
  }
}

void fill_with_nan(void* data, int64_t bytes) {
  if (bytes) std::memset(data, 0xff, static_cast<size_t>(bytes));
}

#if defined(__SANITIZE_ADDRESS__)
[[gnu::no_sanitize_address]] bool gaps_are_untouched(const void* data, int64_t bytes) {
  const unsigned char* from = static_cast<const unsigned char*>(data);
  for (int64_t i = 0; i < bytes; ++i) {
    if (from[i] != 0xff && __asan_address_is_poisoned(from + i)) return false;
  }
  return true;
}
#else
bool gaps_are_untouched(const void*, int64_t) { return true; }
#endif

namespace {

char current_case[512] = "none yet\n";

void print_case() {
  const ssize_t written = write(2, "in case ", 8) + write(2, current_case, std::strlen(current_case));
  (void)written;
}
void print_case_and_die(int signal) {
  print_case();
  std::signal(signal, SIG_DFL);
  raise(signal);
}

}  // namespace

}  // namespace harness
// UBSan, whose runtime has a life of its own, calls this.
extern "C" void __ubsan_on_report() { harness::print_case(); }
namespace harness {

void set_case(const std::string& text) { std::snprintf(current_case, sizeof current_case, "%s\n", text.c_str()); }

std::string get_case() { return std::string(current_case, std::strcspn(current_case, "\n")); }

void report_case_at_death() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  __sanitizer_set_death_callback(print_case);
  const int signals[] = {SIGILL, SIGABRT};  // the others are the sanitizer's
#else
  const int signals[] = {SIGILL, SIGABRT, SIGSEGV, SIGBUS, SIGFPE};
#endif
  for (const int signal : signals) std::signal(signal, print_case_and_die);
}

}  // namespace harness
