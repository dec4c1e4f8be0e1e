// Memory for rings of gigabytes. This file knows no Python.
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

// Zeroed memory that costs nothing until it is written. Windows of frames lie far apart in a ring of gigabytes, so
// ordinary 4 KiB pages would cost a TLB miss every half frame: huge pages are asked for where the system has them.
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
    madvise(memory, bytes, MADV_HUGEPAGE);  // a hint: refusal costs speed, not correctness
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

// Makes the C library keep memory that is freed, instead of giving it back to the system. Each update of a network on a
// CPU allocates and frees the same few megabytes, and each time that they are given back and taken again, the system
// hands out zeroed pages one by one. Concerns the whole process; false where the C library has no such setting.
inline bool keep_freed_memory() {
#if defined(__GLIBC__)
  constexpr int kLargest = 32 << 20;  // what the C library accepts: larger blocks are mapped on their own
  return mallopt(M_MMAP_THRESHOLD, kLargest) == 1 && mallopt(M_TRIM_THRESHOLD, 1 << 30) == 1;
#else
  return false;
#endif
}

}  // namespace pydqn
