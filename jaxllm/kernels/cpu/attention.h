// Attention over a KV cache, a piece of the slots at a time, with a running softmax (Milakov & Gimelshein 2018).

#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "bytes.h"
#include "kernels.h"
#include "products.h"
#include "room.h"
#include "simd.h"

namespace jaxllm {
namespace JAXLLM_ISA {

// A cache of int8 is multiplied in int16, whose sums are exact and of which an instruction takes twice as many as of
// floats, or in bytes, if queries are few: queries and weights are rounded to 15 bits. Other caches are multiplied in
// floats.
template <typename T>
constexpr bool kWords = std::is_same_v<T, int8_t>;
template <typename T>
using Factor = std::conditional_t<kWords<T>, int32_t, float>;  // two int16, or a float
constexpr float kMostWord = 32639.0f;  // the most of which the higher digit is an int8

// Slots that are looked at together: by many queries, and by few, where the keys or values of so many fill a quarter of
// a processor's first cache.
constexpr int kSlots = 64;
template <typename T>
constexpr int kSlotsOfFew = kWords<T> ? 128 : 64;

template <typename T>
inline auto load_factors(const T* p) {
  if constexpr (kWords<T>)
    return load_pairs(p);
  else
    return load(p);
}

// Rows of H as floats, `row` apart: where they are, or in `room`.
template <typename T>
inline Rows<float> as_floats(const T* from, int64_t rows, int64_t H, int64_t wide_H, float* room) {
  if constexpr (std::is_same_v<T, float>) {
    if (H == wide_H) return {from, H, nullptr};
  }
  for (int64_t r = 0; r < rows; ++r) {
    int64_t h = 0;
    for (; h + kLanes <= H; h += kLanes) store(room + r * wide_H + h, load(from + r * H + h));
    for (; h < H; ++h) room[r * wide_H + h] = to_float(from[r * H + h]);
  }
  return {room, wide_H, nullptr};
}

// Keys [rows, H], two values of a row side by side.
inline void pair_within_rows(const int8_t* from, int64_t rows, int64_t H, int32_t* room) {
  for (int64_t r = 0; r < rows; ++r, from += H, room += (H + 1) / 2) {
    int64_t h = 0;
    for (; h + 2 * kLanes <= H; h += 2 * kLanes) store(room + h / 2, load_pairs(from + h));
    for (; h < H; h += 2) room[h / 2] = pair(from[h], h + 1 < H ? from[h + 1] : 0);
  }
}

// Values [rows, H], those of two rows side by side.
inline Rows<int32_t> pair_rows(const int8_t* from, int64_t rows, int64_t H, int64_t wide_H, int32_t* room) {
  const RowPairs pairs{from, H, rows, nullptr};
  for (int64_t i = 0; 2 * i < rows; ++i) {
    int64_t h = 0;
    for (; h + kLanes <= H; h += kLanes) store(room + i * wide_H + h, pairs.load(i, h));
    for (; h < H; ++h) room[i * wide_H + h] = pair(from[2 * i * H + h], from[std::min(2 * i + 1, rows - 1) * H + h]);
  }
  return {room, wide_H, nullptr};
}

// A query's H values as words, of which the result is one; NaN where a value is no number.
inline float round_query(const float* q, int64_t H, int16_t* words) {
  Float most{}, wrong{};
  float absmax = 0;
  int64_t h = 0;
  for (; h + kLanes <= H; h += kLanes) {
    const Float of = load(q + h);
    most = larger(most, larger(of, -of)), wrong += of - of;
  }
  for (; h < H; ++h) absmax = std::max(absmax, std::fabs(q[h])), wrong += q[h] - q[h];
  if (sum(wrong) != 0) return NAN;
  // No sum of products with bytes overflows.
  const float last = std::min(kMostWord, std::floor(2147483647.0f / (255.0f * static_cast<float>(H))));
  const float unit = std::max(std::max(absmax, highest(most)) / last, std::numeric_limits<float>::min());
  const float factor = 1.0f / unit;
  for (h = 0; h + kLanes <= H; h += kLanes) store_words(words + h, load(q + h) * factor);
  for (; h < H; ++h) words[h] = static_cast<int16_t>(std::nearbyint(q[h] * factor));
  return unit;
}

// Scores [kR, kSlotsOfFew] of queries [kR, H] and keys [count, H]. A short run of a cache is over before the processor
// foresees it, so each step asks for as much from `ahead`.
template <typename T, int kR>
inline void score_few(const Factor<T>* q, const T* k, const T* ahead, int64_t H, int64_t count, float* scores) {
  constexpr int kValues = kWords<T> ? 2 : 1;  // of a factor
  const int64_t row = (H + kValues - 1) / kValues;
  using Sum = decltype(load_factors(k));
  for (int64_t s = 0; s < count; s += 4) {
    prefetch(ahead + s * H, 4 * H);
    const T* keys[4];
    UNROLL
    for (int i = 0; i < 4; ++i) keys[i] = k + std::min(s + i, count - 1) * H;
    Sum sums[kR][4] = {};
    int64_t h = 0;
    for (; h + kValues * kLanes <= H; h += kValues * kLanes) {
      Sum of[4];
      UNROLL
      for (int i = 0; i < 4; ++i) of[i] = load_factors(keys[i] + h);
      UNROLL
      for (int r = 0; r < kR; ++r) {
        const Sum query = load(q + r * row + h / kValues);
        UNROLL
        for (int i = 0; i < 4; ++i) add_product(sums[r][i], query, of[i]);
      }
    }
    UNROLL
    for (int r = 0; r < kR; ++r) {
      float* to = scores + r * kSlotsOfFew<T> + s;
      sums_of_four(sums[r][0], sums[r][1], sums[r][2], sums[r][3], to);
      for (int64_t rest = h; rest < H; ++rest) {
        const auto factor = q[r * row + rest / kValues];
        const float query = kWords<T> ? static_cast<int16_t>(static_cast<int32_t>(factor) >> rest % 2 * 16) : factor;
        for (int i = 0; i < 4; ++i) to[i] += query * to_float(keys[i][rest]);
      }
    }
  }
}

// The slots that a step looks at: `count` from `first` on of a row of the cache. Of int8, weights are multiplied by the
// scales of the values and rounded to words, of which `unit` is one.
struct Slots {
  int64_t first, count;
  float unit;
  float k_scale[kSlotsOfFew<int8_t>], v_scale[kSlotsOfFew<int8_t>];  // the latter in units; 0 to the end of a vector

