// Quantised weights in panels of 16 rows, times activations that were rounded to one or two int8.

#pragma once

#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace jaxllm {
namespace JAXLLM_ISA {

constexpr int kParts = kPanel / kLanes;  // vectors that a panel's rows fill

#if defined(__AVX512VNNI__)

using Bytes = __m512i;
constexpr int kOffset = 128;  // added to int8 values, which are taken as unsigned
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes int8_of(Bytes w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }
inline Bytes low_half(Bytes w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
inline Bytes high_half(Bytes w) { return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15)); }
inline Bytes four(const int8_t* x) { return _mm512_set1_epi32(load_as<int32_t>(x)); }
template <bool kSigned>
inline Int dot(Int sum, Bytes w, Bytes x) {
  return reinterpret_cast<Int>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), w, x));
}

#elif defined(__AVX2__)

using Bytes = __m256i;
constexpr int kOffset = 0;
inline Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Bytes int8_of(Bytes w) { return w; }
inline Bytes low_half(Bytes w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
inline Bytes high_half(Bytes w) { return _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi8(15)); }
inline Bytes four(const int8_t* x) { return _mm256_set1_epi32(load_as<int32_t>(x)); }
template <bool kSigned>
inline Int dot(Int sum, Bytes w, Bytes x) {
  // |w| <= 128 and |x| <= 127: two products stay below 2^15.
  const Bytes pairs = kSigned ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
                              : _mm256_maddubs_epi16(w, x);
  return sum + reinterpret_cast<Int>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#elif defined(__ARM_FEATURE_DOTPROD)

using Bytes = uint8x16_t;
constexpr int kOffset = 0;
inline Bytes load_bytes(const uint8_t* p) { return vld1q_u8(p); }
inline Bytes int8_of(Bytes w) { return w; }
inline Bytes low_half(Bytes w) { return vandq_u8(w, vdupq_n_u8(15)); }
inline Bytes high_half(Bytes w) { return vshrq_n_u8(w, 4); }
inline Bytes four(const int8_t* x) { return vreinterpretq_u8_s32(vdupq_n_s32(load_as<int32_t>(x))); }
template <bool kSigned>
inline Int dot(Int sum, Bytes w, Bytes x) {
  return reinterpret_cast<Int>(
      vdotq_s32(reinterpret_cast<int32x4_t>(sum), vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x)));
}

#else  // any processor

using Bytes = uint8_t __attribute__((vector_size(16)));
constexpr int kOffset = 0;
inline Bytes load_bytes(const uint8_t* p) { return load_as<Bytes>(p); }
inline Bytes int8_of(Bytes w) { return w; }
inline Bytes low_half(Bytes w) { return w & 15; }
inline Bytes high_half(Bytes w) { return w >> 4; }
inline Bytes four(const int8_t* x) {
  const Int four = fill(load_as<int32_t>(x));
  return reinterpret_cast<Bytes>(four);
}
template <bool kSigned>
inline Int dot(Int sum, Bytes w, Bytes x) {
  for (int lane = 0; lane < 4; ++lane)
    for (int i = 0; i < 4; ++i)
      sum[lane] += static_cast<int8_t>(w[4 * lane + i]) * static_cast<int8_t>(x[4 * lane + i]);
  return sum;
}

#endif

constexpr int kWide = sizeof(Bytes);

inline Float load_scale(const Weight& w, int64_t at) {
  return w.bfloat16_scale ? load(static_cast<const bfloat16*>(w.scale) + at)
                          : load(static_cast<const float*>(w.scale) + at);
}

