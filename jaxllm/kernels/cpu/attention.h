// Attention over a KV cache, a piece of the slots at a time, with a running softmax (Milakov & Gimelshein 2018).

#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace jaxllm {
namespace JAXLLM_ISA {

constexpr int kSlots = 64;  // looked at together

// y[r, 0:width] += sum over i < depth of a[r * row + i * next] * b[i, 0:width], of R rows and V vectors.
template <int R, int V>
inline void add_product(float* y, int64_t y_row, const float* a, int64_t row, int64_t next, const float* b,
                        int64_t b_row, int64_t depth) {
  Float sums[R][V];
  UNROLL
  for (int r = 0; r < R; ++r)
    UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = load(y + r * y_row + v * kLanes);
  for (int64_t i = 0; i < depth; ++i) {
    Float of[V];
    UNROLL
    for (int v = 0; v < V; ++v) of[v] = load(b + i * b_row + v * kLanes);
    UNROLL
    for (int r = 0; r < R; ++r) {
      const Float factor = fill(a[r * row + i * next]);
      UNROLL
      for (int v = 0; v < V; ++v) sums[r][v] += factor * of[v];
    }
  }
  UNROLL
  for (int r = 0; r < R; ++r)
    UNROLL
    for (int v = 0; v < V; ++v) store(y + r * y_row + v * kLanes, sums[r][v]);
}

template <int V>
inline void multiply_columns(float* y, int64_t y_row, const float* a, int64_t row, int64_t next, const float* b,
                             int64_t b_row, int64_t rows, int64_t depth) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) add_product<4, V>(y + r * y_row, y_row, a + r * row, row, next, b, b_row, depth);
  for (; r < rows; ++r) add_product<1, V>(y + r * y_row, y_row, a + r * row, row, next, b, b_row, depth);
}

