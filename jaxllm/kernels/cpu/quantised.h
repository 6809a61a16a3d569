// Quantised weights in panels of 16 rows, times activations that were rounded to one or two int8.

#pragma once

#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace jaxllm {
namespace JAXLLM_ISA {

constexpr int kParts = kPanel / kLanes;  // vectors that a panel's rows fill
// Panels and rows of activations at once, of many: as many as the sums have registers for.
constexpr int kPanelsAtOnce = kParts == 1 ? 2 : 1;
constexpr int kRowsAtOnce = kParts == 1 ? 8 : 4;

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

// How M rows of activations lie in blocks.
template <int M>
constexpr int kRowsOfBlock = M < kTogether ? M : kTogether;
template <int M>
constexpr int kBlocks = M / kRowsOfBlock<M>;

// Step `step` of four values (eight of int4) of each row of R panels, times rows [First, First + Rows) of activations.
// ahead: prefetches what comes so much later.
template <bool kIsInt4, bool kAhead, int First, int Rows, int R, int M>
inline void add_products(const uint8_t* const (&values)[R], int64_t step, int64_t ahead,
                         const int8_t* const (&x)[kBlocks<Rows>], Int (&sums)[R][M][kParts]) {
  constexpr int kRows = kRowsOfBlock<Rows>, kFour = 4 * kRows;  // bytes of four values of a block's rows
  Bytes row[R][kParts];
  UNROLL
  for (int r = 0; r < R; ++r)
    UNROLL
    for (int v = 0; v < kParts; ++v) {
      const uint8_t* of = values[r] + step * 4 * kPanel + v * kWide;
      row[r][v] = load_bytes(of);
      if (kAhead) __builtin_prefetch(of + ahead);
      if (!kIsInt4) row[r][v] = int8_of(row[r][v]);
    }
  UNROLL
  for (int i = 0; i < Rows; ++i) {
    const int8_t* of = x[i / kRows] + step * (kIsInt4 ? 2 : 1) * kFour + i % kRows * 4;
    const Bytes first = four(of);
    UNROLL
    for (int r = 0; r < R; ++r)
      UNROLL
      for (int v = 0; v < kParts; ++v) {
        Int& sum = sums[r][First + i][v];
        sum = dot<!kIsInt4>(sum, kIsInt4 ? low_half(row[r][v]) : row[r][v], first);
      }
    if constexpr (kIsInt4) {
      const Bytes second = four(of + kFour);
      UNROLL
      for (int r = 0; r < R; ++r)
        UNROLL
        for (int v = 0; v < kParts; ++v) {
          Int& sum = sums[r][First + i][v];
          sum = dot<false>(sum, high_half(row[r][v]), second);
        }
    }
  }
}

// R panels times rows [m, m + M) of activations. kGroups: of a weight with more than one.
template <bool kIsInt4, bool kGroups, int R, int M>
class Tile {
 public:
  Tile(const Activations& a, const Weight& w, int64_t group, int64_t panel, int64_t m)
      : a_(a), w_(w), group_(group), panel_(panel), m_(m) {
    for (int r = 0; r < R; ++r) values_[r] = static_cast<const uint8_t*>(w.values) + (panel + r) * panel_bytes();
  }

  void multiply() {
    const bool whole = !w_.bfloat16_y && (panel_ + R) * kPanel <= w_.N;
    if (M > 1 && whole) ask_for_results();
    for (int64_t g = 0; g < (kGroups ? w_.G : 1); ++g) {
      // Several panels at once are several streams, which the processor foresees badly: the first rows ask for the next.
      const bool ahead = M > 1 && m_ == 0;
      if (kAll && a_.high != nullptr)
        ahead ? add_group<true, true>(g) : add_group<false, true>(g);
      else
        ahead ? add_group<true, false>(g) : add_group<false, false>(g);
    }
    Float scale[R][kParts];
    UNROLL
    for (int r = 0; r < R; ++r)
      UNROLL
      for (int v = 0; v < kParts; ++v)
        scale[r][v] = kGroups ? fill(1.0f) : load_scale(w_, (panel_ + r) * kPanel + v * kLanes);
    UNROLL
    for (int i = 0; i < M; ++i)
      UNROLL
      for (int r = 0; r < R; ++r)
        UNROLL
        for (int v = 0; v < kParts; ++v) total_[r][i][v] *= scale[r][v] * a_.step[m_ + i];
    if (!whole)
      store_part();
    else if (w_.add != nullptr)
      store_whole<true>();
    else
      store_whole<false>();
  }

