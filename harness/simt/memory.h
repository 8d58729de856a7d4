// Memory as a kernel sees it: shared memory that starts as NaN in every block, counted accesses to global
// memory, and cp.async, whose data arrive only when they are waited for.
#pragma once

#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/stat.h>

#include <algorithm>
#include <type_traits>

#include "races.h"

namespace simt {

// ---- Static shared memory. GCC drops the section attribute of a static in a template, but keeps `noinit`,
// which puts the variable into .noinit or .noinit.<name>; where those lie is read from the module's own
// section headers.

struct Range {
  char *begin, *end;
};

inline std::vector<Range> find_static_shared() {
  struct Module {
    ElfW(Addr) base;
    std::string path;
  } module{};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        const auto here = reinterpret_cast<ElfW(Addr)>(&machine);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const ElfW(Phdr) & segment = info->dlpi_phdr[i];
          const ElfW(Addr) begin = info->dlpi_addr + segment.p_vaddr;
          if (segment.p_type != PT_LOAD || here < begin || here >= begin + segment.p_memsz) continue;
          *static_cast<Module*>(data) = {info->dlpi_addr,
                                         *info->dlpi_name ? info->dlpi_name : "/proc/self/exe"};
          return 1;
        }
        return 0;
      },
      &module);
  std::vector<Range> ranges;
  const int file = open(module.path.c_str(), O_RDONLY);
  struct stat status{};
  if (file < 0 || fstat(file, &status) != 0) throw Error("simt: cannot read the sections of " + module.path);
  void* const mapping = mmap(nullptr, status.st_size, PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  if (mapping == MAP_FAILED) throw Error("simt: cannot map " + module.path);
  const char* const image = static_cast<const char*>(mapping);
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(image);
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(image + header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    const char* name = image + sections[header->e_shstrndx].sh_offset + sections[i].sh_name;
    if (strncmp(name, ".noinit", 7) != 0) continue;
    char* const begin = reinterpret_cast<char*>(module.base + sections[i].sh_addr);
    ranges.push_back({begin, begin + sections[i].sh_size});
  }
  munmap(mapping, status.st_size);
  return ranges;
}

SIMT_STATE std::vector<Range> static_shared;  // found at the first launch

// All bits set is NaN in every floating-point type.
SIMT_UNINSTRUMENTED inline void fill_with_nan(char* begin, char* end) {
#ifdef __SANITIZE_ADDRESS__  // there are redzones between the variables, which memset may not touch
  for (; begin < end; ++begin) *static_cast<volatile char*>(begin) = static_cast<char>(0xFF);
#else
  memset(begin, 0xFF, end - begin);
#endif
}

SIMT_UNINSTRUMENTED inline bool in_shared_memory(const void* address, int bytes) {
  const char* const begin = static_cast<const char*>(address);
  if (begin >= machine.dynamic_shared && begin + bytes <= machine.dynamic_shared_end) return true;
  for (const Range& range : static_shared) {
    if (begin >= range.begin && begin + bytes <= range.end) return true;
  }
  return false;
}

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(machine.dynamic_shared);
}

// ---- Global memory

[[noreturn, gnu::cold]] SIMT_UNINSTRUMENTED inline void fail_alignment(const void* address, size_t alignment,
                                                                       Site site) {
  fail(*machine.current, site, "the address %p is not a multiple of %zu", address, alignment);
}

SIMT_UNINSTRUMENTED inline void add(Counters& counters, bool is_load, int64_t bytes) {
  (is_load ? counters.loads : counters.stores) += 1;
  (is_load ? counters.load_bytes : counters.store_bytes) += bytes;
}

// Blocks run one after another here, and in any order or at once on the device.
SIMT_UNINSTRUMENTED inline void check_blocks(Watched& array, int64_t offset, bool is_load, int64_t bytes,
                                             Site site) {
  int *loaded_by = array.loaded_by.data() + offset, *stored_by = array.stored_by.data() + offset;
  const int self = machine.block;
  for (int64_t i = 0; i < bytes; ++i) {
    int other = Watched::kNobody;
    if (stored_by[i] != self) other = stored_by[i];
    if (!is_load && loaded_by[i] != self && loaded_by[i] != Watched::kNobody) other = loaded_by[i];
    if (other != Watched::kNobody) {
      fail(*machine.current, site, "%s byte %lld of %s, which another block has %s in this launch",
           is_load ? "loads" : "stores to", static_cast<long long>(offset + i), array.name.c_str(),
           other == stored_by[i] ? "stored to" : "loaded");
    }
    int& mine = is_load ? loaded_by[i] : stored_by[i];
    mine = mine == self || mine == Watched::kNobody ? self : Watched::kMany;
  }
}

[[gnu::noinline]] SIMT_UNINSTRUMENTED inline void count_watched(const void* address, bool is_load,
                                                                int64_t bytes, Site site) {
  for (Watched& array : watched) {
    const int64_t offset = static_cast<const char*>(address) - array.begin;
    if (offset < 0 || offset >= array.bytes) continue;
    add(array.counters, is_load, bytes);
    check_blocks(array, offset, is_load, std::min(bytes, array.bytes - offset), site);
  }
}

