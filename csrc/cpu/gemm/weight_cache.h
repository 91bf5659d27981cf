// Weights in the form of the kernels, kept from one inference to the next. A call takes what was kept for a matrix out of the store and
// compares each panel with the weights as they are now, by a hash of their contents (content_hash.h): reading weights costs a small part of
// packing them, and no way to change them goes unnoticed, be it in place, through `.data`, or by a new tensor in the same memory.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/isa/kernels.h"
#include "cpu/matrix_form.h"

namespace fused_rnn::cpu {

// Which matrix, and how it is kept.
struct CacheKey {
  const void* source = nullptr;
  int64_t depth = 0, units = 0;
  int gates = 0, width = 0;
  DType storage{};
  Form form{};
  Parts parts;

  bool operator==(const CacheKey& other) const;
  uint64_t hash() const;
};

struct CachedPanel {
  uint64_t hash = 0;
  bool made = false;
  bool infinite = false;  // an element has no parts (parts.h)
};

struct CachedMatrix {
  CacheKey key;
  std::unique_ptr<char[]> memory;
  void* aligned = nullptr;  // to 64 bytes
  int64_t bytes = 0;        // what it takes, bookkeeping included
  std::vector<CachedPanel> panels;
  // In the store: its neighbours by the time of the last use, and the next one of its bucket.
  CachedMatrix *older = nullptr, *newer = nullptr, *next = nullptr;
};

// A matrix that is out of the store, for one call; none until it is taken, or if the store does not keep it.
class CacheLease {
 public:
  CacheLease() = default;
  ~CacheLease();
  CacheLease(const CacheLease&) = delete;
  CacheLease& operator=(const CacheLease&) = delete;
  // Once. Throws std::bad_alloc, with the store as it was.
  void take(const CacheKey& key, int64_t bytes, int64_t panels);
  CachedMatrix* matrix() const { return matrix_.get(); }

 private:
  std::unique_ptr<CachedMatrix> matrix_;
};

struct WeightCacheStatistics {
  int64_t limit, bytes, matrices;
  int64_t panels_found, panels_packed;  // since the process began
};
WeightCacheStatistics weight_cache_statistics();
void count_cached_panels(int64_t found, int64_t packed);

// Frees what no call has out; returns its bytes.
int64_t free_weight_cache();

// Bytes that the store may hold: FUSED_RNN_WEIGHT_CACHE (settings.h).
constexpr int64_t kDefaultWeightCacheLimit = int64_t{256} << 20;
int64_t weight_cache_limit();
void set_weight_cache_limit(int64_t bytes);

}  // namespace fused_rnn::cpu
