// Compiled once for each instruction set: JAXLLM_ISA is its namespace and JAXLLM_NAME its name.

#include "activations.h"
#include "attention.h"
#include "dense.h"
#include "kernels.h"
#include "quantised.h"
#include "rounding.h"

namespace jaxllm {
namespace JAXLLM_ISA {
namespace {

void matmul(const Activations& x, const Weight& w, int64_t first, int64_t last) {
  switch (w.type) {
    case Type::kFloat32: return dense<float>(x, w, first, last);
    case Type::kBfloat16: return dense<bfloat16>(x, w, first, last);
    case Type::kInt8: return w.G == 1 ? quantised<false, false>(x, w, first, last) : quantised<false, true>(x, w, first, last);
    case Type::kInt4: return w.G == 1 ? quantised<true, false>(x, w, first, last) : quantised<true, true>(x, w, first, last);
  }
}

#if defined(JAXLLM_HALVES)
constexpr auto kHalve = halve;
#else
constexpr decltype(Kernels::halve) kHalve = nullptr;
#endif

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {JAXLLM_NAME, activate, pair, kHalve, round, matmul, take, likeliest, attend};

}  // namespace JAXLLM_ISA
}  // namespace jaxllm
