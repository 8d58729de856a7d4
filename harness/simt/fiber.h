// Fibres, one per CUDA thread: a stack each, and a switch between stacks. The switch is hand-written for
// x86-64 (ucontext's makes two system calls); SIMT_UCONTEXT forces the portable one. AddressSanitizer and
// ThreadSanitizer are told of every switch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <new>

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

// The harness's own functions are not instrumented: its bookkeeping, shared by all fibres, is no data of the
// kernel. What is inlined into an instrumented function would be instrumented there, hence noinline.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SIMT_UNINSTRUMENTED __attribute__((no_sanitize("address", "thread", "undefined"), noinline))
#else
#define SIMT_UNINSTRUMENTED
#endif

// State that a function reads often: reached without the indirection that a shared library's symbols need.
#define SIMT_STATE inline __attribute__((visibility("hidden")))

namespace simt {

#ifndef SIMT_UCONTEXT
// Saves what the ABI says a call preserves, swaps stacks, and continues where `to` left off.
// noipa: the compiler, which sees no clobbered register in here, must not conclude that there is none.
__attribute__((naked, noipa)) inline void swap_stacks(void** /*from: rdi*/, void* /*to: rsi*/) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "popq %rcx\n\t"
      "jmp *%rcx");
}
#endif

class Fiber;
SIMT_STATE Fiber* left_fiber = nullptr;  // the one that the running fibre was reached from

class Fiber {
 public:
  Fiber() = default;
  // Starts `entry`, which never returns, at the first switch. `index` spreads the tops of the stacks over the
  // sets of the cache: at equal offsets a few hundred of them would share one.
  Fiber(void (*entry)(), size_t index) { create(entry, index); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() { destroy(); }

  // For the fibre that is the thread which calls this: nothing to create.
  void adopt() {
#ifdef __SANITIZE_THREAD__
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  SIMT_UNINSTRUMENTED static void transfer(Fiber& from, Fiber& to) {
    left_fiber = &from;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.size_);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(to.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef SIMT_UCONTEXT
    swapcontext(&from.context_, &to.context_);
#else
    swap_stacks(&from.stack_pointer_, to.stack_pointer_);
#endif
    arrive(from);
  }

  // The first thing a new fibre does: ends the switch that `transfer` began.
  SIMT_UNINSTRUMENTED static void arrive([[maybe_unused]] Fiber& self) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(self.fake_stack_, &left_fiber->bottom_, &left_fiber->size_);
#endif
  }

 private:
  static constexpr size_t kStackBytes = 256 * 1024;  // of address space; pages are taken as they are touched

  void create(void (*entry)(), size_t index);
  void destroy();

  char* mapping_ = nullptr;  // one guard page, then the stack
  size_t mapped_ = 0;
#ifdef SIMT_UCONTEXT
  ucontext_t context_{};
#else
  void* stack_pointer_ = nullptr;
#endif
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#endif
#ifdef __SANITIZE_THREAD__
  void* tsan_ = nullptr;
#endif
};

inline void Fiber::create(void (*entry)(), size_t index) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  mapped_ = page + kStackBytes;
  void* memory =
      mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(memory);
  mprotect(mapping_, page, PROT_NONE);
  char* const stack = mapping_ + page;
  const size_t size = kStackBytes - index % 32 * 192;
#ifdef SIMT_UCONTEXT
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = size;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#else
  // As if `entry` had just been called: the stack pointer is 8 above a multiple of 16, on a null return
  // address.
  void** top = reinterpret_cast<void**>(stack + size);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  stack_pointer_ = top - 6;
#endif
#ifdef __SANITIZE_ADDRESS__
  bottom_ = stack;
  size_ = size;
#endif
#ifdef __SANITIZE_THREAD__
  tsan_ = __tsan_create_fiber(0);
#endif
}

inline void Fiber::destroy() {
  if (mapping_ == nullptr) return;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(bottom_, size_);
#endif
  munmap(mapping_, mapped_);
#ifdef __SANITIZE_THREAD__
  __tsan_destroy_fiber(tsan_);
#endif
}

}  // namespace simt
