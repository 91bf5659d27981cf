#include "kept_weights.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "threads.h"

namespace fused_rnn::cpu {
namespace {

// The matrices that no call has out, the latest used last. Never destroyed: a thread may end after the process's static objects.
struct Store {
  std::atomic_flag busy = ATOMIC_FLAG_INIT;
  std::vector<std::unique_ptr<KeptMatrix>> matrices;
  std::atomic<int64_t> bytes{0}, found{0}, packed{0};
};
Store& store() {
  static Store* const only = new Store;
  return *only;
}

// The store is held for as long as a search takes. Where that does not come to an end, as in a child that was forked while another
// thread held it, calls go without the store.
class Holder {
 public:
  Holder() {
    for (int tries = 0; tries < 1000 && !held_; ++tries) held_ = !store().busy.test_and_set(std::memory_order_acquire);
  }
  ~Holder() {
    if (held_) store().busy.clear(std::memory_order_release);
  }
  Holder(const Holder&) = delete;
  Holder& operator=(const Holder&) = delete;
  explicit operator bool() const { return held_; }

 private:
  bool held_ = false;
};

int64_t limit_from_environment() {
  const char* text = std::getenv("FUSED_RNN_WEIGHT_CACHE");
  if (!text || !*text) return int64_t{256} << 20;
  char* end = nullptr;
  const long long mebibytes = std::strtoll(text, &end, 10);
  if (*end || mebibytes < 0 || mebibytes > (int64_t{1} << 40)) {
    throw std::invalid_argument(std::string("FUSED_RNN_WEIGHT_CACHE=") + text +
                                ": expected a number of MiB (0: packed weights are not kept from call to call)");
  }
  return mebibytes << 20;
}

}  // namespace

bool KeptKey::operator==(const KeptKey& o) const {
  return source == o.source && depth == o.depth && units == o.units && gates == o.gates && width == o.width &&
         storage == o.storage && form == o.form && parts.rows == o.parts.rows && parts.panels == o.parts.panels;
}

int64_t kept_limit() {
  static const int64_t limit = limit_from_environment();
  return limit;
}

void KeptWeights::take(const KeptKey& key, int64_t bytes, int64_t panels) {
  if (bytes == 0 || bytes > kept_limit()) return;
  std::vector<std::unique_ptr<KeptMatrix>> dropped;  // freed when the store is free again
  if (Holder holder; holder) {
    auto& all = store().matrices;
    const auto at = std::find_if(all.rbegin(), all.rend(), [&](const auto& m) { return m->key == key; });
    if (at != all.rend()) {
      matrix_ = std::move(*at);
      all.erase(std::next(at).base());
      return;
    }
    // The oldest make room.
    dropped.reserve(all.size());
    auto keep = all.begin();
    for (; keep != all.end() && store().bytes + bytes > kept_limit(); ++keep) store().bytes -= (*keep)->bytes;
    dropped.assign(std::make_move_iterator(all.begin()), std::make_move_iterator(keep));
    all.erase(all.begin(), keep);
    if (store().bytes + bytes > kept_limit()) return;  // the rest is in use
    store().bytes += bytes;
  } else {
    return;
  }
  dropped.clear();
  try {
    auto made = std::make_unique<KeptMatrix>();
    made->key = key;
    made->memory.reset(new char[static_cast<size_t>(bytes) + 64]);
    made->aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(made->memory.get()) + 63) / 64 * 64);
    made->bytes = bytes;
    made->panels.resize(static_cast<size_t>(panels));
    prefer_huge_pages(made->aligned, bytes);
    matrix_ = std::move(made);
  } catch (...) {
    store().bytes -= bytes;
    throw;
  }
}

KeptWeights::~KeptWeights() {
  if (!matrix_) return;
  const int64_t bytes = matrix_->bytes;
  if (Holder holder; holder) {
    try {
      store().matrices.push_back(std::move(matrix_));
      return;
    } catch (const std::bad_alloc&) {  // then it is not kept
    }
  }
  store().bytes -= bytes;
}

void count_kept_panels(int64_t found, int64_t packed) {
  store().found.fetch_add(found, std::memory_order_relaxed);
  store().packed.fetch_add(packed, std::memory_order_relaxed);
}

KeptStatistics kept_statistics() {
  Store& s = store();
  int64_t matrices = 0;
  if (Holder holder; holder) matrices = static_cast<int64_t>(s.matrices.size());
  return {kept_limit(), s.bytes, matrices, s.found, s.packed};
}

}  // namespace fused_rnn::cpu
