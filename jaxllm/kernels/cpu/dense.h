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

inline void halve(const float* x, int64_t K, bfloat16* y) {
  for (int64_t k = 0; k < K; ++k) y[k] = to_bfloat16(x[k]);
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

// Of R rows of a weight and M of activations, whose first k values are summed up: adds the rest, and stores.
template <int C, int R, int M, typename T, typename X>
inline void finish_rows(const Weight& w, int64_t n, int64_t m, int64_t k, const T* values, const X* x,
                        Float (&sums)[C][R][M]) {
  static_assert(R == 1 || R == 4);
  UNROLL
  for (int i = 0; i < M; ++i) {
    UNROLL
    for (int r = 0; r < R; ++r)
      UNROLL
      for (int c = 1; c < C; ++c) sums[0][r][i] += sums[c][r][i];
    float y[R];
    if constexpr (R == 4)
      sums_of_four(sums[0][0][i], sums[0][1][i], sums[0][2][i], sums[0][3][i], y);
    else
      y[0] = sum(sums[0][0][i]);
    for (int64_t rest = k; rest < w.K; ++rest)
      for (int r = 0; r < R; ++r) y[r] += to_float(values[r * w.K + rest]) * to_float(x[i * w.K + rest]);
    const int64_t at = (m + i) * w.N + n;
    if constexpr (R == 4)
      store_four_results(w.y, w.add, w.bfloat16_y, at, y);
    else
      store_results(w.y, w.add, w.bfloat16_y, at, y, R);
  }
}

template <int R, int M>
constexpr int kChains = R * M < 4 ? 4 : 1;  // sums that do not wait for each other

template <typename T, int R, int M>
void dense_rows(const Activations& a, const Weight& w, int64_t n, int64_t m) {
  constexpr int C = kChains<R, M>, kRun = kAtOnce<T>;
  const int64_t K = a.K;
  const T* values = static_cast<const T*>(w.values) + n * K;
  const float* x = (std::is_same_v<T, bfloat16> ? a.pairs : a.x) + m * K;
  Float sums[C][R][M] = {};
  int64_t k = 0;
  for (; k + C * kRun <= K; k += C * kRun)
    UNROLL
    for (int c = 0; c < C; ++c) add_products<R, M>(values + k + c * kRun, x + k + c * kRun, K, sums[c]);
  for (; k + kRun <= K; k += kRun) add_products<R, M>(values + k, x + k, K, sums[0]);
  finish_rows(w, n, m, k, values, a.x + m * K, sums);
}

#if defined(JAXLLM_HALVES)
template <int R, int M>
JAXLLM_HALVES inline void add_half_products(const bfloat16* values, const bfloat16* x, int64_t K, Float (&sums)[R][M]) {
  __m512bh row[R];
  UNROLL
  for (int r = 0; r < R; ++r) row[r] = load_as<__m512bh>(values + r * K), prefetch_rows<R>(values + r * K, K);
  UNROLL
  for (int i = 0; i < M; ++i) {
    const auto of = load_as<__m512bh>(x + i * K);
    UNROLL
    for (int r = 0; r < R; ++r)
      sums[r][i] = reinterpret_cast<Float>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums[r][i]), row[r], of));
  }
}

// As dense_rows of bfloat16 activations: an instruction takes two products to a lane.
template <int R, int M>
JAXLLM_HALVES void half_rows(const Activations& a, const Weight& w, int64_t n, int64_t m) {
  constexpr int C = kChains<R, M>, kRun = 2 * kLanes;
  const int64_t K = a.K;
  const auto* values = static_cast<const bfloat16*>(w.values) + n * K;
  const bfloat16* x = a.halves + m * K;
  Float sums[C][R][M] = {};
  int64_t k = 0;
  for (; k + C * kRun <= K; k += C * kRun)
    UNROLL
    for (int c = 0; c < C; ++c) add_half_products<R, M>(values + k + c * kRun, x + k + c * kRun, K, sums[c]);
  for (; k + kRun <= K; k += kRun) add_half_products<R, M>(values + k, x + k, K, sums[0]);
  finish_rows(w, n, m, k, values, x, sums);
}
#endif

template <typename T, int R, int M>
void rows_of(const Activations& a, const Weight& w, int64_t n, int64_t m) {
#if defined(JAXLLM_HALVES)
  if constexpr (std::is_same_v<T, bfloat16>) {
    if (a.halves != nullptr) return half_rows<R, M>(a, w, n, m);
  }
#endif
  dense_rows<T, R, M>(a, w, n, m);
}

template <typename T, int R>
void dense_tokens(const Activations& a, const Weight& w, int64_t n) {
  int64_t m = 0;
  for (; m + 4 <= a.M; m += 4) rows_of<T, R, 4>(a, w, n, m);
  if (m + 2 <= a.M) rows_of<T, R, 2>(a, w, n, m), m += 2;
  if (m < a.M) rows_of<T, R, 1>(a, w, n, m);
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
