// The vectors of an instruction set. Compiled once for each: JAXLLM_ISA is its namespace.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

// Loops over registers: left as loops, their arrays would live in memory.
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace jaxllm {
namespace JAXLLM_ISA {

#if defined(__AVX512VNNI__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Float = float __attribute__((vector_size(4 * kLanes)));
using Int = int32_t __attribute__((vector_size(4 * kLanes)));
using Bits = uint32_t __attribute__((vector_size(4 * kLanes)));

inline Float fill(float x) { return Float{} + x; }
inline Int fill(int32_t x) { return Int{} + x; }
inline Float to_float(Int x) { return __builtin_convertvector(x, Float); }

template <typename V, typename T>
inline V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

inline Float load(const float* p) { return load_as<Float>(p); }
inline Int load(const int32_t* p) { return load_as<Int>(p); }

inline Float load(const bfloat16* p) {
#if defined(__AVX512VNNI__)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Float>(_mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return reinterpret_cast<Float>(_mm256_slli_epi32(wide, 16));
#else
  using Half = uint16_t __attribute__((vector_size(2 * kLanes)));
  return reinterpret_cast<Float>(__builtin_convertvector(load_as<Half>(p), Bits) << 16);
#endif
}

inline Int load_int(const int8_t* p) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Int>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Int>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  using Byte = int8_t __attribute__((vector_size(kLanes)));
  return __builtin_convertvector(load_as<Byte>(p), Int);
#endif
}

inline Float load(const int8_t* p) { return to_float(load_int(p)); }

// Two int8 to each lane, as int16.
inline Int load_pairs(const int8_t* p) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Int>(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Int>(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  using Byte = int8_t __attribute__((vector_size(2 * kLanes)));
  using Word = int16_t __attribute__((vector_size(4 * kLanes)));
  return reinterpret_cast<Int>(__builtin_convertvector(load_as<Byte>(p), Word));
#endif
}

// sum + a's products with b: of lanes that are two int16 each, both of which are added.
inline Int add_pairs(Int sum, Int a, Int b) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Int>(_mm512_dpwssd_epi32(
      reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return sum + reinterpret_cast<Int>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  const auto low = [](Int x) { return reinterpret_cast<Int>(reinterpret_cast<Bits>(x) << 16) >> 16; };
  return sum + low(a) * low(b) + (a >> 16) * (b >> 16);
#endif
}

inline void store(float* p, Float x) { std::memcpy(p, &x, sizeof x); }
inline void store(int32_t* p, Int x) { std::memcpy(p, &x, sizeof x); }

// The lower bytes of integers.
inline void store_bytes(int8_t* p, Int x) {
#if defined(__AVX512VNNI__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(x)));
#else
  UNROLL
  for (int lane = 0; lane < kLanes; ++lane) p[lane] = static_cast<int8_t>(x[lane]);
#endif
}

// A bit for each lane: whether it is other than 0.
inline unsigned nonzero(Int x) {
#if defined(__AVX512VNNI__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(x));
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(x != 0));
#else
  unsigned bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<unsigned>(x[lane] != 0) << lane;
  return bits;
#endif
}

// A function that multiplies bfloat16: for processors that do, of those that the file is compiled for.
#if defined(__AVX512VNNI__)
#define JAXLLM_HALVES __attribute__((target("avx512bf16")))
#endif

using jaxllm::to_float;
inline Float to_float(Float x) { return x; }
inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
// y[at:at + count] of type float or bfloat16, with `add` at the same place, of the same type, unless that is null.
inline void store_results(void* y, const void* add, bool is_bfloat16, int64_t at, const float* x, int64_t count) {
  if (is_bfloat16) {
    auto* to = static_cast<bfloat16*>(y) + at;
    const auto* more = static_cast<const bfloat16*>(add) + at;
    if (add == nullptr)
      for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(x[i]);
    else
      for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(x[i] + to_float(more[i]));
  } else {
    auto* to = static_cast<float*>(y) + at;
    const auto* more = static_cast<const float*>(add) + at;
    if (add == nullptr)
      std::memcpy(to, x, count * sizeof(float));
    else
      for (int64_t i = 0; i < count; ++i) to[i] = x[i] + more[i];
  }
}

inline float sum(Float x) {
#if defined(__AVX512VNNI__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x));
#endif
  float lanes[kLanes];
  std::memcpy(lanes, &x, sizeof x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

inline Float larger(Float a, Float b) { return a > b ? a : b; }

inline int32_t sum(Int x) {
#if defined(__AVX512VNNI__)
  return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(x));
#endif
  int32_t y = x[0];
  for (int lane = 1; lane < kLanes; ++lane) y += x[lane];
  return y;
}

// The sums of four vectors of floats or integers, at y[0:4].
template <typename V>
inline void sums_of_four(V a, V b, V c, V d, float* y) {
#if defined(__AVX512VNNI__)
  const auto low = [](V x, V y) { return (V)_mm512_unpacklo_ps((__m512)x, (__m512)y); };
  const auto high = [](V x, V y) { return (V)_mm512_unpackhi_ps((__m512)x, (__m512)y); };
  const V ab = low(a, b) + high(a, b), cd = low(c, d) + high(c, d);
  const V quarters = (V)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd) + (V)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
  const V halves = quarters + (V)_mm512_shuffle_f32x4((__m512)quarters, (__m512)quarters, 0x4E);
  const V whole = halves + (V)_mm512_shuffle_f32x4((__m512)halves, (__m512)halves, 0xB1);
  _mm_storeu_ps(y, _mm512_castps512_ps128((__m512)to_float(whole)));
#elif defined(__AVX2__)
  const auto low = [](V x, V y) { return (V)_mm256_unpacklo_ps((__m256)x, (__m256)y); };
  const auto high = [](V x, V y) { return (V)_mm256_unpackhi_ps((__m256)x, (__m256)y); };
  const V ab = low(a, b) + high(a, b), cd = low(c, d) + high(c, d);
  const V halves = (V)_mm256_unpacklo_pd((__m256d)ab, (__m256d)cd) + (V)_mm256_unpackhi_pd((__m256d)ab, (__m256d)cd);
  const V whole = halves + (V)_mm256_permute2f128_ps((__m256)halves, (__m256)halves, 1);
  _mm_storeu_ps(y, _mm256_castps256_ps128((__m256)to_float(whole)));
#else
  y[0] = sum(a), y[1] = sum(b), y[2] = sum(c), y[3] = sum(d);
#endif
}

// The same of four, which one instruction each converts.
inline void store_four_results(void* y, const void* add, bool is_bfloat16, int64_t at, const float* x) {
  using Floats = float __attribute__((vector_size(16)));
  using Words = uint32_t __attribute__((vector_size(16)));
  using Halves = uint16_t __attribute__((vector_size(8)));
  auto sums = load_as<Floats>(x);
  if (is_bfloat16) {
    auto* to = static_cast<bfloat16*>(y) + at;
    if (add != nullptr) {
      const Words more = __builtin_convertvector(load_as<Halves>(static_cast<const bfloat16*>(add) + at), Words) << 16;
      sums += reinterpret_cast<Floats>(more);
    }
    const Words bits = reinterpret_cast<Words>(sums);
    const Words rounded = sums == sums ? bits + 0x7FFF + (bits >> 16 & 1) : bits | 0x400000;
    const Halves halves = __builtin_convertvector(rounded >> 16, Halves);
    std::memcpy(to, &halves, sizeof halves);
  } else {
    if (add != nullptr) sums += load_as<Floats>(static_cast<const float*>(add) + at);
    std::memcpy(static_cast<float*>(y) + at, &sums, sizeof sums);
  }
}

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds what is below 2^22 to an integer, ties to even

// To the nearest, ties to even, of what is below 2^22 in magnitude.
inline Int to_int(Float x) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Int>(_mm512_cvtps_epi32(reinterpret_cast<__m512>(x)));
#else
  return __builtin_convertvector((x + kMagic) - kMagic, Int);
#endif
}

inline void store_words(int16_t* p, Float x) {
  using Word = int16_t __attribute__((vector_size(2 * kLanes)));
  const Word words = __builtin_convertvector(to_int(x), Word);
  std::memcpy(p, &words, sizeof words);
}

inline float highest(Float x) {
#if defined(__AVX512VNNI__)
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(x));
#endif
  float y = x[0];
  for (int lane = 1; lane < kLanes; ++lane) y = x[lane] > y ? x[lane] : y;
  return y;
}

// exp(x) for x <= 0, of relative error 2e-7; 0 below -87. Cody & Waite's reduction and the polynomial of degree 5 that is
// 1 at 0 and of the least relative error over |r| <= ln 2 / 2.
inline Float exp_negative(Float x) {
  const Float n = (x * 1.44269504f + kMagic) - kMagic;
  const Float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Float y = fill(0.008290315f);
  y = y * r + 0.04189793f;
  y = y * r + 0.16667636f;
  y = y * r + 0.4999915f;
  y = y * r + 0.9999997f;
  y = y * r + 1.0f;
#if defined(__AVX512VNNI__)
  const __mmask16 kept = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  return reinterpret_cast<Float>(
      _mm512_maskz_scalef_ps(kept, reinterpret_cast<__m512>(y), reinterpret_cast<__m512>(n)));
#else
  const Int bits = (__builtin_convertvector(n, Int) + 127) << 23;
  return x < -87.0f ? Float{} : y * reinterpret_cast<Float>(bits);
#endif
}

}  // namespace JAXLLM_ISA
}  // namespace jaxllm