// Four values (eight of int4) of each row of R panels times M rows of activations.
template <bool kIsInt4, int R, int M, int P>
inline void add_products(const uint8_t* const (&values)[R], int64_t at, int64_t ahead, const int8_t* x, int64_t x_row, int64_t x_part,
                         Int (&sums)[P][R][M][kParts]) {
  Bytes row[R][kParts];
  UNROLL
  for (int r = 0; r < R; ++r)
    UNROLL
    for (int v = 0; v < kParts; ++v) {
      row[r][v] = load_bytes(values[r] + at + v * kWide);
      __builtin_prefetch(values[r] + at + v * kWide + ahead);
      if (!kIsInt4) row[r][v] = int8_of(row[r][v]);
    }
  UNROLL
  for (int p = 0; p < P; ++p)
    UNROLL
    for (int i = 0; i < M; ++i) {
      const int8_t* of = x + p * x_part + i * x_row;
      const Bytes first = four(of);
      UNROLL
      for (int r = 0; r < R; ++r)
        UNROLL
        for (int v = 0; v < kParts; ++v)
          sums[p][r][i][v] = dot<!kIsInt4>(sums[p][r][i][v], kIsInt4 ? low_half(row[r][v]) : row[r][v], first);
      if constexpr (kIsInt4) {
        const Bytes second = four(of + 4);
        UNROLL
        for (int r = 0; r < R; ++r)
          UNROLL
          for (int v = 0; v < kParts; ++v)
            sums[p][r][i][v] = dot<false>(sums[p][r][i][v], high_half(row[r][v]), second);
      }
    }
}

// R panels times M rows of activations, each in P parts.
template <bool kIsInt4, int R, int M, int P>
void panels(const Activations& a, const Weight& w, int64_t panel, int64_t m) {
  constexpr int kOff = kIsInt4 ? 8 : kOffset;
  constexpr int kStep = kIsInt4 ? 8 : 4;
  constexpr int kChains = R * M * P < 4 ? 2 : 1;  // sums that do not wait for each other
  const int64_t G = w.G, K = a.K, group = K / G, blocks = K / kBlock + 1, blocks_of_group = group / kBlock;
  const uint8_t* values[R];
  UNROLL
  for (int r = 0; r < R; ++r)
    values[r] = static_cast<const uint8_t*>(w.values) + (panel + r) * kPanel * (kIsInt4 ? K / 2 : K);
  const int8_t* x = a.rounded + m * K;
  // Two panels at once are two streams, which the processor foresees badly: the next two are asked for in time.
  const int64_t ahead = R == 1 ? 0 : R * kPanel * (kIsInt4 ? K / 2 : K);

  Float total[R][M][kParts] = {};
  for (int64_t g = 0; g < G; ++g) {
    int32_t x_sums[P][M];
    UNROLL
    for (int p = 0; p < P; ++p)
      UNROLL
      for (int i = 0; i < M; ++i) {
        const int32_t* of = a.sums + (p * a.M + m + i) * blocks;
        x_sums[p][i] = of[G == 1 ? blocks - 1 : g * blocks_of_group];
        for (int64_t b = 1; G > 1 && b < blocks_of_group; ++b) x_sums[p][i] += of[g * blocks_of_group + b];
      }
    Int sums[kChains][P][R][M][kParts] = {};
    UNROLL
    for (int p = 0; p < P; ++p)
      UNROLL
      for (int r = 0; r < R; ++r)
        UNROLL
        for (int i = 0; i < M; ++i)
          UNROLL
          for (int v = 0; v < kParts; ++v) sums[0][p][r][i][v] = fill(-kOff * x_sums[p][i]);
    for (int64_t k = g * group; k < (g + 1) * group; k += kChains * kStep)
      UNROLL
      for (int c = 0; c < kChains; ++c)
        add_products<kIsInt4, R, M, P>(values, (k / kStep + c) * 4 * kPanel, ahead, x + k + c * kStep, K, a.M * K, sums[c]);

    UNROLL
    for (int r = 0; r < R; ++r)
      UNROLL
      for (int v = 0; v < kParts; ++v) {
        const int64_t at = ((panel + r) * G + g) * kPanel + v * kLanes;
        const Float scale = load_scale(w, at);
        UNROLL
        for (int i = 0; i < M; ++i) {
          Float sum{};
          UNROLL
          for (int p = 0; p < P; ++p) {
            Int part = sums[0][p][r][i][v];
            if constexpr (kChains == 2) part += sums[1][p][r][i][v];
            if (w.zero_point != nullptr) part -= load_int(w.zero_point + at) * x_sums[p][i];
            sum += to_float(part) * (p == 0 ? 1.0f : 1.0f / kFiner);
          }
          total[r][i][v] += sum * scale;
        }
      }
  }
  UNROLL
  for (int i = 0; i < M; ++i)
    UNROLL
    for (int r = 0; r < R; ++r) {
      float y[kPanel];
      UNROLL
      for (int v = 0; v < kParts; ++v) store(y + v * kLanes, total[r][i][v] * a.step[m + i]);
      const int64_t first = (panel + r) * kPanel, count = std::min<int64_t>(kPanel, w.N - first);
      store_results(w.y, w.add, w.bfloat16_y, (m + i) * w.N + first, y, count);
    }
}

