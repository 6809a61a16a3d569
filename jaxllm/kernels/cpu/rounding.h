// Activations rounded to one or two int8, and laid out as Activations has them.

#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace jaxllm {
namespace JAXLLM_ISA {

// The step of a row: see Kernels.
inline float find_step(const float* x, int64_t K, float reach, bool two) {
  Float most{}, total{}, wrong{};
  for (int64_t k = 0; k < K; k += kLanes) {
    const Float of = load(x + k), magnitude = larger(of, -of);
    most = larger(most, magnitude);
    total += magnitude;
    wrong += of - of;  // of infinities and NaN it is NaN
  }
  if (sum(wrong) != 0) return NAN;  // which makes all results one
  const float absmax = highest(most);
  if (absmax == 0) return 1.0f;
  if (!two) return absmax / 127.0f;
  const float last = std::min(absmax, reach * sum(total) / static_cast<float>(K));
  return std::max(std::max(last, absmax / kCoarse) / 127.0f, std::numeric_limits<float>::min());  // has a reciprocal
}

// Four values of each row side by side, and so on.
template <int Rows>
inline void store_fours(const Int (&rows)[Rows], int8_t* to) {
#if defined(__AVX512VNNI__)
  if constexpr (Rows == 4) {
    const auto bytes = [&](int row) { return _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(rows[row])); };
    __m512i all = _mm512_castsi128_si512(bytes(0));
    all = _mm512_inserti32x4(all, bytes(1), 1);
    all = _mm512_inserti32x4(all, bytes(2), 2);
    all = _mm512_inserti32x4(all, bytes(3), 3);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, all));
    return;
  }
#endif
  int8_t bytes[Rows][kLanes];
  for (int row = 0; row < Rows; ++row) store_bytes(bytes[row], rows[row]);
  for (int four = 0; four < kLanes / 4; ++four)
    for (int row = 0; row < Rows; ++row) std::memcpy(to + (four * Rows + row) * 4, bytes[row] + four * 4, 4);
}

template <int Rows, bool kTwo, bool kByBlock>
void round_rows(const Activations& a, const float* x_of_block, int64_t block_of_rows, float reach) {
  const int64_t m = block_of_rows * kTogether, K = a.K, blocks = K / kBlock;
  int32_t* const beyond = a.beyond + block_of_rows * (K / 4);
  int32_t* const beyond_first = a.beyond_first + block_of_rows * (blocks + 1);
  const float* x[Rows];
  float factor[Rows];
  for (int row = 0; row < Rows; ++row) {
    float& step = a.step[m + row];
    x[row] = x_of_block + row * K;
    if (step == 0) step = find_step(x[row], K, reach, kTwo);
    factor[row] = 1.0f / step;
    if (step == step) continue;
    thread_local std::vector<float> zeros;
    zeros.resize(K);
    x[row] = zeros.data(), factor[row] = 1.0f;
  }
  Int low_total[Rows] = {}, high_total[Rows] = {};
  int32_t count = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    Int low_sum[Rows] = {}, high_sum[Rows] = {};
    beyond_first[block] = count;
    UNROLL
    for (int i = 0; i < kBlock; i += kLanes) {
      const int64_t k = block * kBlock + i;
      Int low[Rows], high[Rows], any{};
      UNROLL
      for (int row = 0; row < Rows; ++row) {
        Float whole;
        if (kTwo) {
          whole = (load(x[row] + k) * factor[row] + kMagic) - kMagic;
          // A hair less than 1 / kCoarse: 127 has no high, and 128 + 126 * kCoarse still has the next one.
          const Float coarse = (whole * (1.0f / (kCoarse + 0.002f)) + kMagic) - kMagic;
          whole -= coarse * static_cast<float>(kCoarse);
          high[row] = __builtin_convertvector(coarse, Int);
          any |= high[row];
          high_sum[row] += high[row];
        } else {  // as its twin does, whose division is exact
          const Float scaled = load(x[row] + k) / a.step[m + row];
          whole = ((scaled > 127.0f ? fill(127.0f) : scaled < -127.0f ? fill(-127.0f) : scaled) + kMagic) - kMagic;
        }
        low[row] = __builtin_convertvector(whole, Int);
        low_sum[row] += low[row];
      }
      store_fours(low, a.low + m * K + k * Rows);
      if (!kTwo) continue;
      store_fours(high, a.high + m * K + k * Rows);
      const unsigned lanes = nonzero(any);
      UNROLL
      for (int four = 0; four < kLanes / 4; ++four) {
        beyond[count] = static_cast<int32_t>(k / 4 + four);
        count += (lanes >> 4 * four & 15) != 0;
      }
    }
    UNROLL
    for (int row = 0; row < Rows; ++row) {
      const int64_t at = (m + row) * (blocks + 1) + block;
      if (kByBlock) a.low_sums[at] = sum(low_sum[row]);
      if (kByBlock && kTwo) a.high_sums[at] = sum(high_sum[row]);
      low_total[row] += low_sum[row], high_total[row] += high_sum[row];
    }
  }
  beyond_first[blocks] = count;
  for (int row = 0; row < Rows; ++row) {
    const int64_t at = (m + row) * (blocks + 1) + blocks;
    a.low_sums[at] = sum(low_total[row]);
    if (kTwo) a.high_sums[at] = sum(high_total[row]);
  }
}

template <int Rows>
void round_some(const Activations& a, const float* x, int64_t block, float reach, bool by_block) {
  if (a.high != nullptr)
    by_block ? round_rows<Rows, true, true>(a, x, block, reach) : round_rows<Rows, true, false>(a, x, block, reach);
  else
    by_block ? round_rows<Rows, false, true>(a, x, block, reach) : round_rows<Rows, false, false>(a, x, block, reach);
}

inline void round(const Activations& a, const float* x, int64_t block, float reach, bool by_block) {
  switch (std::min<int64_t>(kTogether, a.M - block * kTogether)) {
    case 4: return round_some<4>(a, x, block, reach, by_block);
    case 3: return round_some<3>(a, x, block, reach, by_block);
    case 2: return round_some<2>(a, x, block, reach, by_block);
    case 1: return round_some<1>(a, x, block, reach, by_block);
  }
}

}  // namespace JAXLLM_ISA
}  // namespace jaxllm
