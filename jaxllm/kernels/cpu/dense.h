// Float weights, row after row, times float32 activations.

#pragma once

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace jaxllm {
namespace JAXLLM_ISA {

// How many values of a row are taken at once. Of bfloat16, whose 16 bits are the upper ones of a float32, those at even
// places are one vector and those at odd places another: activations are laid out so by `pair`.
template <typename T>
constexpr int kAtOnce = std::is_same_v<T, bfloat16> ? 2 * kLanes : kLanes;

inline void pair(const float* x, int64_t K, float* y) {
  for (int64_t run = 0; run + kAtOnce<bfloat16> <= K; run += kAtOnce<bfloat16>)
    for (int i = 0; i < kLanes; ++i) y[run + i] = x[run + 2 * i], y[run + kLanes + i] = x[run + 2 * i + 1];
}

// Several rows at once are several streams, which the processor foresees badly: the next ones are asked for in time.
template <int R, typename T>
inline void prefetch_rows(const T* values, int64_t K) {
  if (R > 1) __builtin_prefetch(values + R * K);
}

template <int R, int M>
inline void add_products(const float* values, const float* x, int64_t K, Float (&sums)[R][M]) {
  Float row[R];
  UNROLL
  for (int r = 0; r < R; ++r) row[r] = load(values + r * K), prefetch_rows<R>(values + r * K, K);
  UNROLL
  for (int i = 0; i < M; ++i) {
    const Float of = load(x + i * K);
    UNROLL
    for (int r = 0; r < R; ++r) sums[r][i] += row[r] * of;
  }
}

template <int R, int M>
inline void add_products(const bfloat16* values, const float* x, int64_t K, Float (&sums)[R][M]) {
  Float even[R], odd[R];
  UNROLL
  for (int r = 0; r < R; ++r) {
    const Bits both = load_as<Bits>(values + r * K);
    prefetch_rows<R>(values + r * K, K);
    even[r] = reinterpret_cast<Float>(both << 16);
    odd[r] = reinterpret_cast<Float>(both & 0xFFFF0000u);
  }
  UNROLL
  for (int i = 0; i < M; ++i) {
    const Float of_even = load(x + i * K), of_odd = load(x + i * K + kLanes);
    UNROLL
    for (int r = 0; r < R; ++r) sums[r][i] += even[r] * of_even;
    UNROLL
    for (int r = 0; r < R; ++r) sums[r][i] += odd[r] * of_odd;
  }
}

template <typename T, int R, int M>
void dense_rows(const Activations& a, const Weight& w, int64_t n, int64_t m) {
  constexpr int kChains = R * M < 4 ? 4 : 1;  // sums that do not wait for each other
  const int64_t K = a.K;
  const T* values = static_cast<const T*>(w.values) + n * K;
  const float* x = (std::is_same_v<T, bfloat16> ? a.pairs : a.x) + m * K;
  Float sums[kChains][R][M] = {};
  int64_t k = 0;
  for (; k + kChains * kAtOnce<T> <= K; k += kChains * kAtOnce<T>)
    UNROLL
    for (int c = 0; c < kChains; ++c) add_products<R, M>(values + k + c * kAtOnce<T>, x + k + c * kAtOnce<T>, K, sums[c]);
  for (; k + kAtOnce<T> <= K; k += kAtOnce<T>) add_products<R, M>(values + k, x + k, K, sums[0]);
  UNROLL
  for (int r = 0; r < R; ++r)
    UNROLL
    for (int i = 0; i < M; ++i) {
      UNROLL
      for (int c = 1; c < kChains; ++c) sums[0][r][i] += sums[c][r][i];
      float y = sum(sums[0][r][i]);
      for (int64_t rest = k; rest < K; ++rest) y += to_float(values[r * K + rest]) * a.x[(m + i) * K + rest];
      store_results(w.y, w.add, w.bfloat16_y, (m + i) * w.N + n + r, &y, 1);
    }
}

template <typename T, int R>
void dense_tokens(const Activations& a, const Weight& w, int64_t n) {
  int64_t m = 0;
  for (; m + 4 <= a.M; m += 4) dense_rows<T, R, 4>(a, w, n, m);
  if (m + 2 <= a.M) dense_rows<T, R, 2>(a, w, n, m), m += 2;
  if (m < a.M) dense_rows<T, R, 1>(a, w, n, m);
}

// Of one row of activations, memory sets the pace, and rows of weights are read in one run.
template <typename T>
void dense(const Activations& a, const Weight& w, int64_t first, int64_t last) {
  int64_t n = first;
  if (a.M > 1)
    for (; n + 4 <= last; n += 4) dense_tokens<T, 4>(a, w, n);
  for (; n < last; ++n) dense_tokens<T, 1>(a, w, n);
}

}  // namespace JAXLLM_ISA
}  // namespace jaxllm