template <bool kIsInt4, int R, int P>
void quantised_tokens(const Activations& a, const Weight& w, int64_t panel) {
  int64_t m = 0;
  for (; m + 4 <= a.M; m += 4) panels<kIsInt4, R, 4, P>(a, w, panel, m);
  if (m + 2 <= a.M) panels<kIsInt4, R, 2, P>(a, w, panel, m), m += 2;
  if (m < a.M) panels<kIsInt4, R, 1, P>(a, w, panel, m);
}

// Of one row of activations, memory sets the pace: panel by panel it is read in one run, which it is fastest at.
template <bool kIsInt4, int P>
void quantised(const Activations& a, const Weight& w, int64_t first, int64_t last) {
  int64_t panel = first / kPanel;
  const int64_t end = (last + kPanel - 1) / kPanel;
  if (a.M > 1)
    for (; panel + 2 <= end; panel += 2) quantised_tokens<kIsInt4, 2, P>(a, w, panel);
  for (; panel < end; ++panel) quantised_tokens<kIsInt4, 1, P>(a, w, panel);
}

inline void round(const float* x, int64_t K, float* step, int8_t* high, int8_t* low, int32_t* high_sums,
                  int32_t* low_sums) {
  if (*step == 0) {
    Float most{}, wrong{};
    for (int64_t k = 0; k < K; k += kLanes) {
      const Float of = load(x + k);
      most = larger(most, larger(of, -of));
      wrong += of - of;  // of infinities and NaN it is NaN
    }
    const float absmax = highest(most);
    *step = sum(wrong) != 0 ? NAN : absmax == 0 ? 1.0f : absmax / 127.0f;  // a NaN makes all results one
  }
  if (*step != *step) {
    std::memset(high, 0, K);
    std::memset(high_sums, 0, (K / kBlock + 1) * sizeof(int32_t));
    if (low != nullptr) std::memset(low, 0, K), std::memset(low_sums, 0, (K / kBlock + 1) * sizeof(int32_t));
    return;
  }
  const Float divisor = fill(*step);
  Int all_high{}, all_low{};
  for (int64_t block = 0; block < K / kBlock; ++block) {
    Int sum_high{}, sum_low{};
    UNROLL
    for (int i = 0; i < kBlock; i += kLanes) {
      const int64_t k = block * kBlock + i;
      Float scaled = load(x + k) / divisor;
      scaled = scaled > 127.0f ? fill(127.0f) : scaled < -127.0f ? fill(-127.0f) : scaled;
      const Float whole = (scaled + kMagic) - kMagic;
      const Int bytes = __builtin_convertvector(whole, Int);
      store_bytes(high + k, bytes);
      sum_high += bytes;
      if (low != nullptr) {
        const Int rest = __builtin_convertvector(((scaled - whole) * static_cast<float>(kFiner) + kMagic) - kMagic, Int);
        store_bytes(low + k, rest);
        sum_low += rest;
      }
    }
    high_sums[block] = sum(sum_high), all_high += sum_high;
    if (low != nullptr) low_sums[block] = sum(sum_low), all_low += sum_low;
  }
  high_sums[K / kBlock] = sum(all_high);
  if (low != nullptr) low_sums[K / kBlock] = sum(all_low);
}

}  // namespace JAXLLM_ISA
}  // namespace jaxllm
