// The small matrix products of attention: of floats, or of int16, a pair of which is taken as one int32.

#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace jaxllm {
namespace JAXLLM_ISA {

inline int32_t pair(int low, int high) {
  return static_cast<int32_t>((static_cast<uint32_t>(low) & 0xFFFF) | static_cast<uint32_t>(high) << 16);
}
inline Int pair(Int low, Int high) { return (low & 0xFFFF) | reinterpret_cast<Int>(reinterpret_cast<Bits>(high) << 16); }

inline void add_product(Float& sum, Float a, Float b) { sum += a * b; }
inline void add_product(Int& sum, Int a, Int b) { sum = add_pairs(sum, a, b); }

// Asks for what comes later, into the second cache: the first one has too few requests at a time for memory to be read at
// its rate, and the second one's own prefetcher then runs ahead.
template <typename T>
inline void prefetch(const T* from, int64_t count) {
  const char* at = reinterpret_cast<const char*>(from);
  for (int64_t byte = 0; byte < count * static_cast<int64_t>(sizeof(T)); byte += 64) __builtin_prefetch(at + byte, 0, 2);
}

// Calls work(std::integral_constant rows, r) for R rows, up to four at once.
template <typename Work>
inline void by_few(int64_t R, const Work& work) {
  int64_t r = 0;
  for (; r + 4 <= R; r += 4) work(std::integral_constant<int, 4>{}, r);
  if (R - r == 3) work(std::integral_constant<int, 3>{}, r);
  if (R - r == 2) work(std::integral_constant<int, 2>{}, r);
  if (R - r == 1) work(std::integral_constant<int, 1>{}, r);
}

// Right factors: load(i, column) is a vector of their row i, and ask(i, column, count) prefetches what is wanted after
// them from `ahead`, which is null or has as many rows.
template <typename T>
struct Rows {
  const T* values;
  int64_t row;
  const T* ahead;

  auto load(int64_t i, int64_t column) const { return JAXLLM_ISA::load(values + i * row + column); }
  void ask(int64_t i, int64_t column, int64_t count) const {
    if (ahead != nullptr) prefetch(ahead + i * row + column, count);
  }
};

// Two of `rows` rows at once; the last alone, where they are odd, whatever its pair is.
struct RowPairs {
  const int8_t* values;
  int64_t row, rows;
  const int8_t* ahead;

  Int load(int64_t i, int64_t column) const {
    const int8_t* second = values + std::min(2 * i + 1, rows - 1) * row + column;
    return pair(load_int(values + 2 * i * row + column), load_int(second));
  }
  void ask(int64_t i, int64_t column, int64_t count) const {
    if (ahead == nullptr) return;
    prefetch(ahead + 2 * i * row + column, count);
    prefetch(ahead + (2 * i + 1) * row + column, count);
  }
};

// store(r, column + v * kLanes, sum over i < depth of a[r * row + i * next] * b[i, column]) for R rows and V vectors.
template <int R, int V, typename A, typename Right, typename Store>
inline void multiply_some(const A* a, int64_t row, int64_t next, const Right& b, int64_t column, int64_t depth,
                          const Store& store) {
  using Sum = decltype(fill(A{}));
  Sum sums[R][V] = {};
  for (int64_t i = 0; i < depth; ++i) {
    b.ask(i, column, V * kLanes);
    Sum of[V];
    UNROLL
    for (int v = 0; v < V; ++v) of[v] = b.load(i, column + v * kLanes);
    UNROLL
    for (int r = 0; r < R; ++r) {
      const Sum factor = fill(a[r * row + i * next]);
      UNROLL
      for (int v = 0; v < V; ++v) add_product(sums[r][v], factor, of[v]);
    }
  }
  UNROLL
  for (int r = 0; r < R; ++r)
    UNROLL
    for (int v = 0; v < V; ++v) store(r, column + v * kLanes, sums[r][v]);
}

// The same of any number of rows, and of a width that is a multiple of kLanes.
template <typename A, typename Right, typename Store>
inline void multiply(const A* a, int64_t row, int64_t next, const Right& b, int64_t rows, int64_t width, int64_t depth,
                     const Store& store) {
  for (int64_t at = 0; at < width;) {
    const auto some = [&](auto vectors) {
      by_few(rows, [&](auto few, int64_t first) {
        multiply_some<few, vectors>(a + first * row, row, next, b, at, depth,
                                    [&](int64_t r, int64_t column, auto sum) { store(first + r, column, sum); });
      });
      at += vectors * kLanes;
    };
    switch ((width - at) / kLanes) {
      case 1: some(std::integral_constant<int, 1>{}); break;
      case 2: some(std::integral_constant<int, 2>{}); break;
      case 3: some(std::integral_constant<int, 3>{}); break;
      default: some(std::integral_constant<int, 4>{});
    }
  }
}

}  // namespace JAXLLM_ISA
}  // namespace jaxllm