  Slots(const Attention& a, int64_t cache_row, int64_t first, int64_t count) : first(first), count(count), unit(1) {
    if (a.k_scale == nullptr) return;
    const int64_t at = cache_row * a.S + first;
    std::memcpy(k_scale, a.k_scale + at, count * sizeof(float));
    std::memcpy(v_scale, a.v_scale + at, count * sizeof(float));
    for (int64_t s = count; s % kLanes != 0; ++s) k_scale[s] = v_scale[s] = 0;
    Float most = fill(1e-30f), wrong{};  // in units of which all is finite
    for (int64_t s = 0; s < count; s += kLanes) {
      const Float scale = load(v_scale + s);
      most = larger(scale, most), wrong += scale - scale;
    }
    unit = sum(wrong) == 0 ? highest(most) / kMostWord : NAN;
    for (int64_t s = 0; s < count; s += kLanes) store(v_scale + s, load(v_scale + s) * (1.0f / unit));
  }
};

// What is kept for each query: its unit, its highest score and the total of its weights so far, and what its sum of
// values is to be multiplied by before more is added.
struct Running {
  float *unit, *highest, *total, *keep;
};

// Softmax of scores [R, kSlotsOfFew]. put(r, s, weights) takes a vector of weights, of int8 in slots' units.
template <typename T, typename Put>
inline void softmax_few(const Attention& a, const Slots& slots, const int32_t* positions, int64_t R, float* scores,
                        const Running& running, const Put& put) {
  constexpr bool kWhole = kWords<T>;
  constexpr int kSlots = kSlotsOfFew<T>;
  Int lanes;
  UNROLL
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  for (int64_t r = 0; r < R; ++r) {
    float* of = scores + r * kSlots;
    const int64_t at = positions[r / (a.N / a.K)] + 1 - slots.first;
    const int32_t to = static_cast<int32_t>(std::clamp<int64_t>(at, 0, slots.count));
    const int32_t from = a.window == 0 ? 0 : static_cast<int32_t>(std::clamp<int64_t>(at - a.window, 0, to));
    const float before = running.highest[r];
    Float top = fill(before);
    for (int32_t s = 0; s < slots.count; s += kLanes) {
      Float score = load(of + s);
      if (kWhole) score *= load(slots.k_scale + s) * running.unit[r];
      if (s < from || s + kLanes > to) {
        const Int slot = lanes + s;
        score = ((slot >= from) & (slot < to)) ? score : fill(-INFINITY);
      }
      store(of + s, score);
      top = larger(top, score);
    }
    const float best = highest(top), base = best == -INFINITY ? 0 : best;
    Float total{};
    for (int32_t s = 0; s < slots.count; s += kLanes) {
      const Float weight = exp_negative(load(of + s) - base);
      total += weight;
      put(r, s, kWhole ? weight * load(slots.v_scale + s) : weight);
    }
    running.keep[r] = best == before ? 1.0f : std::exp(before - base);
    running.total[r] = running.total[r] * running.keep[r] + sum(total);
    running.highest[r] = best;
  }
}

// The same of scores [kSlots, wide_R] and weights of that shape, or [kSlots / 2, wide_R] of two slots each.
template <bool kWhole, typename F>
inline void softmax_many(const Attention& a, const Slots& slots, const int32_t* at_R, int64_t wide_R, float* scores,
                         F* weights, const Running& running) {
  const int64_t count = slots.count;
  for (int64_t r = 0; r < wide_R; r += kLanes) {
    const Int at = load_as<Int>(at_R + r) - static_cast<int32_t>(slots.first);
    const Int back = a.window == 0 ? fill(INT32_MIN) : at - static_cast<int32_t>(a.window);
    const Float before = load(running.highest + r), unit = load(running.unit + r);
    Float top = before;
    for (int32_t s = 0; s < count; ++s) {
      Float score = load(scores + s * wide_R + r);
      if (kWhole) score *= unit * slots.k_scale[s];
      score = ((at >= s) & (back < s)) ? score : fill(-INFINITY);
      store(scores + s * wide_R + r, score);
      top = larger(top, score);
    }
    const Float base = top == -INFINITY ? Float{} : top;
    Float total{};
    const auto weigh = [&](int64_t s) {
      const Float weight = exp_negative(load(scores + s * wide_R + r) - base);
      total += weight;
      return weight;
    };
    if constexpr (kWhole) {
      const auto word = [&](int64_t s) { return s < count ? to_int(weigh(s) * slots.v_scale[s]) : Int{}; };
      for (int64_t s = 0; s < count; s += 2) {
        const Int first = word(s);
        store(weights + s / 2 * wide_R + r, pair(first, word(s + 1)));
      }
    } else {
      for (int64_t s = 0; s < count; ++s) store(weights + s * wide_R + r, weigh(s));
    }
    const Float keep = top == before ? fill(1.0f) : exp_negative(before - base);
    store(running.keep + r, keep);
    store(running.total + r, load(running.total + r) * keep + total);
    store(running.highest + r, top);
  }
}

template <typename T>
void attend_as(const Attention& a, const Piece& piece, const Piece& next, const Partial& out) {
  using F = Factor<T>;
  constexpr bool kWhole = kWords<T>;
  const int64_t G = a.N / a.K, H = a.H, R = piece.count * G;
  const int64_t wide_R = (R + kLanes - 1) / kLanes * kLanes, wide_H = (H + kLanes - 1) / kLanes * kLanes;
  const int64_t deep_H = kWhole ? (H + 1) / 2 : H;  // factors of a row
  const float* q = a.q + ((piece.b * a.T + piece.t) * a.N + piece.k * G) * H;
  const int64_t cache_row = piece.b * a.K + piece.k;
  const T* k = static_cast<const T*>(a.k) + cache_row * a.S * H;
  const T* v = static_cast<const T*>(a.v) + cache_row * a.S * H;
  const int32_t* positions = a.positions + piece.b * a.T + piece.t;
  const float to_score = 1.0f / std::sqrt(static_cast<float>(H));

  // Few rows: scores [R, slots], each a dot product along H. Many: [slots, R], so that the keys need no transposing.
  const bool few = R < kLanes, bytes = kHasBytes && kWhole && few && H % kColumns == 0;
  thread_local Room<float> floats;
  thread_local Room<F> factors;
  thread_local Room<int32_t> places;
  thread_local Room<int16_t> word_room;
  const int64_t at_once = few ? kSlotsOfFew<T> : kSlots;
  F* queries = factors.of(wide_R * (deep_H + at_once) + 2 * at_once * wide_H);  // [R, deep_H], or [deep_H, wide_R]
  F* key_room = queries + wide_R * deep_H;      // [at_once, deep_H or wide_H]
  F* value_room = key_room + at_once * wide_H;  // [at_once, wide_H], or [at_once / 2, wide_H] of two each
  F* weights = value_room + at_once * wide_H;
  float* scores = floats.of(wide_R * (at_once + wide_H + 4));
  float* y = scores + wide_R * at_once;  // [R, wide_H]
  float* const each = y + wide_R * wide_H;
  const Running running{each, each + wide_R, each + 2 * wide_R, each + 3 * wide_R};
  int32_t *at_R = places.of(2 * wide_R), *excess = at_R + wide_R;
  std::fill(at_R, at_R + wide_R, INT32_MIN / 2);
  std::fill(running.highest, running.total, -INFINITY);
  std::fill(running.total, running.keep, 0.0f);
  std::fill(y, y + R * wide_H, 0.0f);
  std::fill(queries, key_room, F{});
  for (int64_t r = 0; r < R; ++r) {
    const float* from = q + (r / G * a.N + r % G) * H;
    const auto to = [&](int64_t h) -> F& { return queries[few ? r * deep_H + h : h * wide_R + r]; };
    at_R[r] = positions[r / G];
    if constexpr (kWhole) {
      int16_t* words = word_room.of(2 * deep_H);
      words[2 * deep_H - 1] = 0;
      running.unit[r] = to_score * round_query(from, H, words);
      if (bytes) {
        excess[r] = kOffset * split(words, H, reinterpret_cast<int8_t*>(queries) + r * kDigits * H);
      } else {
        for (int64_t h = 0; h < deep_H; ++h) std::memcpy(&to(h), words + 2 * h, sizeof(F));
      }
    } else {
      for (int64_t h = 0; h < H; ++h) to(h) = from[h] * to_score;
    }
  }

  for (int64_t first = piece.first; first < piece.last; first += at_once) {
    const Slots slots(a, cache_row, first, std::min<int64_t>(at_once, piece.last - first));
    const T *keys = k + first * H, *values = v + first * H;
    const int64_t then = first + at_once < piece.last ? cache_row * a.S + first + at_once
                                                      : (next.b * a.K + next.k) * a.S + next.first;
    const T *next_keys = static_cast<const T*>(a.k) + then * H, *next_values = static_cast<const T*>(a.v) + then * H;
    if (kWhole) prefetch(a.k_scale + then, at_once), prefetch(a.v_scale + then, at_once);
    if constexpr (kHasBytes && kWhole) {
      if (bytes) {
        by_few(R, [&](auto rows, int64_t r) {
          const auto* of = reinterpret_cast<const int8_t*>(queries) + r * kDigits * H;
          score_bytes<rows>(of, excess + r, keys, next_keys, H, slots.count, scores + r * at_once, at_once);
        });
        auto* digits = reinterpret_cast<int8_t*>(weights);
        softmax_few<T>(a, slots, positions, R, scores, running, [&](int64_t r, int64_t s, Float of) {
          const Int words = to_int(of);
          store_bytes(digits + r * kDigits * at_once + s, words >> 8);
          store_bytes(digits + (r * kDigits + 1) * at_once + s, words);
        });
        by_few(R, [&](auto rows, int64_t r) {
          mix_bytes<rows>(digits + r * kDigits * at_once, at_once, values, next_values, H, slots.count, running.keep + r,
                          slots.unit, y + r * H);
        });
        continue;
      }
    }
    if (few) {
      by_few(R, [&](auto rows, int64_t r) {
        score_few<T, rows>(queries + r * deep_H, keys, next_keys, H, slots.count, scores + r * at_once);
      });
      softmax_few<T>(a, slots, positions, R, scores, running, [&](int64_t r, int64_t s, Float of) {
        if constexpr (kWhole)
          store_words(reinterpret_cast<int16_t*>(weights) + r * at_once + s, of);
        else
          store(scores + r * at_once + s, of);
      });
    } else {
      const auto score = [&](const F* of, int64_t row) {
        multiply(of, row, 1, Rows<F>{queries, wide_R, nullptr}, slots.count, wide_R, deep_H,
                 [&](int64_t s, int64_t r, auto sum) { store(scores + s * wide_R + r, to_float(sum)); });
      };
      if constexpr (kWhole) {
        pair_within_rows(keys, slots.count, H, key_room);
        score(key_room, deep_H);
        softmax_many<true>(a, slots, at_R, wide_R, scores, weights, running);
      } else {
        const Rows<float> as = as_floats(keys, slots.count, H, wide_H, key_room);
        score(as.values, as.row);
        softmax_many<false>(a, slots, at_R, wide_R, scores, scores, running);
      }
    }
    const auto mix = [&](const F* of, int64_t row, int64_t next, const auto& right, int64_t depth) {
      multiply(of, row, next, right, R, wide_H, depth, [&](int64_t r, int64_t h, auto sum) {
        float* to = y + r * wide_H + h;
        store(to, load(to) * running.keep[r] + to_float(sum) * slots.unit);
      });
    };
    const bool direct = few && H == wide_H;
    if constexpr (kWhole) {
      const int64_t row = few ? at_once / 2 : 1, next = few ? 1 : wide_R, depth = (slots.count + 1) / 2;
      if (direct)
        mix(weights, row, next, RowPairs{values, H, slots.count, next_values}, depth);
      else
        mix(weights, row, next, pair_rows(values, slots.count, H, wide_H, value_room), depth);
    } else {
      const int64_t row = few ? at_once : 1, next = few ? 1 : wide_R;
      if (direct)
        mix(scores, row, next, Rows<T>{values, H, next_values}, slots.count);
      else
        mix(scores, row, next, as_floats(values, slots.count, H, wide_H, value_room), slots.count);
    }
  }
  for (int64_t r = 0; r < R; ++r) {
    out.highest[r] = running.highest[r], out.total[r] = running.total[r];
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