// Apart from the access itself, which is the kernel's and is instrumented.
template <size_t kAlignment, bool kIsLoad>
SIMT_UNINSTRUMENTED inline void count(const void* address, int64_t bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % kAlignment != 0) fail_alignment(address, kAlignment, site);
  add(last.counters, kIsLoad, bytes);
  races.access(address, kIsLoad, bytes, site);
  if (!watched.empty()) count_watched(address, kIsLoad, bytes, site);
}

template <typename T>
inline T load(const T* address, Site site = Site::current()) {
  count<alignof(T), true>(address, sizeof(T), site);
  return *address;
}

template <typename T>
inline void store(T* address, const std::type_identity_t<T>& value, Site site = Site::current()) {
  count<alignof(T), false>(address, sizeof(T), site);
  *address = value;
}

// ---- What orders blocks: a counter, and fences.

// The counters of a launch, which must leave 0 in them for the next one.
SIMT_STATE std::vector<int*> counted;

inline int count_up(int* counter, Site site = Site::current()) {
  if (std::find(counted.begin(), counted.end(), counter) == counted.end()) counted.push_back(counter);
  let_other_blocks_run();
  add(last.counters, true, sizeof(int));
  add(last.counters, false, sizeof(int));
  races.count_up(counter, site);
  const int before = (*counter)++;
  let_other_blocks_run();
  return before;
}

inline void fence() {
  let_other_blocks_run();
  races.fence();
}

// ---- cp.async. The source is read and the destination lost when the copy is issued, the data come with the
// wait: the device may do either at any time between the two.

SIMT_UNINSTRUMENTED inline PendingCopy& append_copy(Thread& self) {
  if (self.pending == self.capacity) {
    const int capacity = std::max(64, 2 * self.capacity);
    std::unique_ptr<PendingCopy[]> copies(new PendingCopy[capacity]);
    for (int i = 0; i < self.pending; ++i) copies[i] = self.copies[i];
    self.copies = std::move(copies);
    self.capacity = capacity;
  }
  return self.copies[self.pending++];
}

template <int kBytes>
struct Piece {
  alignas(kBytes) unsigned char bytes[kBytes];
};

// The bookkeeping of cp_async; `piece` is what has been read.
template <int kBytes>
SIMT_UNINSTRUMENTED inline void issue_copy(void* shared, const void* global, int valid_bytes,
                                           const Piece<kBytes>& piece, Site site) {
  Thread& self = *machine.current;
  if (!in_shared_memory(shared, kBytes))
    fail(self, site, "cp_async: %d bytes at %p are not in shared memory", kBytes, shared);
  if (reinterpret_cast<uintptr_t>(shared) % kBytes != 0) fail_alignment(shared, kBytes, site);
  count<kBytes, true>(global, valid_bytes, site);
  PendingCopy& copy = append_copy(self);
  copy.to = shared;
  copy.bytes = kBytes;
  copy.group = self.committed_groups;
  for (int i = 0; i < kBytes; ++i) copy.data[i] = piece.bytes[i];
}

// Copies `valid_bytes` and fills the rest of kBytes (4, 8 or 16) with zeros; with none valid, `global` is not
// read.
template <int kBytes>
inline void cp_async(void* shared, const void* global, int valid_bytes = kBytes,
                     Site site = Site::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if (valid_bytes < 0 || valid_bytes > kBytes) {
    fail(*machine.current, site, "cp_async: %d valid bytes of %d", valid_bytes, kBytes);
  }
  Piece<kBytes> piece{}, lost;
  if (valid_bytes == kBytes)
    memcpy(piece.bytes, global, kBytes);
  else
    memcpy(piece.bytes, global, valid_bytes);
  issue_copy<kBytes>(shared, global, valid_bytes, piece, site);
  memset(lost.bytes, 0xFF, kBytes);
  *static_cast<Piece<kBytes>*>(shared) = lost;
}

inline void cp_async16(void* shared, const void* global, int valid_bytes = 16, Site site = Site::current()) {
  cp_async<16>(shared, global, valid_bytes, site);
}

SIMT_UNINSTRUMENTED inline void cp_async_commit() { ++machine.current->committed_groups; }

// The calling thread's next-th pending copy, if its group was committed before the `allowed` youngest.
SIMT_UNINSTRUMENTED inline bool take_copy(int next, int allowed, PendingCopy& copy) {
  const Thread& self = *machine.current;
  if (next == self.pending || self.copies[next].group >= self.committed_groups - allowed) return false;
  copy = self.copies[next];
  return true;
}

SIMT_UNINSTRUMENTED inline void drop_copies(int count) {
  Thread& self = *machine.current;
  for (int i = count; i < self.pending; ++i) self.copies[i - count] = self.copies[i];
  self.pending -= count;
}

// Returns when at most kGroups of the thread's committed groups are outstanding.
template <int kGroups>
inline void cp_async_wait() {
  PendingCopy copy;
  int done = 0;
  for (; take_copy(done, kGroups, copy); ++done) memcpy(copy.to, copy.data, copy.bytes);
  drop_copies(done);
}

}  // namespace simt
