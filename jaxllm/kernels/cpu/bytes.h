// Attention of few queries over an int8 cache by products of bytes: of four at once, where an instruction takes unsigned
// times signed ones. Queries and weights, of 15 bits, are two digits to the base of 256, the higher one first.

#pragma once

#include <algorithm>

#include "kernels.h"
#include "products.h"
#include "quantised.h"
#include "simd.h"

namespace jaxllm {
namespace JAXLLM_ISA {

constexpr int kDigits = 2;
constexpr int kColumns = 64;  // of a row that are taken at once, of which the row is a multiple

// A query's words [H] as digits [kDigits, H]. Returns their sum.
inline int32_t split(const int16_t* words, int64_t H, int8_t* digits) {
  int32_t sum = 0;
  for (int64_t h = 0; h < H; ++h) {
    const int low = static_cast<int8_t>(words[h]);
    digits[h] = static_cast<int8_t>((words[h] - low) / 256), digits[H + h] = static_cast<int8_t>(low);
    sum += words[h];
  }
  return sum;
}

// Scores [kR, row] of queries' digits [kR, kDigits, H] and keys [count, H], up to the end of a vector of scores. excess:
// what each score is too much by, as keys are taken as unsigned. ahead: what is wanted next, as large as the keys.
template <int kR>
void score_bytes(const int8_t* q, const int32_t* excess, const int8_t* k, const int8_t* ahead, int64_t H, int64_t count,
                 float* scores, int64_t row);

// y [kR, H] = keep [kR] * y + unit * weights' digits [kR, kDigits, row] times values [count, H]. The digits, which are
// bytes without a sign, are 0 from `count` to the end of a vector of weights.
template <int kR>
void mix_bytes(const int8_t* weights, int64_t row, const int8_t* v, const int8_t* ahead, int64_t H, int64_t count,
               const float* keep, float unit, float* y);

#if defined(__AVX512VNNI__)

constexpr bool kHasBytes = true;

inline Bytes sixteen(const int8_t* x) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

// Slots [s, s + 4) of a cache [count, H], of which the last is taken for those beyond.
struct FourSlots {
  const int8_t* rows[4];

