// A cache of packed weights, from one inference to the next.
//
// A call leases the matrix that the cache has for its weights, and compares a hash of the contents of each panel
// (content_hash.h) with the weights as they are now. Reading weights costs a small part of packing them. No change of
// weights goes unnoticed, whether it was made in place, through `.data`, or by a new tensor in the same memory.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/isa/kernels.h"
#include "cpu/matrix_form.h"

namespace fused_rnn::cpu {

// Which matrix, and the form that it is packed in.
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
  bool valid = false;     // the panel is packed, from weights with this hash
  bool infinite = false;  // an element has no parts (parts.h)
};

struct CachedMatrix {
  CacheKey key;
  std::unique_ptr<char[]> memory;
  void* aligned = nullptr;  // to 64 bytes
  int64_t bytes = 0;        // of memory in all, bookkeeping included
  std::vector<CachedPanel> panels;
  // In the cache: the neighbours by the time of the last use, and the next matrix of the bucket.
  CachedMatrix *older = nullptr, *newer = nullptr, *next = nullptr;
};

// Takes a matrix out of the cache for the time of one call, and puts it back.
class CacheLease {
 public:
  CacheLease() = default;
  ~CacheLease();
  CacheLease(const CacheLease&) = delete;
  CacheLease& operator=(const CacheLease&) = delete;
  // To be called once. Without a matrix of this key in the cache, memory for a new one is allocated; without room for it in
  // the cache, matrix() stays null. Throws std::bad_alloc, and the cache is as it was.
  void take(const CacheKey& key, int64_t bytes, int64_t panels);
  CachedMatrix* matrix() const { return matrix_.get(); }

 private:
  std::unique_ptr<CachedMatrix> matrix_;
};

struct WeightCacheStatistics {
  int64_t limit, bytes;
  int64_t matrices;                     // that no call has leased
  int64_t panels_found, panels_packed;  // since the process began
};
WeightCacheStatistics weight_cache_statistics();
void count_cached_panels(int64_t found, int64_t packed);

// Frees the matrices that no call has leased; returns their bytes.
int64_t free_weight_cache();

// Bytes that the cache may hold: FUSED_RNN_WEIGHT_CACHE (settings.h).
constexpr int64_t kDefaultWeightCacheLimit = int64_t{256} << 20;
int64_t weight_cache_limit();
void set_weight_cache_limit(int64_t bytes);

}  // namespace fused_rnn::cpu
