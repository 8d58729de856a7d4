/* Stands before the C library: allocations of tensors, which are those that libc10 makes, fail one by one, as the test asks
   (tests/engine/test_faults.py). oneDNN crashes where its own fail. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>

static long left = -1; /* allocations until one fails; below zero: none does */

void fail_after(long allocations) { left = allocations; }

int has_failed(void) { return left < 0; }

long remaining(void) { return left; }

int posix_memalign(void** to, size_t alignment, size_t bytes) {
  static int (*real)(void**, size_t, size_t) = NULL;
  if (real == NULL) real = (int (*)(void**, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
  Dl_info caller;
  if (left >= 0 && dladdr(__builtin_return_address(0), &caller) && strstr(caller.dli_fname, "libc10") &&
      left-- == 0)
    return ENOMEM;
  return real(to, alignment, bytes);
}
