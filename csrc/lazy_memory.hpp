// Memory for rings of gigabytes. This file knows no Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__) || defined(__APPLE__)
#include <sys/mman.h>
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

}  // namespace pydqn
