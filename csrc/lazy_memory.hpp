// Memory for rings of several gigabytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__) || defined(__APPLE__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace pydqn {

// Zeroed memory that the system provides page by page as it is written. Samples lie far apart in a large ring, so
// 4 KiB pages would cause a TLB miss for every half frame. Where the system supports huge pages, this requests them.
class LazyMemory {
 public:
  explicit LazyMemory(std::size_t bytes) : bytes_(bytes) {
#if defined(__linux__) || defined(__APPLE__)
    int flags = MAP_PRIVATE | MAP_ANON;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE;
#endif
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(memory, bytes, MADV_HUGEPAGE);  // failure is ignored: it costs only speed
#endif
#else
    void* memory = std::calloc(bytes, 1);
    if (memory == nullptr) throw std::bad_alloc();
#endif
    data_ = static_cast<std::uint8_t*>(memory);
  }
  ~LazyMemory() {
#if defined(__linux__) || defined(__APPLE__)
    munmap(data_, bytes_);
#else
    std::free(data_);
#endif
  }
  LazyMemory(const LazyMemory&) = delete;
  LazyMemory& operator=(const LazyMemory&) = delete;

  std::uint8_t* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_;
  std::uint8_t* data_;
};

// Makes the C library keep freed memory instead of returning it to the system. Each network update on a CPU allocates
// and frees the same few megabytes; if they were returned each time, the system would have to zero and map their pages
// again. Affects the whole process. Returns false where the C library has no such setting.
inline bool keep_freed_memory() {
#if defined(__GLIBC__)
  constexpr int kMaxThreshold = 32 << 20;  // the largest that glibc accepts; larger blocks are always mapped separately
  return mallopt(M_MMAP_THRESHOLD, kMaxThreshold) == 1 && mallopt(M_TRIM_THRESHOLD, 1 << 30) == 1;
#else
  return false;
#endif
}

}  // namespace pydqn
