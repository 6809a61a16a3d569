// What comes before a matmul, in float32, and after the last one.

#pragma once

#include "kernels.h"
#include "simd.h"

namespace jaxllm {
namespace JAXLLM_ISA {

inline float load_one(const void* p, bool is_bfloat16, int64_t at) {
  return is_bfloat16 ? to_float(static_cast<const bfloat16*>(p)[at]) : static_cast<const float*>(p)[at];
}

inline Float load_some(const void* p, bool is_bfloat16, int64_t at) {
  return is_bfloat16 ? load(static_cast<const bfloat16*>(p) + at) : load(static_cast<const float*>(p) + at);
}

inline Float silu(Float x) {
  const Float small = exp_negative(x > 0.0f ? -x : x);  // of what is far from 0 nothing overflows
  return x * (x > 0.0f ? fill(1.0f) : small) / (1.0f + small);
}

inline void activate(const Inputs& in, int64_t m, int64_t K, float* x) {
  const int64_t row = m * K;
  const int64_t whole = K / kLanes * kLanes;
  const auto of = [&](int64_t k) { return load_some(in.x, in.bfloat16_x, row + k); };
  switch (in.before) {
    case Before::kNothing:
      for (int64_t k = 0; k < whole; k += kLanes) store(x + k, of(k));
      for (int64_t k = whole; k < K; ++k) x[k] = load_one(in.x, in.bfloat16_x, row + k);
      return;
    case Before::kNorm: {  // Zhang & Sennrich 2019
      Float squares{};
      for (int64_t k = 0; k < whole; k += kLanes) squares += of(k) * of(k);
      float total = sum(squares);
      for (int64_t k = whole; k < K; ++k) {
        const float one = load_one(in.x, in.bfloat16_x, row + k);
        total += one * one;
      }
      const float factor = 1.0f / std::sqrt(total / static_cast<float>(K) + in.eps);
      for (int64_t k = 0; k < whole; k += kLanes)
        store(x + k, of(k) * factor * load_some(in.other, in.bfloat16_other, k));
      for (int64_t k = whole; k < K; ++k)
        x[k] = load_one(in.x, in.bfloat16_x, row + k) * factor * load_one(in.other, in.bfloat16_other, k);
      return;
    }
    case Before::kGate: {  // Shazeer 2020
      for (int64_t k = 0; k < whole; k += kLanes)
        store(x + k, silu(of(k)) * load_some(in.other, in.bfloat16_other, row + k));
      for (int64_t k = whole; k < K; ++k)
        x[k] = silu(fill(load_one(in.x, in.bfloat16_x, row + k)))[0] * load_one(in.other, in.bfloat16_other, row + k);
      return;
    }
  }
}

inline void take(const Weight& w, int64_t n, float* y) {
  if (w.type == Type::kFloat32) {
    std::memcpy(y, static_cast<const float*>(w.values) + n * w.K, w.K * sizeof(float));
    return;
  }
  if (w.type == Type::kBfloat16) {
    for (int64_t k = 0; k < w.K; ++k) y[k] = to_float(static_cast<const bfloat16*>(w.values)[n * w.K + k]);
    return;
  }
  const bool is_int4 = w.type == Type::kInt4;
  const int64_t panel = n / kPanel, lane = n % kPanel, group = w.K / w.G;
  const uint8_t* values = static_cast<const uint8_t*>(w.values) + panel * kPanel * (is_int4 ? w.K / 2 : w.K);
  for (int64_t k = 0; k < w.K; ++k) {
    const int64_t at = (panel * w.G + k / group) * kPanel + lane;
    const uint8_t byte = values[((is_int4 ? k / 8 : k / 4) * kPanel + lane) * 4 + k % 4];
    const int value = !is_int4 ? static_cast<int8_t>(byte) : (k % 8 < 4 ? byte & 15 : byte >> 4) - 8;
    y[k] = (value - (w.zero_point == nullptr ? 0 : w.zero_point[at])) * load_one(w.scale, w.bfloat16_scale, at);
  }
}

inline int64_t likeliest(const float* x, int64_t count) {
  int64_t i = 0;
  Float best = fill(-INFINITY);
  for (; i + kLanes <= count; i += kLanes) best = larger(load(x + i), best);
  float top = highest(best);
  for (; i < count; ++i) top = x[i] > top ? x[i] : top;
  for (int64_t at = 0; at < count; ++at)
    if (x[at] == top) return at;
  return 0;  // nothing but NaN
}

}  // namespace JAXLLM_ISA
}  // namespace jaxllm
