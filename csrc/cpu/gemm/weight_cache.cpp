#include "cpu/gemm/weight_cache.h"

#include <atomic>
#include <chrono>
#include <mutex>
#include <random>
#include <utility>

#include "cpu/cache_lock.h"
#include "cpu/threads.h"

namespace fused_rnn::cpu {
namespace {

constexpr size_t kBuckets = 8192;
constexpr int64_t kMostMatrices = 16384;

// Matrices that have left the cache; they are freed with this object, after the lock.
class Dropped {
 public:
  Dropped() = default;
  ~Dropped() {
    while (first_) delete std::exchange(first_, first_->next);
  }
  Dropped(const Dropped&) = delete;
  Dropped& operator=(const Dropped&) = delete;
  void add(CachedMatrix* matrix) { matrix->next = std::exchange(first_, matrix); }

 private:
  CachedMatrix* first_ = nullptr;
};

// The matrices that no call has leased, by their key and by the time of their last use. To be used under cache_lock(). The
// only object is never destroyed: a thread may end after the process's static objects.
class WeightCache {
 public:
  // Of the matrices with this key the one that was used last, or null.
  CachedMatrix* take(const CacheKey& key) {
    for (CachedMatrix* m = bucket(key); m; m = m->next) {
      if (!(m->key == key)) continue;
      remove(m);
      return m;
    }
    return nullptr;
  }
  void put(CachedMatrix* m) {
    m->next = std::exchange(bucket(m->key), m);
    m->older = std::exchange(newest_, m);
    m->newer = nullptr;
    (m->older ? m->older->newer : oldest_) = m;
    ++matrices;
  }
  // Makes room for one more matrix, of so many bytes, by dropping the oldest; false if what is leased takes too much.
  bool reserve(int64_t size, int64_t limit, Dropped& dropped) {
    while (oldest_ && (bytes + size > limit || count >= kMostMatrices)) drop_oldest(dropped);
    if (bytes + size > limit || count >= kMostMatrices) return false;
    bytes += size;
    ++count;
    return true;
  }
  void release(int64_t size) {
    bytes -= size;
    --count;
  }
  void drop_oldest(Dropped& dropped) {
    CachedMatrix* m = oldest_;
    remove(m);
    release(m->bytes);
    dropped.add(m);
  }
  bool empty() const { return !oldest_; }

  int64_t bytes = 0, count = 0;  // of all matrices, leased ones included
  int64_t matrices = 0;          // of those that no call has leased

 private:
  CachedMatrix*& bucket(const CacheKey& key) { return buckets_[key.hash() % kBuckets]; }
  void remove(CachedMatrix* m) {
    CachedMatrix** at = &bucket(m->key);
    while (*at != m) at = &(*at)->next;
    *at = m->next;
    (m->older ? m->older->newer : oldest_) = m->newer;
    (m->newer ? m->newer->older : newest_) = m->older;
    --matrices;
  }

  CachedMatrix* buckets_[kBuckets] = {};
  CachedMatrix *oldest_ = nullptr, *newest_ = nullptr;
};
WeightCache& weight_cache() {
  static WeightCache* const only = new WeightCache;
  return *only;
}

std::atomic<int64_t> limit{kDefaultWeightCacheLimit}, found{0}, packed{0};

uint64_t next_random(uint64_t& state) {  // SplitMix64
  uint64_t z = state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

HashKeys random_keys() {
  std::random_device device;
  uint64_t state[2];
  for (uint64_t& word : state) word = static_cast<uint64_t>(device()) << 32 | device();
  state[0] ^= static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());  // some devices repeat
  HashKeys keys;
  for (uint64_t& key : keys.words) key = next_random(state[0]) + next_random(state[1]);
  for (uint64_t& key : keys.mix) key = next_random(state[0]) + next_random(state[1]);
  return keys;
}

}  // namespace

const HashKeys& hash_keys() {
  static const HashKeys keys = random_keys();
  return keys;
}

bool CacheKey::operator==(const CacheKey& o) const {
  return source == o.source && depth == o.depth && units == o.units && gates == o.gates && width == o.width &&
         storage == o.storage && form == o.form && parts.rows == o.parts.rows && parts.panels == o.parts.panels;
}

uint64_t CacheKey::hash() const {
  const uint64_t small = static_cast<uint64_t>(depth) << 24 ^ static_cast<uint64_t>(units);
  uint64_t state = reinterpret_cast<uintptr_t>(source) ^ small << 8;  // the rest seldom differs
  return next_random(state);
}

int64_t weight_cache_limit() { return limit.load(std::memory_order_relaxed); }
void set_weight_cache_limit(int64_t bytes) { limit = bytes; }

void CacheLease::take(const CacheKey& key, int64_t bytes, int64_t panels) {
  const int64_t size =
      bytes + 64 + static_cast<int64_t>(sizeof(CachedMatrix)) + panels * static_cast<int64_t>(sizeof(CachedPanel));
  if (bytes == 0 || size > weight_cache_limit()) return;
  hash_keys();      // made here: no exception leaves a parallel region
  Dropped dropped;  // freed when the lock is free again
  {
    const std::lock_guard<std::mutex> held(cache_lock());
    matrix_.reset(weight_cache().take(key));
    if (matrix_ || !weight_cache().reserve(size, weight_cache_limit(), dropped)) return;
  }
  try {
    auto made = std::make_unique<CachedMatrix>();
    made->key = key;
    made->memory.reset(new char[static_cast<size_t>(bytes) + 64]);
    made->aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(made->memory.get()) + 63) / 64 * 64);
    made->bytes = size;
    made->panels.resize(static_cast<size_t>(panels));
    prefer_huge_pages(made->aligned, bytes);
    matrix_ = std::move(made);
  } catch (...) {
    const std::lock_guard<std::mutex> held(cache_lock());
    weight_cache().release(size);
    throw;
  }
}

CacheLease::~CacheLease() {
  if (!matrix_) return;
  const std::lock_guard<std::mutex> held(cache_lock());
  weight_cache().put(matrix_.release());
}

void count_cached_panels(int64_t found_panels, int64_t packed_panels) {
  found.fetch_add(found_panels, std::memory_order_relaxed);
  packed.fetch_add(packed_panels, std::memory_order_relaxed);
}

WeightCacheStatistics weight_cache_statistics() {
  const std::lock_guard<std::mutex> held(cache_lock());
  return {weight_cache_limit(), weight_cache().bytes, weight_cache().matrices, found, packed};
}

int64_t free_weight_cache() {
  Dropped dropped;
  const std::lock_guard<std::mutex> held(cache_lock());
  const int64_t before = weight_cache().bytes;
  while (!weight_cache().empty()) weight_cache().drop_oldest(dropped);
  return before - weight_cache().bytes;
}

}  // namespace fused_rnn::cpu
