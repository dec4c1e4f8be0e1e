// Random numbers that are the same on every platform.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>

namespace pydqn {

class Generator {
 public:
  explicit Generator(std::uint64_t seed) : twister_(seed) {}

  // Uniform on [0, bound), by multiplication with rejection (Lemire 2019, https://arxiv.org/abs/1805.10941).
  // std::uniform_int_distribution gives other numbers in each standard library.
  std::uint64_t below(std::uint64_t bound) {
    __extension__ using Product = unsigned __int128;
    const std::uint64_t threshold = (0 - bound) % bound;
    for (;;) {
      const Product product = static_cast<Product>(twister_()) * bound;
      if (static_cast<std::uint64_t>(product) >= threshold) return static_cast<std::uint64_t>(product >> 64);
    }
  }

  // Uniform on [0, 1), a multiple of 2^-53.
  double fraction() { return static_cast<double>(twister_() >> 11) * 0x1p-53; }

  std::string state() const {
    std::ostringstream text;
    text << twister_;
    return text.str();
  }
  void set_state(const std::string& state) {
    std::istringstream text(state);
    std::mt19937_64 twister;
    text >> twister;
    // A state of zeros would produce only zeros, and below() would never return.
    std::mt19937_64 ahead = twister;
    bool nonzero = false;
    for (std::size_t i = 0; i < std::mt19937_64::state_size; ++i) nonzero |= ahead() != 0;
    if (text.fail() || !nonzero)
      throw std::invalid_argument("generator: expected the state of a 64-bit Mersenne twister");
    twister_ = twister;
  }

 private:
  std::mt19937_64 twister_;
};

}  // namespace pydqn
