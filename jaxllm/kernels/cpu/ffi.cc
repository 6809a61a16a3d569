// The handlers that XLA calls.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernels.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxllm {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kKernels;
}
#endif
namespace portable {
extern const Kernels kKernels;
}

namespace {

constexpr int64_t kUnit = 2 * kPanel;      // rows of a weight
constexpr int64_t kFewRows = 4;            // of activations
constexpr int64_t kRowsToShare = 8;        // of activations, to prepare
// How far one int8 of an activation reaches, in means of its row's magnitudes, for int8 weights. The perplexity of
// SmolLM2-135M over 49 x 512 tokens is 38.487 with exact activations, 38.517 so, and 38.527 with 4. A model of int4
// weights is disturbed three times as much: there all activations have 16 bits.
constexpr float kReach = 3.5f;
constexpr int64_t kPieceSlots = 128;       // of a cache, at least
constexpr int64_t kPiecesOfThread = 8;     // so many that no thread waits long for another
constexpr int64_t kTileRows = 48;          // queries times heads

#if defined(__aarch64__) && defined(__linux__)
bool has_dot_product() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#elif defined(__aarch64__)
bool has_dot_product() { return true; }  // Apple's all have it
#endif

// The best that this processor has, or less if that is wanted; "" for the best.
const Kernels* choose(const std::string& wanted) {
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const auto variant = [](const char* name, decltype(Kernels::halve) halve) {
    Kernels kernels = avx512::kKernels;
    kernels.name = name, kernels.halve = halve;
    return kernels;
  };
  static const Kernels with = variant("avx512bf16", avx512::kKernels.halve), without = variant("avx512", nullptr);
  const bool best = wanted.empty() || wanted == with.name;
  if (avx512 && best && __builtin_cpu_supports("avx512bf16")) return &with;
  if (avx512 && (best || wanted == without.name)) return &without;
  if (avx2 && wanted != portable::kKernels.name) return &avx2::kKernels;
#elif defined(__aarch64__)
  if (has_dot_product() && wanted != "portable") return &neon::kKernels;
#endif
  return &portable::kKernels;
}

const char* variable(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : value;
}

std::atomic<const Kernels*>& in_use() {
  static std::atomic<const Kernels*> kernels{choose(variable("JAXLLM_ISA", ""))};
  return kernels;
}

const Kernels& kernels() { return *in_use().load(std::memory_order_relaxed); }

Team& team() {
  // Never destroyed: a helper may look out for work while the process ends.
  static Team& made = *new Team([] {
    const int wanted = std::atoi(variable("JAXLLM_THREADS", "0"));
    return std::max(wanted > 0 ? wanted : static_cast<int>(std::thread::hardware_concurrency()), 1) - 1;
  }());
  return made;
}

// A float32 buffer as it is, or a bfloat16 one widened into `room`.
const float* as_float32(const ffi::AnyBuffer& x, std::vector<float>& room) {
  if (x.element_type() == ffi::F32) return static_cast<const float*>(x.untyped_data());
  const auto* from = static_cast<const bfloat16*>(x.untyped_data());
  room.resize(x.element_count());
  for (size_t i = 0; i < room.size(); ++i) room[i] = to_float(from[i]);
  return room.data();
}

bool is_bfloat16(const ffi::AnyBuffer& x) { return x.element_type() == ffi::BF16; }

// A weight from `count` arguments: its values; with 2, a scale; with 3, a zero point too.
bool describe(const ffi::RemainingArgs& args, size_t at, int64_t count, int64_t K, Weight& w) {
  const ffi::AnyBuffer values = *args.get<ffi::AnyBuffer>(at);
  w.values = values.untyped_data(), w.K = K, w.G = 1;
  switch (values.element_type()) {
    case ffi::F32: w.type = Type::kFloat32; break;
    case ffi::BF16: w.type = Type::kBfloat16; break;
    case ffi::S8: w.type = Type::kInt8; break;
    case ffi::U8: w.type = Type::kInt4; break;
    default: return false;
  }
  if (count > 1) {
    const ffi::AnyBuffer scale = *args.get<ffi::AnyBuffer>(at + 1);
    w.scale = scale.untyped_data(), w.bfloat16_scale = is_bfloat16(scale), w.G = scale.dimensions()[1];
  }
  if (count > 2) w.zero_point = static_cast<const int8_t*>(args.get<ffi::AnyBuffer>(at + 2)->untyped_data());
  return true;
}

const ffi::Error kWrongType = ffi::Error::InvalidArgument("jaxllm's weights are f32, bf16, s8 or u8");

// Activations times each of several weights. The arguments:
//   x [M, K]
//   what comes before the matmul, as `before` says: "norm": its weight [K]; "gate": the other factor [M, K]
//   where `add`: what is added to the one result [M, N]
//   where `inputs` is "static": the step that activations are rounded with
//   for each weight as many as `buffers` says: see `describe`; not both int8 and int4
// and for each weight a result [M, N]. inputs: how activations are rounded for quantised weights: "float" to an int8
// and a second for what is beyond it, or for all where weights are int4; "dynamic" and "static" to one.
ffi::Error matmul(ffi::RemainingArgs args, std::string_view before, float eps, bool add, std::string_view inputs,
                  ffi::Span<const int32_t> buffers, ffi::RemainingRets results) {
  thread_local std::vector<float> activations, pairs, steps;
  thread_local std::vector<bfloat16> halves;
  thread_local std::vector<int8_t> rounded;
  thread_local std::vector<int32_t> integers;
  thread_local std::vector<Weight> weights;
  size_t at = 0;
  const auto next = [&] { return *args.get<ffi::AnyBuffer>(at++); };

  const ffi::AnyBuffer x = next();
  Activations a{};
  a.M = x.dimensions()[0], a.K = x.dimensions()[1];
  Inputs in{Before::kNothing, x.untyped_data(), is_bfloat16(x), nullptr, false, eps};
  if (before != "nothing") {
    const ffi::AnyBuffer other = next();
    in.before = before == "norm" ? Before::kNorm : Before::kGate;
    in.other = other.untyped_data(), in.bfloat16_other = is_bfloat16(other);
  }
  const void* added = add ? next().untyped_data() : nullptr;
  const float fixed = inputs == "static" ? *static_cast<const float*>(next().untyped_data()) : 0.0f;

  bool dense = false, quantised = false, paired = false, grouped = false, int4 = false;
  weights.clear();
  for (size_t i = 0; i < buffers.size(); ++i) {
    auto y = *results.get<ffi::AnyBuffer>(i);
    Weight w{};
    if (!describe(args, at, buffers[i], a.K, w)) return kWrongType;
    w.N = y->dimensions()[1], w.add = added, w.y = y->untyped_data(), w.bfloat16_y = is_bfloat16(*y);
    at += buffers[i];
    int4 |= w.type == Type::kInt4;
    grouped |= w.G > 1;
    quantised |= w.scale != nullptr, dense |= w.scale == nullptr, paired |= w.type == Type::kBfloat16;
    weights.push_back(w);
  }

  // Row by row: float32, then rounded.
  const bool as_is = in.before == Before::kNothing && !in.bfloat16_x, two = inputs == "float";
  const int64_t blocks = a.K / kBlock + 1, together = (a.M + kTogether - 1) / kTogether;
  if (!as_is && dense) activations.resize(a.M * a.K);
  const bool halved = paired && in.bfloat16_x && kernels().halve != nullptr;
  paired &= !halved;
  if (paired) pairs.resize(a.M * a.K);
  if (halved) halves.resize(a.M * a.K);
  if (quantised) {
    steps.resize(a.M), rounded.resize(2 * a.M * a.K);
    integers.resize(2 * a.M * blocks + together * (a.K / 4 + blocks));
  }
  a.x = as_is ? static_cast<const float*>(in.x) : activations.data();
  a.pairs = pairs.data(), a.halves = halved ? halves.data() : nullptr, a.step = steps.data();
  a.low = rounded.data(), a.high = two ? a.low + a.M * a.K : nullptr;
  a.low_sums = integers.data(), a.high_sums = a.low_sums + a.M * blocks;
  a.beyond = a.high_sums + a.M * blocks, a.beyond_first = a.beyond + together * (a.K / 4);
  const auto prepare = [&, all = activations.data(), pairs = pairs.data(), halves = halves.data()](int64_t block) {
    thread_local std::vector<float> room;
    const int64_t first = block * kTogether, last = std::min(first + kTogether, a.M);
    if (!as_is && !dense) room.resize(kTogether * a.K);
    float* const made = as_is ? nullptr : dense ? all + first * a.K : room.data();
    const float* const x = as_is ? a.x + first * a.K : made;
    for (int64_t m = first; m < last; ++m) {
      if (!as_is) kernels().activate(in, m, a.K, made + (m - first) * a.K);
      if (paired) kernels().pair(x + (m - first) * a.K, a.K, pairs + m * a.K);
      if (halved) kernels().halve(x + (m - first) * a.K, a.K, halves + m * a.K);
      if (quantised) a.step[m] = fixed;
    }
    if (quantised) kernels().round(a, x, block, int4 ? 0 : kReach, grouped);
  };
  if (a.M < kRowsToShare)
    for (int64_t block = 0; block < together; ++block) prepare(block);
  else
    team().run(together, prepare);

  // Units of rows of all weights, one after the other, are cut into pieces. With few activations memory sets the pace,
  // and it is read fastest in long runs: two for each thread, the second for whoever is first done with its own.
  thread_local std::vector<int64_t> ends;
  ends.clear();
  int64_t units = 0;
  for (const Weight& w : weights) ends.push_back(units += (w.N + kUnit - 1) / kUnit);
  const int64_t threads = team().size();
  const int64_t pieces = std::min(units, (a.M <= kFewRows ? 2 : 16) * threads);
  team().run(pieces, [&, weights = weights.data(), ends = ends.data(), count = weights.size()](int64_t claimed) {
    const int64_t piece = pieces != 2 * threads ? claimed : claimed < threads ? 2 * claimed : 2 * (claimed - threads) + 1;
    const int64_t first = units * piece / pieces, last = units * (piece + 1) / pieces;
    for (size_t i = 0; i < count; ++i) {
      const int64_t begin = i == 0 ? 0 : ends[i - 1];
      const int64_t from = std::max(first, begin) - begin, to = std::min(last, ends[i]) - begin;
      if (from < to) kernels().matmul(a, weights[i], from * kUnit, std::min(weights[i].N, to * kUnit));
    }
  });
  return ffi::Error::Success();
}

// Rotary position embedding (Su et al. 2021) of one head, whose two halves are pairs.
void rotate(const float* x, const float* cos, const float* sin, int64_t half, float* y) {
  for (int64_t h = 0; h < half; ++h) {
    const float a = x[h], b = x[half + h];
    y[h] = a * cos[h] - b * sin[h];
    y[half + h] = b * cos[h] + a * sin[h];
  }
}

// One head of one slot of a cache of its type; of int8 with its scale.
void put(const float* x, int64_t H, Type type, void* values, float* scales, int64_t slot) {
  switch (type) {
    case Type::kFloat32: std::memcpy(static_cast<float*>(values) + slot * H, x, H * sizeof(float)); return;
    case Type::kBfloat16:
      for (int64_t h = 0; h < H; ++h) static_cast<bfloat16*>(values)[slot * H + h] = to_bfloat16(x[h]);
      return;
    default: {
      float absmax = 0;
      for (int64_t h = 0; h < H; ++h) absmax = !(std::fabs(x[h]) <= absmax) ? std::fabs(x[h]) : absmax;  // a NaN stays
      const float scale = scales[slot] = absmax == 0 ? 1.0f : absmax / 127.0f;
      int8_t* to = static_cast<int8_t*>(values) + slot * H;
      constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23, as in simd.h: adding it rounds to the nearest, ties to even
      for (int64_t h = 0; h < H; ++h) {
        const float whole = (x[h] / scale + kMagic) - kMagic;
        to[h] = static_cast<int8_t>(whole == whole ? static_cast<int32_t>(whole) : 0);
      }
    }
  }
}

// Rotates queries and keys, puts keys and values into their slots of the cache, and attends to it. The arguments:
//   q [B, T, N, H], k and v [B, T, K, H], positions [B, T], cos and sin [B, T, H / 2]
//   the cache, which is updated in place: keys and values [B, K, S, H], of int8 with scales [B, K, S] of each
// and the results: y [B, T, N, H] and the cache. Slots outside of the cache are left out.
ffi::Error attend(ffi::AnyBuffer q, ffi::AnyBuffer new_k, ffi::AnyBuffer new_v, ffi::Buffer<ffi::S32> positions,
                  ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin, ffi::RemainingArgs, int64_t window,
                  ffi::Result<ffi::AnyBuffer> y, ffi::RemainingRets cache) {
  thread_local std::vector<float> q_room, k_room, v_room, rotated_q, y_room, highest, total, part_y;
  Attention a{};
  a.B = q.dimensions()[0], a.T = q.dimensions()[1], a.N = q.dimensions()[2], a.H = q.dimensions()[3];
  auto k = *cache.get<ffi::AnyBuffer>(0);
  auto v = *cache.get<ffi::AnyBuffer>(1);
  a.K = k->dimensions()[1], a.S = k->dimensions()[2];
  a.cache = k->element_type() == ffi::F32 ? Type::kFloat32 : is_bfloat16(*k) ? Type::kBfloat16 : Type::kInt8;
  a.positions = positions.typed_data(), a.window = window;
  a.k = k->untyped_data(), a.v = v->untyped_data();
  float *k_scale = nullptr, *v_scale = nullptr;
  if (cache.size() == 4) {
    k_scale = static_cast<float*>((*cache.get<ffi::AnyBuffer>(2))->untyped_data());
    v_scale = static_cast<float*>((*cache.get<ffi::AnyBuffer>(3))->untyped_data());
  }
  a.k_scale = k_scale, a.v_scale = v_scale;

  const float *from_q = as_float32(q, q_room), *from_k = as_float32(new_k, k_room), *from_v = as_float32(new_v, v_room);
  rotated_q.resize(q.element_count());
  a.q = rotated_q.data();
  const auto place = [&, to_q = rotated_q.data()](int64_t bt) {
    const int64_t half = a.H / 2, b = bt / a.T, slot = a.positions[bt];
    const float *c = cos.typed_data() + bt * half, *s = sin.typed_data() + bt * half;
    for (int64_t n = 0; n < a.N; ++n) {
      const int64_t at = (bt * a.N + n) * a.H;
      rotate(from_q + at, c, s, half, to_q + at);
    }
    if (slot < 0 || slot >= a.S) return;
    thread_local std::vector<float> head;
    head.resize(a.H);
    for (int64_t h = 0; h < a.K; ++h) {
      const int64_t at = (bt * a.K + h) * a.H, to = (b * a.K + h) * a.S + slot;
      rotate(from_k + at, c, s, half, head.data());
      put(head.data(), a.H, a.cache, k->untyped_data(), k_scale, to);
      put(from_v + at, a.H, a.cache, v->untyped_data(), v_scale, to);
    }
  };
  if (a.B * a.T < kRowsToShare)
    for (int64_t bt = 0; bt < a.B * a.T; ++bt) place(bt);
  else
    team().run(a.B * a.T, place);

  // Of one query each, long rows are cut into pieces of slots where there are few rows; of many, into tiles of queries.
  const int64_t G = a.N / a.K, tile = a.T == 1 ? 1 : std::max<int64_t>(1, kTileRows / G);
  const int64_t tiles = (a.T + tile - 1) / tile, enough = kPiecesOfThread * team().size();
  int64_t longest = 1;
  for (int64_t b = 0; b < a.B; ++b) longest = std::max<int64_t>(longest, a.positions[b * a.T + a.T - 1] + 1);
  longest = std::min(longest, a.S);
  const auto parts = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
  const int64_t wanted = a.T == 1 ? std::min(parts(longest, kPieceSlots), parts(enough, a.B * a.K)) : 1;
  const int64_t slots = parts(parts(longest, wanted), kPieceSlots) * kPieceSlots, cuts = parts(longest, slots);
  const int64_t pieces = a.B * a.K * tiles * cuts, part = tile * G;
  highest.resize(pieces * part), total.resize(pieces * part), part_y.resize(pieces * part * a.H);
  const bool direct = y->element_type() == ffi::F32;
  if (!direct) y_room.resize(y->element_count());
  float* out = direct ? static_cast<float*>(y->untyped_data()) : y_room.data();

  struct Room {
    float *highest, *total, *y;
  } const room{highest.data(), total.data(), part_y.data()};
  const auto at = [&](int64_t piece) {
    Piece p{};
    p.first = piece % cuts * slots, piece /= cuts;
    p.k = piece % a.K, piece /= a.K;
    p.b = piece % a.B, piece /= a.B;
    p.t = (tiles - 1 - piece) * tile;  // the longest first
    p.count = std::min(tile, a.T - p.t);
    const int32_t* of = a.positions + p.b * a.T + p.t;
    p.last = std::min(p.first + slots, std::clamp<int64_t>(of[p.count - 1] + 1, 0, a.S));
    if (a.window > 0) p.first = std::max<int64_t>(p.first, of[0] + 1 - a.window);
    return p;
  };
  const auto finish = [&](int64_t whole) {  // joins the cuts of a tile
    const Piece p = at(whole * cuts);
    for (int64_t r = 0; r < p.count * G; ++r) {
      float best = -INFINITY, sum = 0;
      for (int64_t c = 0; c < cuts; ++c) best = std::max(best, room.highest[(whole * cuts + c) * part + r]);
      float* to = out + ((p.b * a.T + p.t + r / G) * a.N + p.k * G + r % G) * a.H;
      std::fill(to, to + a.H, 0.0f);
      for (int64_t c = 0; c < cuts; ++c) {
        const int64_t from = (whole * cuts + c) * part + r;
        if (room.highest[from] == -INFINITY) continue;
        const float weight = std::exp(room.highest[from] - best);
        sum += room.total[from] * weight;
        for (int64_t h = 0; h < a.H; ++h) to[h] += weight * room.y[from * a.H + h];
      }
      for (int64_t h = 0; h < a.H; ++h) to[h] /= sum;
    }
  };
  // Threads take pieces in turns: as a rule, the next one is as many pieces ahead as there are threads.
  const int64_t turn = team().size();
  team().run(pieces, [&](int64_t piece) {
    const Piece here = at(piece), next = piece + turn < pieces ? at(piece + turn) : here;
    const Partial partial{room.highest + piece * part, room.total + piece * part, room.y + piece * part * a.H};
    kernels().attend(a, here, next, partial);
    if (cuts == 1) finish(piece);
  });
  if (cuts > 1) team().run(pieces / cuts, finish);
  if (!direct) {
    auto* to = static_cast<bfloat16*>(y->untyped_data());
    for (size_t i = 0; i < y_room.size(); ++i) to[i] = to_bfloat16(out[i]);
  }
  return ffi::Error::Success();
}

// Rows [M] of a weight, which the remaining arguments describe: [M, K]. Rows that it does not have are its first or last.
ffi::Error take(ffi::Buffer<ffi::S32> rows, ffi::RemainingArgs args, ffi::Result<ffi::AnyBuffer> y) {
  const int64_t M = y->dimensions()[0], K = y->dimensions()[1];
  Weight w{};
  if (!describe(args, 0, static_cast<int64_t>(args.size()), K, w)) return kWrongType;
  const auto dimensions = args.get<ffi::AnyBuffer>(0)->dimensions();
  const int64_t last = dimensions[0] * (w.scale == nullptr ? 1 : kPanel) - 1;
  team().run(M, [&](int64_t m) {
    thread_local std::vector<float> row;
    row.resize(K);
    const int64_t n = std::clamp<int64_t>(rows.typed_data()[m], 0, last);
    const bool direct = !is_bfloat16(*y);
    float* to = direct ? static_cast<float*>(y->untyped_data()) + m * K : row.data();
    kernels().take(w, n, to);
    if (!direct)
      for (int64_t k = 0; k < K; ++k) static_cast<bfloat16*>(y->untyped_data())[m * K + k] = to_bfloat16(row[k]);
  });
  return ffi::Error::Success();
}

// The first of the highest logits [B, V] of each row: [B].
ffi::Error likeliest(ffi::Buffer<ffi::F32> logits, ffi::ResultBuffer<ffi::S32> y) {
  const int64_t B = logits.dimensions()[0], V = logits.dimensions()[1];
  team().run(B, [&](int64_t b) {
    y->typed_data()[b] = static_cast<int32_t>(kernels().likeliest(logits.typed_data() + b * V, V));
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxllm

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxllmTake, jaxllm::take,
    ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::S32>>().RemainingArgs().Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxllmLikeliest, jaxllm::likeliest,
                              ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxllmMatmul, jaxllm::matmul,
                              ffi::Ffi::Bind()
                                  .RemainingArgs()
                                  .Attr<std::string_view>("before")
                                  .Attr<float>("eps")
                                  .Attr<bool>("add")
                                  .Attr<std::string_view>("inputs")
                                  .Attr<ffi::Span<const int32_t>>("buffers")
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxllmAttend, jaxllm::attend,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .Attr<int64_t>("window")
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets());

// Takes the kernels of an instruction set; "" for the best that there is. Tells which.
extern "C" const char* jaxllm_use(const char* isa) {
  jaxllm::in_use() = jaxllm::choose(isa);
  return jaxllm::kernels().name;
}

// The instruction set in use.
extern "C" const char* jaxllm_isa() { return jaxllm::kernels().name; }

#pragma GCC visibility pop
