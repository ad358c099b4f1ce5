#include "products.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/GradMode.h>

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

bool wants_graph(const Tensor& t) { return c10::GradMode::is_enabled() && t.requires_grad(); }

// oneDNN's product has no derivative.
bool fits_onednn(const Tensor& a, const Tensor& b) {
  return cl::uses_onednn() && a.device().is_cpu() && a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat &&
         a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0) && a.numel() > 0 && b.numel() > 0 && !wants_graph(a) &&
         !wants_graph(b);
}

}  // namespace

namespace cl {

bool uses_onednn() { return choice().load(std::memory_order_relaxed); }

Tensor product(const Tensor& a, const Tensor& b) {
  if (!fits_onednn(a, b)) return at::mm(a, b);
  Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  at::native::mkldnn_matmul(a, b, out, /*beta=*/0, /*alpha=*/1);
  return out;
}

void add_product(Tensor& out, const Tensor& a, const Tensor& b) {
  if (fits_onednn(a, b) && !wants_graph(out)) {
    at::native::mkldnn_matmul(a, b, out, /*beta=*/1, /*alpha=*/1);
  } else {
    out.addmm_(a, b);
  }
}

}  // namespace cl

extern "C" int cl_has_onednn() { return has_onednn(); }

extern "C" int cl_uses_onednn() { return cl::uses_onednn(); }

extern "C" void cl_use_onednn(int on) { choice().store(on != 0 && has_onednn(), std::memory_order_relaxed); }