 private:
  static constexpr int kStep = kIsInt4 ? 8 : 4;
  static constexpr bool kAll = kIsInt4 || M == 1;  // takes high of all values, and no list

  int64_t panel_bytes() const { return kPanel * (kIsInt4 ? a_.K / 2 : a_.K); }

  // A line that is not in the cache has to be read before it can be written.
  void ask_for_results() const {
    UNROLL
    for (int i = 0; i < M; ++i)
      UNROLL
      for (int r = 0; r < R; ++r) {
        const int64_t at = (m_ + i) * w_.N + (panel_ + r) * kPanel;
        __builtin_prefetch(static_cast<const float*>(w_.y) + at, 1);
        if (w_.add != nullptr) __builtin_prefetch(static_cast<const float*>(w_.add) + at);
      }
  }

  // kBoth: low and high of all values in the same go.
  template <bool kAhead, bool kBoth>
  void add_group(int64_t g) {
    constexpr int kChains = R * M * kParts < 4 ? 2 : 1;  // sums that do not wait for each other
    const int8_t *low[kBlocks<M>], *high[kBlocks<M>];
    UNROLL
    for (int block = 0; block < kBlocks<M>; ++block) {
      const int64_t at = (m_ + block * kTogether) * a_.K;
      low[block] = a_.low + at, high[block] = kBoth ? a_.high + at : nullptr;
    }
    Int sums[kChains][R][M][kParts] = {}, high_sums[kChains][R][M][kParts] = {};
    const bool beyond = !kAll && a_.high != nullptr;
    if (beyond) {
      add_beyond<0>(g, sums[0]);
      if constexpr (kBlocks<M> > 1) add_beyond<1>(g, sums[0]);
    }
    for (int64_t step = g * group_ / kStep; step < (g + 1) * group_ / kStep; step += kChains)
      UNROLL
      for (int c = 0; c < kChains; ++c) {
        add_products<kIsInt4, kAhead, 0, M>(values_, step + c, R * panel_bytes(), low, sums[c]);
        if (kBoth) add_products<kIsInt4, false, 0, M>(values_, step + c, 0, high, high_sums[c]);
      }
    int32_t low_x[M], high_x[M];
    for (int i = 0; i < M; ++i) {
      low_x[i] = sum_of_x(a_.low_sums, g, i);
      if (beyond || kBoth) high_x[i] = sum_of_x(a_.high_sums, g, i);
      if (beyond) low_x[i] += kCoarse * high_x[i];
    }
    add(g, low_x, 1.0f, sums);
    if (kBoth) add(g, high_x, kCoarse, high_sums);
  }

  // kCoarse times high, of the fours that a block of rows lists. A row's integers are at most 127 K together, as its
  // step is from their mean: products with 255 are below 2^31 for a K of up to 66000.
  template <int Block>
  void add_beyond(int64_t g, Int (&sums)[R][M][kParts]) {
    constexpr int kFirst = Block * kTogether, kRows = kRowsOfBlock<M>;
    const int64_t of = m_ / kTogether + Block;
    const int32_t* first = a_.beyond_first + of * (a_.K / kBlock + 1);
    const int32_t* fours = a_.beyond + of * (a_.K / 4);
    const int32_t *four = fours + first[g * group_ / kBlock], *end = fours + first[(g + 1) * group_ / kBlock];
    const int8_t* const x[1] = {a_.high + (m_ + kFirst) * a_.K};
    for (; four != end; ++four) add_products<kIsInt4, false, kFirst, kRows>(values_, *four, 0, x, sums);
    UNROLL
    for (int r = 0; r < R; ++r)
      UNROLL
      for (int i = 0; i < kRows; ++i)
        UNROLL
        for (int v = 0; v < kParts; ++v) sums[r][kFirst + i][v] *= kCoarse;
  }

