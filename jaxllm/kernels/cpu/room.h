// Memory that a thread keeps from call to call.

#pragma once

#include <cstdint>
#include <vector>

namespace jaxllm {
namespace {

template <typename T>
class Room {
 public:
  // Of at least `count` values, not kept; from the start of a cache line, over whose end no vector then reaches.
  T* of(int64_t count) {
    constexpr uintptr_t kLine = 64;
    values_.resize(count + kLine / sizeof(T));
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(values_.data()) + kLine - 1) / kLine * kLine);
  }

 private:
  std::vector<T> values_;
};

}  // namespace
}  // namespace jaxllm
