// What is compiled for each instruction set, and called through a table that the processor at hand decides.

#pragma once

#include <cstdint>
#include <cstring>

namespace jaxllm {

constexpr int kPanel = 16;  // rows of a quantised weight that lie together
constexpr int kBlock = 32;  // values of a row that every group is a multiple of

enum class Type : int8_t { kFloat32, kBfloat16, kInt8, kInt4 };

struct bfloat16 {
  uint16_t bits;  // the upper half of a float's
};

// static: each file has its own, in instructions of its own.
static inline float to_float(bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

static inline bfloat16 to_bfloat16(float x) {  // to the nearest, ties to even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40)};
}

// Where activations come from: x as it is; x scaled to unit root mean square, times `other` [K]; or silu(x) * other.
enum class Before : int8_t { kNothing, kNorm, kGate };
struct Inputs {
  Before before;
  const void* x;  // [M, K]
  bool bfloat16_x;
  const void* other;  // [K] or [M, K]
  bool bfloat16_other;
  float eps;  // of the norm
};

// Activations [M, K] in float32 and, for quantised weights, rounded: x ≈ step * (low + kCoarse * high). With a step
// for the many, most values are `low` alone; the few beyond have a `high`, which is null where all are to be int8.
//
// Rows are taken kTogether at a time, the last ones fewer: four values of the first row of such a block, four of each
// other, the next four of the first, and so on. For each block, `beyond` lists the fours that have a high in any
// of its rows; those of values [32 i, 32 i + 32) are entries [beyond_first[i], beyond_first[i + 1]).
constexpr int kCoarse = 254;
constexpr int kTogether = 4;
struct Activations {
  int64_t M, K;
  const float* x;            // [M, K], where there are float weights
  const float* pairs;        // the same as `pair` lays it out, where bfloat16 weights have no `halves`
  const bfloat16* halves;    // the same in bfloat16, as they were given, where the processor multiplies that; or null
  float* step;               // [M]
  int8_t* low;               // [blocks of rows, K / 4, rows of the block, 4]
  int8_t* high;              // the same
  int32_t* low_sums;         // by blocks, where there are groups, and then of all: [M, K / kBlock + 1]
  int32_t* high_sums;
  int32_t* beyond;           // [blocks of rows, K / 4]
  int32_t* beyond_first;     // [blocks of rows, K / kBlock + 1]
};

// A weight [N, K] and where its product with the activations goes.
//
// Float: values [N, K]. Quantised: panels of 16 rows, the last filled up. In a panel, four values of a row lie beside
// those of the next row; of int4 it is four bytes, byte i of which has value i in its low half and value i + 4 in its
// high half, 8 added to each. scale and zero_point: [panel, G, 16], for each of G groups of K.
struct Weight {
  Type type;
  int64_t N, K, G;
  const void* values;
  const void* scale;
  bool bfloat16_scale;
  const int8_t* zero_point;  // or null
  const void* add;           // [M, N] of y's type, or null: is added to the product
  void* y;                   // [M, N]
  bool bfloat16_y;
};

// Causal attention of T queries a row over a cache that has their own keys and values already.
struct Attention {
  int64_t B, T, N, K, S, H;  // as in the design's names
  Type cache;                // kInt8 with scales
  const float* q;            // [B, T, N, H]
  const void* k;             // [B, K, S, H]
  const void* v;
  const float* k_scale;  // [B, K, S]
  const float* v_scale;
  const int32_t* positions;  // [B, T]
  int64_t window;            // how far back a query looks, itself included; 0: all the way
};

// Queries [t, t + count) of row b and the heads of one KV head, over slots [first, last).
struct Piece {
  int64_t b, k, t, count, first, last;
};

// What a piece gives for each query and head: the highest score, the sum of exp(score - highest), and the values
// weighted so: [count, N / K], the same, and [count, N / K, H].
struct Partial {
  float* highest;
  float* total;
  float* y;
};

struct Kernels {
  const char* name;
  // Row m of K activations.
  void (*activate)(const Inputs& in, int64_t m, int64_t K, float* x);
  // A row of K activations, laid out for bfloat16 weights.
  void (*pair)(const float* x, int64_t K, float* pairs);
  // The same in bfloat16; null where the processor does not multiply that.
  void (*halve)(const float* x, int64_t K, bfloat16* halves);
  // Rounds a block of rows [rows, K] of x. Where a row's step is 0 it is found: with high, low then reaches to `reach` times the
  // mean of the row's magnitudes, and of reach 0 all values have 16 bits. Sums: only those of all unless by_block.
  void (*round)(const Activations& a, const float* x, int64_t block, float reach, bool by_block);
  // Rows [first, last) of a weight; first is a multiple of kPanel.
  void (*matmul)(const Activations& x, const Weight& w, int64_t first, int64_t last);
  // Row n of a weight.
  void (*take)(const Weight& w, int64_t n, float* y);
  // Where the first of the highest of `count` is.
  int64_t (*likeliest)(const float* x, int64_t count);
  // next: the piece that the thread takes after this one, as a rule, whose first slots are asked for.
  void (*attend)(const Attention& a, const Piece& piece, const Piece& next, const Partial& out);
};

}  // namespace jaxllm