  // The sum of a row's integers in a group.
  int32_t sum_of_x(const int32_t* sums, int64_t g, int row) const {
    const int64_t blocks = a_.K / kBlock + 1, of_group = group_ / kBlock;
    const int32_t* of = sums + (m_ + row) * blocks;
    if (!kGroups) return of[blocks - 1];
    int32_t sum = 0;
    for (int64_t block = 0; block < of_group; ++block) sum += of[g * of_group + block];
    return sum;
  }

  // Adds `factor` times the sums of a group of values, of a single group not yet scaled.
  template <int Chains>
  void add(int64_t g, const int32_t (&x_sums)[M], float factor, const Int (&sums)[Chains][R][M][kParts]) {
    UNROLL
    for (int r = 0; r < R; ++r)
      UNROLL
      for (int v = 0; v < kParts; ++v) {
        const int64_t at = ((panel_ + r) * w_.G + g) * kPanel + v * kLanes;
        const Float scale = kGroups ? load_scale(w_, at) * factor : fill(factor);
        UNROLL
        for (int i = 0; i < M; ++i) {
          Int sum = sums[0][r][i][v] - (kIsInt4 ? 8 : kOffset) * x_sums[i];
          if (Chains == 2) sum += sums[Chains - 1][r][i][v];
          if (w_.zero_point != nullptr) sum -= load_int(w_.zero_point + at) * x_sums[i];
          total_[r][i][v] += to_float(sum) * scale;
        }
      }
  }

  template <bool kAdd>
  void store_whole() {
    const int64_t at = m_ * w_.N + panel_ * kPanel;
    UNROLL
    for (int i = 0; i < M; ++i)
      UNROLL
      for (int r = 0; r < R; ++r)
        UNROLL
        for (int v = 0; v < kParts; ++v) {
          const int64_t of = at + i * w_.N + r * kPanel + v * kLanes;
          const Float y = total_[r][i][v];
          store(static_cast<float*>(w_.y) + of, kAdd ? y + load(static_cast<const float*>(w_.add) + of) : y);
        }
  }

  void store_part() {
    UNROLL
    for (int i = 0; i < M; ++i)
      UNROLL
      for (int r = 0; r < R; ++r) {
        const int64_t first = (panel_ + r) * kPanel, count = std::min<int64_t>(kPanel, w_.N - first);
        float y[kPanel];
        std::memcpy(y, total_[r][i], sizeof y);
        store_results(w_.y, w_.add, w_.bfloat16_y, (m_ + i) * w_.N + first, y, count);
      }
  }

  const Activations& a_;
  const Weight& w_;
  const int64_t group_, panel_, m_;
  const uint8_t* values_[R];
  Float total_[R][M][kParts] = {};
};

template <bool kIsInt4, bool kGroups, int R>
void quantised_rows(const Activations& a, const Weight& w, int64_t group, int64_t panel) {
  int64_t m = 0;
  if constexpr (!kGroups)  // of groups, sums and totals need registers
    for (; m + kRowsAtOnce <= a.M; m += kRowsAtOnce)
      Tile<kIsInt4, kGroups, R, kRowsAtOnce>(a, w, group, panel, m).multiply();
  for (; m + kTogether <= a.M; m += kTogether) Tile<kIsInt4, kGroups, R, kTogether>(a, w, group, panel, m).multiply();
  switch (a.M - m) {
    case 3: return Tile<kIsInt4, kGroups, R, 3>(a, w, group, panel, m).multiply();
    case 2: return Tile<kIsInt4, kGroups, R, 2>(a, w, group, panel, m).multiply();
    case 1: return Tile<kIsInt4, kGroups, R, 1>(a, w, group, panel, m).multiply();
  }
}

// Of one row of activations, memory sets the pace: panel by panel it is read in one run, which it is fastest at.
template <bool kIsInt4, bool kGroups>
void quantised(const Activations& a, const Weight& w, int64_t first, int64_t last) {
  const int64_t group = a.K / w.G, end = (last + kPanel - 1) / kPanel;
  int64_t panel = first / kPanel;
  if (a.M > 1)
    for (; panel + kPanelsAtOnce <= end; panel += kPanelsAtOnce)
      quantised_rows<kIsInt4, kGroups, kPanelsAtOnce>(a, w, group, panel);
  for (; panel < end; ++panel) quantised_rows<kIsInt4, kGroups, 1>(a, w, group, panel);
}

}  // namespace JAXLLM_ISA
}  // namespace jaxllm
