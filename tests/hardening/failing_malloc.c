// malloc and posix_memalign that fail on demand, for LD_PRELOAD: torch's allocator calls the one, operator new the other.
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>

extern void* __libc_malloc(size_t);
extern void* __libc_memalign(size_t, size_t);

static atomic_long left = -1;  // allocations before the one that fails; below 0: none does
static atomic_long least = 0;  // bytes; smaller ones do not count
static atomic_int failed = 0;

static int fails(size_t bytes) {
  if (atomic_load(&left) < 0 || (long)bytes < atomic_load(&least)) return 0;
  if (atomic_fetch_sub(&left, 1) != 0) return 0;
  atomic_store(&failed, 1);
  return 1;
}

// From now on the n-th allocation (0: the next) of so many bytes fails; a negative n: none.
void failing_malloc_arm(long n, long bytes) {
  atomic_store(&failed, 0);
  atomic_store(&least, bytes);
  atomic_store(&left, n);
}
int failing_malloc_has_failed(void) { return atomic_load(&failed); }

void* malloc(size_t bytes) {
  if (!fails(bytes)) return __libc_malloc(bytes);
  errno = ENOMEM;
  return NULL;
}
int posix_memalign(void** memory, size_t alignment, size_t bytes) {
  if (fails(bytes)) return ENOMEM;
  *memory = __libc_memalign(alignment, bytes);
  return *memory ? 0 : ENOMEM;
}