  FourSlots(const int8_t* cache, int64_t H, int64_t count, int64_t s) {
    const bool whole = s + 4 <= count;
    UNROLL
    for (int i = 0; i < 4; ++i) rows[i] = cache + (whole ? s + i : std::min(s + i, count - 1)) * H;
  }
  Bytes load(int i) const { return _mm512_loadu_si512(rows[i]); }
};

// Vectors as a matrix of quarters, transposed.
inline void transpose_quarters(Bytes a, Bytes b, Bytes c, Bytes d, Int (&to)[4]) {
  const Bytes ab_low = _mm512_shuffle_i32x4(a, b, 0x44), ab_high = _mm512_shuffle_i32x4(a, b, 0xEE);
  const Bytes cd_low = _mm512_shuffle_i32x4(c, d, 0x44), cd_high = _mm512_shuffle_i32x4(c, d, 0xEE);
  to[0] = reinterpret_cast<Int>(_mm512_shuffle_i32x4(ab_low, cd_low, 0x88));
  to[1] = reinterpret_cast<Int>(_mm512_shuffle_i32x4(ab_low, cd_low, 0xDD));
  to[2] = reinterpret_cast<Int>(_mm512_shuffle_i32x4(ab_high, cd_high, 0x88));
  to[3] = reinterpret_cast<Int>(_mm512_shuffle_i32x4(ab_high, cd_high, 0xDD));
}

// Bytes of four vectors beside each other: to[c] has columns 4 c to 4 c + 3 of each quarter.
inline void interleave(Bytes a, Bytes b, Bytes c, Bytes d, Int (&to)[4]) {
  const Bytes ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
  const Bytes cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
  to[0] = reinterpret_cast<Int>(_mm512_unpacklo_epi16(ab_low, cd_low));
  to[1] = reinterpret_cast<Int>(_mm512_unpackhi_epi16(ab_low, cd_low));
  to[2] = reinterpret_cast<Int>(_mm512_unpacklo_epi16(ab_high, cd_high));
  to[3] = reinterpret_cast<Int>(_mm512_unpackhi_epi16(ab_high, cd_high));
}

// Of vectors with four slots each, four values of a slot side by side: the sums of each slot's, in order.
inline Int sums_of_slots(const Int (&x)[4]) {
  const auto low = [](Int a, Int b) { return _mm512_unpacklo_epi32(reinterpret_cast<Bytes>(a), reinterpret_cast<Bytes>(b)); };
  const auto high = [](Int a, Int b) { return _mm512_unpackhi_epi32(reinterpret_cast<Bytes>(a), reinterpret_cast<Bytes>(b)); };
  const Bytes ab = _mm512_add_epi32(low(x[0], x[1]), high(x[0], x[1]));
  const Bytes cd = _mm512_add_epi32(low(x[2], x[3]), high(x[2], x[3]));
  const Bytes sums = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const Bytes order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return reinterpret_cast<Int>(_mm512_permutexvar_epi32(order, sums));
}

template <int kR>
void score_bytes(const int8_t* q, const int32_t* excess, const int8_t* k, const int8_t* ahead, int64_t H, int64_t count,
                 float* scores, int64_t row) {
  for (int64_t h = 0; h < H; h += kColumns) {
    Int queries[kR][kDigits][4];
    UNROLL
    for (int r = 0; r < kR; ++r)
      UNROLL
      for (int digit = 0; digit < kDigits; ++digit)
        UNROLL
        for (int c = 0; c < 4; ++c)
          queries[r][digit][c] = reinterpret_cast<Int>(sixteen(q + (r * kDigits + digit) * H + h + 16 * c));
    for (int64_t s = 0; s < count; s += kLanes) {
      Int parts[kR][4];
      UNROLL
      for (int i = 0; i < 4; ++i) {
        const FourSlots slots(k + h, H, count, s + 4 * i);
        prefetch(ahead + (s + 4 * i) * H + 4 * h, 4 * kColumns);
        Int keys[4];  // each with sixteen values of each slot
        transpose_quarters(slots.load(0), slots.load(1), slots.load(2), slots.load(3), keys);
        Int sums[kR][kDigits] = {};
        UNROLL
        for (int c = 0; c < 4; ++c) {
          const Bytes of = int8_of(reinterpret_cast<Bytes>(keys[c]));
          UNROLL
          for (int r = 0; r < kR; ++r)
            UNROLL
            for (int digit = 0; digit < kDigits; ++digit)
              sums[r][digit] = dot<true>(sums[r][digit], of, reinterpret_cast<Bytes>(queries[r][digit][c]));
        }
        UNROLL
        for (int r = 0; r < kR; ++r) parts[r][i] = sums[r][0] * 256 + sums[r][1];
      }
      UNROLL
      for (int r = 0; r < kR; ++r) {
        float* to = scores + r * row + s;
        const Int sum = sums_of_slots(parts[r]) + (h == 0 ? fill(-excess[r]) : load_as<Int>(to));
        store(to, h + kColumns < H ? reinterpret_cast<Float>(sum) : to_float(sum));
      }
    }
  }
}

template <int kR>
void mix_bytes(const int8_t* weights, int64_t row, const int8_t* v, const int8_t* ahead, int64_t H, int64_t count,
               const float* keep, float unit, float* y) {
  for (int64_t h = 0; h < H; h += kColumns) {
    Int sums[kR][kDigits][4] = {};
    for (int64_t s = 0; s < count; s += 4) {
      const FourSlots slots(v + h, H, count, s);
      prefetch(ahead + s * H + 4 * h, 4 * kColumns);
      Int values[4];
      interleave(slots.load(0), slots.load(1), slots.load(2), slots.load(3), values);
      UNROLL
      for (int r = 0; r < kR; ++r)
        UNROLL
        for (int digit = 0; digit < kDigits; ++digit) {
          const Bytes weight = _mm512_set1_epi32(load_as<int32_t>(weights + (r * kDigits + digit) * row + s));
          UNROLL
          for (int c = 0; c < 4; ++c)
            sums[r][digit][c] = dot<true>(sums[r][digit][c], weight, reinterpret_cast<Bytes>(values[c]));
        }
    }
    UNROLL
    for (int r = 0; r < kR; ++r) {
      Int all[4];
      UNROLL
      for (int c = 0; c < 4; ++c) all[c] = sums[r][0][c] * 256 + sums[r][1][c];
      Int whole[4];
      const auto of = [&](int c) { return reinterpret_cast<Bytes>(all[c]); };
      transpose_quarters(of(0), of(1), of(2), of(3), whole);
      UNROLL
      for (int c = 0; c < 4; ++c) {
        float* to = y + r * H + h + c * kLanes;
        store(to, load(to) * keep[r] + to_float(whole[c]) * unit);
      }
    }
  }
}

#else

constexpr bool kHasBytes = false;

#endif

}  // namespace JAXLLM_ISA
}  // namespace jaxllm
