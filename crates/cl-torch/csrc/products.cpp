#include "products.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <atomic>

#include "guard.h"

using at::Tensor;

// oneDNN's product of dense matrices, for `result = beta · result + alpha · a·b`. libtorch itself calls it for half
// precision only and takes MKL for f32, which leaves the wide instructions of other makers' processors unused. Builds of
// libtorch without oneDNN do not have it: weak, so that the shim links against those as well.
namespace at::native {
__attribute__((weak)) void mkldnn_matmul(const Tensor& a, const Tensor& b, const Tensor& result, float beta, float alpha);
}

namespace {

bool has_onednn() { return &at::native::mkldnn_matmul != nullptr && at::globalContext().userEnabledMkldnn(); }

// MKL has kernels for every width of Intel's processors. Elsewhere it stays at 256 bits: there oneDNN is quicker where the
// processor has 512.
bool prefers_onednn() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

std::atomic<bool>& choice() {
  static std::atomic<bool> onednn{has_onednn() && prefers_onednn()};
  return onednn;
}

// Whether the processor has no instructions for products of bf16. Libraries then convert in their innermost loops, at a fifth of
// the rate of f32.
bool emulates_bf16() {
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
  static const bool emulates = (__builtin_cpu_init(), !__builtin_cpu_supports("avx512bf16"));
  return emulates;
#else
  return false;
#endif
}

bool wants_graph(const Tensor& t) { return c10::GradMode::is_enabled() && t.requires_grad(); }

// oneDNN's product has no derivative.
bool fits_onednn(const Tensor& a, const Tensor& b) {
  return cl::uses_onednn() && a.device().is_cpu() && a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat &&
         a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0) && a.numel() > 0 && b.numel() > 0 && !wants_graph(a) &&
         !wants_graph(b);
}

// out = a·b, or out + a·b, of bf16, rounded once. A block of b's columns at a time: the weights of a head can be large.
void product_in_f32(Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  constexpr int64_t kBlock = 1 << 24;
  const Tensor wide = a.to(at::kFloat);
  const int64_t step = std::max<int64_t>(1, kBlock / b.size(0));
  for (int64_t start = 0; start < b.size(1); start += step) {
    const int64_t length = std::min(step, b.size(1) - start);
    Tensor part = out.narrow(1, start, length), block = b.narrow(1, start, length).to(at::kFloat);
    if (add) {
      Tensor sum = part.to(at::kFloat);
      cl::add_product(sum, wide, block);
      part.copy_(sum);
    } else {
      part.copy_(cl::product(wide, block));
    }
  }
}

}  // namespace

namespace cl {

bool is_quicker_in_f32(const Tensor& a, const Tensor& b) {
  constexpr double kPaid = 16;
  if (!emulates_bf16() || !a.device().is_cpu() || a.scalar_type() != at::kBFloat16 || b.scalar_type() != at::kBFloat16 ||
      a.dim() != 2 || b.dim() != 2 || a.size(1) != b.size(0) || wants_graph(a) || wants_graph(b)) {
    return false;
  }
  const double rows = (double)a.size(0), inner = (double)a.size(1), columns = (double)b.size(1);
  return rows * inner * columns > kPaid * (rows * inner + inner * columns + rows * columns);
}

bool uses_onednn() { return choice().load(std::memory_order_relaxed); }

Tensor product(const Tensor& a, const Tensor& b) {
  const bool in_f32 = is_quicker_in_f32(a, b);
  if (!in_f32 && !fits_onednn(a, b)) return at::mm(a, b);
  Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  if (in_f32) {
    product_in_f32(out, a, b, /*add=*/false);
    return out;
  }
  at::native::mkldnn_matmul(a, b, out, /*beta=*/0, /*alpha=*/1);
  return out;
}

void add_product(Tensor& out, const Tensor& a, const Tensor& b) {
  if (is_quicker_in_f32(a, b) && !wants_graph(out)) {
    product_in_f32(out, a, b, /*add=*/true);
  } else if (fits_onednn(a, b) && !wants_graph(out)) {
    at::native::mkldnn_matmul(a, b, out, /*beta=*/1, /*alpha=*/1);
  } else {
    out.addmm_(a, b);
  }
}

}  // namespace cl

extern "C" int cl_has_onednn() { return has_onednn(); }

extern "C" int cl_uses_onednn() { return cl::uses_onednn(); }

extern "C" int cl_emulates_bf16() { return emulates_bf16(); }

extern "C" void cl_use_onednn(int on) { choice().store(on != 0 && has_onednn(), std::memory_order_relaxed); }