// The same of any number of rows, and a width that is a multiple of kLanes.
inline void multiply(float* y, int64_t y_row, const float* a, int64_t row, int64_t next, const float* b,
                     int64_t b_row, int64_t rows, int64_t width, int64_t depth) {
  for (int64_t at = 0; at < width;) {
    const auto some = [&](auto vectors) {
      multiply_columns<vectors>(y + at, y_row, a, row, next, b + at, b_row, rows, depth);
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

// Rows of H as floats: where they are, or in `room`. The stride between rows is then `row`.
template <typename T>
inline const float* as_floats(const T* from, int64_t rows, int64_t H, int64_t wide_H, float* room, int64_t* row) {
  if constexpr (std::is_same_v<T, float>) {
    if (H == wide_H) return *row = H, from;
  }
  for (int64_t r = 0; r < rows; ++r) {
    int64_t h = 0;
    for (; h + kLanes <= H; h += kLanes) store(room + r * wide_H + h, load(from + r * H + h));
    for (; h < H; ++h) room[r * wide_H + h] = to_float(from[r * H + h]);
  }
  return *row = wide_H, room;
}

template <typename T>
inline void prefetch(const T* from, int64_t count) {
  const char* at = reinterpret_cast<const char*>(from);
  for (int64_t byte = 0; byte < count * static_cast<int64_t>(sizeof(T)); byte += 64) __builtin_prefetch(at + byte);
}

template <typename T, int kR, int kV>
inline void mix_columns(const float* weights, const T* v, const T* next_k, int64_t H, int64_t count, float* y, int64_t wide_H) {
  Float sums[kR][kV];
  UNROLL
  for (int r = 0; r < kR; ++r)
    UNROLL
    for (int i = 0; i < kV; ++i) sums[r][i] = load(y + r * wide_H + i * kLanes);
  for (int64_t s = 0; s < count; ++s) {
    prefetch(next_k + s * H, kV * kLanes);
    Float of[kV];
    UNROLL
    for (int i = 0; i < kV; ++i) of[i] = load(v + s * H + i * kLanes);
    UNROLL
    for (int r = 0; r < kR; ++r)
      UNROLL
      for (int i = 0; i < kV; ++i) sums[r][i] += weights[r * kSlots + s] * of[i];
  }
  UNROLL
  for (int r = 0; r < kR; ++r)
    UNROLL
    for (int i = 0; i < kV; ++i) store(y + r * wide_H + i * kLanes, sums[r][i]);
}

// Scores [kR, kSlots] of queries [kR, H] and keys [count, H]. A short run of a cache is over before the processor
// foresees it, so each step asks for as much of the values, which come next.
template <typename T, int kR>
inline void score_few(const float* q, const T* k, const T* v, int64_t H, int64_t count, float* scores) {
  for (int64_t s = 0; s < count; s += 4) {
    prefetch(v + s * H, 4 * H);
    const T* keys[4];
    UNROLL
    for (int i = 0; i < 4; ++i) keys[i] = k + std::min(s + i, count - 1) * H;
    Float sums[kR][4] = {};
    int64_t h = 0;
    for (; h + kLanes <= H; h += kLanes) {
      Float of[4];
      UNROLL
      for (int i = 0; i < 4; ++i) of[i] = load(keys[i] + h);
      UNROLL
      for (int r = 0; r < kR; ++r) {
        const Float query = load(q + r * H + h);
        UNROLL
        for (int i = 0; i < 4; ++i) sums[r][i] += query * of[i];
      }
    }
    UNROLL
    for (int r = 0; r < kR; ++r) {
      float* to = scores + r * kSlots + s;
      sums_of_four(sums[r][0], sums[r][1], sums[r][2], sums[r][3], to);
      for (int64_t rest = h; rest < H; ++rest)
        for (int i = 0; i < 4; ++i) to[i] += q[r * H + rest] * to_float(keys[i][rest]);
    }
  }
}

// y[0:kR, 0:H] (rows of wide_H) += weights [kR, kSlots] times values [count, H]. next_k: keys to ask for meanwhile.
template <typename T, int kR>
inline void mix_few(const float* weights, const T* v, const T* next_k, int64_t H, int64_t count, float* y, int64_t wide_H) {
  int64_t h = 0;
  for (; h + 4 * kLanes <= H; h += 4 * kLanes) mix_columns<T, kR, 4>(weights, v + h, next_k + h, H, count, y + h, wide_H);
  for (; h + kLanes <= H; h += kLanes) mix_columns<T, kR, 1>(weights, v + h, next_k + h, H, count, y + h, wide_H);
  for (; h < H; ++h)
    for (int r = 0; r < kR; ++r)
      for (int64_t s = 0; s < count; ++s) y[r * wide_H + h] += weights[r * kSlots + s] * to_float(v[s * H + h]);
}

// Softmax of scores in place, of `count` slots from `first` on, whose weights are then multiplied by v_scale. Each
// query's highest score and total go on, and `y_scale` is what its sum of values is to be multiplied by.
//
// Few: scores [R, kSlots].
inline void softmax_few(const Attention& a, int64_t cache_row, const int32_t* positions, int64_t G, int64_t R,
                        int64_t first, int64_t count, float* scores, float* highest_R, float* total_R,
                        float* y_scale) {
  Int lanes;
  UNROLL
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  float k_scale[kSlots] = {}, v_scale[kSlots] = {};
  if (a.k_scale != nullptr) {
    const int64_t at = cache_row * a.S + first;
    for (int64_t s = 0; s < count; ++s) k_scale[s] = a.k_scale[at + s], v_scale[s] = a.v_scale[at + s];
  }
  for (int64_t r = 0; r < R; ++r) {
    float* of = scores + r * kSlots;
    const int64_t at = positions[r / G];
    const int32_t to = static_cast<int32_t>(std::clamp<int64_t>(at + 1 - first, 0, count));
    const int32_t from = a.window == 0 ? 0 : static_cast<int32_t>(std::clamp<int64_t>(at + 1 - a.window - first, 0, to));
    Float top = fill(highest_R[r]);
    for (int32_t s = 0; s < kSlots; s += kLanes) {
      Float score = load(of + s);
      if (a.k_scale != nullptr) score *= load(k_scale + s);
      const Int slot = lanes + s;
      score = ((slot >= from) & (slot < to)) ? score : fill(-INFINITY);
      store(of + s, score);
      top = larger(top, score);
    }
    const float best = highest(top), base = best == -INFINITY ? 0 : best;
    Float total{};
    for (int32_t s = 0; s < kSlots; s += kLanes) {
      Float weight = exp_negative(load(of + s) - base);
      total += weight;
      if (a.v_scale != nullptr) weight *= load(v_scale + s);
      store(of + s, weight);
    }
    y_scale[r] = best == highest_R[r] ? 1.0f : std::exp(highest_R[r] - base);
    total_R[r] = total_R[r] * y_scale[r] + sum(total);
    highest_R[r] = best;
  }
}

// Many: scores [kSlots, wide_R].
inline void softmax_many(const Attention& a, int64_t cache_row, const int32_t* at_R, int64_t wide_R, int64_t first,
                         int64_t count, float* scores, float* highest_R, float* total_R, float* y_scale) {
  const float* k_scale = a.k_scale == nullptr ? nullptr : a.k_scale + cache_row * a.S + first;
  const float* v_scale = a.v_scale == nullptr ? nullptr : a.v_scale + cache_row * a.S + first;
  for (int64_t r = 0; r < wide_R; r += kLanes) {
    const Int at = load_as<Int>(at_R + r) - static_cast<int32_t>(first);
    const Int back = a.window == 0 ? fill(INT32_MIN) : at - static_cast<int32_t>(a.window);
    const Float before = load(highest_R + r);
    Float top = before;
    for (int32_t s = 0; s < count; ++s) {
      Float score = load(scores + s * wide_R + r);
      if (k_scale != nullptr) score *= k_scale[s];
      score = ((at >= s) & (back < s)) ? score : fill(-INFINITY);
      store(scores + s * wide_R + r, score);
      top = larger(top, score);
    }
    const Float base = top == -INFINITY ? Float{} : top;
    Float total{};
    for (int32_t s = 0; s < count; ++s) {
      const Float weight = exp_negative(load(scores + s * wide_R + r) - base);
      total += weight;
      store(scores + s * wide_R + r, v_scale == nullptr ? weight : weight * v_scale[s]);
    }
    const Float keep = top == before ? fill(1.0f) : exp_negative(before - base);
    store(y_scale + r, keep);
    store(total_R + r, load(total_R + r) * keep + total);
    store(highest_R + r, top);
  }
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

template <typename T>
void attend_as(const Attention& a, const Piece& piece, const Piece& next, const Partial& out) {
  const int64_t G = a.N / a.K, H = a.H, R = piece.count * G;
  const int64_t wide_R = (R + kLanes - 1) / kLanes * kLanes, wide_H = (H + kLanes - 1) / kLanes * kLanes;
  const float* q = a.q + ((piece.b * a.T + piece.t) * a.N + piece.k * G) * H;
  const int64_t cache_row = piece.b * a.K + piece.k;
  const T* k = static_cast<const T*>(a.k) + cache_row * a.S * H;
  const T* v = static_cast<const T*>(a.v) + cache_row * a.S * H;
  const int32_t* positions = a.positions + piece.b * a.T + piece.t;
  const float to_score = 1.0f / std::sqrt(static_cast<float>(H));

  // Few rows: scores [R, slots], each a dot product along H. Many: [slots, R], so that the keys need no transposing.
  const bool few = R < kLanes;
  thread_local std::vector<float> floats;
  thread_local std::vector<int32_t> at_R;
  floats.resize(wide_R * H + 2 * kSlots * wide_H + wide_R * kSlots + wide_R * wide_H + 3 * wide_R);
  at_R.assign(wide_R, INT32_MIN / 2);
  float* queries = floats.data();            // [R, H], or [H, wide_R]
  float* key_room = queries + wide_R * H;    // [kSlots, wide_H]
  float* value_room = key_room + kSlots * wide_H;
  float* scores = value_room + kSlots * wide_H;
  float* y = scores + wide_R * kSlots;  // [R, wide_H]
  float* highest_R = y + wide_R * wide_H;
  float* total_R = highest_R + wide_R;
  float* y_scale = total_R + wide_R;
  std::fill(highest_R, total_R, -INFINITY);
  std::fill(total_R, y_scale, 0.0f);
  std::fill(y, y + R * wide_H, 0.0f);
  if (!few && wide_R != R) std::fill(queries, key_room, 0.0f);
  for (int64_t r = 0; r < R; ++r) {
    at_R[r] = positions[r / G];
    for (int64_t h = 0; h < H; ++h)
      queries[few ? r * H + h : h * wide_R + r] = q[(r / G * a.N + r % G) * H + h] * to_score;
  }

  for (int64_t first = piece.first; first < piece.last; first += kSlots) {
    const int64_t count = std::min<int64_t>(kSlots, piece.last - first);
    const T *k_here = k + first * H, *v_here = v + first * H;
    if (few) {
      by_few(R, [&](auto rows, int64_t r) {
        score_few<T, rows>(queries + r * H, k_here, v_here, H, count, scores + r * kSlots);
      });
      softmax_few(a, cache_row, positions, G, R, first, count, scores, highest_R, total_R, y_scale);
    } else {
      int64_t row;
      const float* keys = as_floats(k_here, count, H, wide_H, key_room, &row);
      std::fill(scores, scores + count * wide_R, 0.0f);
      multiply(scores, wide_R, keys, row, 1, queries, wide_R, count, wide_R, H);
      softmax_many(a, cache_row, at_R.data(), wide_R, first, count, scores, highest_R, total_R, y_scale);
    }
    for (int64_t r = 0; r < R; ++r)
      if (y_scale[r] != 1.0f)
        for (int64_t h = 0; h < wide_H; h += kLanes) store(y + r * wide_H + h, load(y + r * wide_H + h) * y_scale[r]);
    if (few) {
      const bool last = first + kSlots >= piece.last;
      const T* next_k = last ? static_cast<const T*>(a.k) + ((next.b * a.K + next.k) * a.S + next.first) * H : k_here + kSlots * H;
      by_few(R, [&](auto rows, int64_t r) {
        mix_few<T, rows>(scores + r * kSlots, v_here, next_k, H, count, y + r * wide_H, wide_H);
      });
    } else {
      int64_t row;
      const float* values = as_floats(v_here, count, H, wide_H, value_room, &row);
      multiply(y, wide_H, scores, 1, wide_R, values, row, R, wide_H, count);
    }
  }
  for (int64_t r = 0; r < R; ++r) {
    out.highest[r] = highest_R[r], out.total[r] = total_R[r];
    std::memcpy(out.y + r * H, y + r * wide_H, H * sizeof(float));
  }
}

inline void attend(const Attention& a, const Piece& piece, const Piece& next, const Partial& out) {
  switch (a.cache) {
    case Type::kFloat32: return attend_as<float>(a, piece, next, out);
    case Type::kBfloat16: return attend_as<bfloat16>(a, piece, next, out);
    default: return attend_as<int8_t>(a, piece, next, out);
  }
}

}  // namespace JAXLLM_ISA
}  // namespace jaxllm
