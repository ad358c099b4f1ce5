#include "products.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <atomic>

#include "dtype.h"
#include "guard.h"
#include "kernels.h"
#include "parallel.h"

using at::Tensor;

// oneDNN's product of dense matrices: `result = beta · result + alpha · a·b`. libtorch itself uses it for half
// precision only, and MKL for f32, which does not use the widest vectors of non-Intel processors. Builds of libtorch
// without oneDNN lack this function, so the symbol is weak and the shim also links against them.
namespace at::native {
__attribute__((weak)) void mkldnn_matmul(const Tensor& a, const Tensor& b, const Tensor& result, float beta, float alpha);
}

namespace {

bool has_onednn() { return &at::native::mkldnn_matmul != nullptr && at::globalContext().userEnabledMkldnn(); }

// MKL has kernels for every vector width on Intel's processors, but uses only 256 bits on others. There, oneDNN is
// faster if the processor has 512-bit vectors.
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

// Whether the processor lacks instructions for bf16 products. Libraries then convert in their innermost loops, at a
// fifth of the rate of f32.
bool emulates_bf16() {
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
  static const bool emulates = (__builtin_cpu_init(), !__builtin_cpu_supports("avx512bf16"));
  return emulates;
#else
  return false;
#endif
}

bool wants_graph(const Tensor& t) { return c10::GradMode::is_enabled() && t.requires_grad(); }

// Whether oneDNN can compute a·b. Its product has no derivative.
bool fits_onednn(const Tensor& a, const Tensor& b) {
  return choice().load(std::memory_order_relaxed) && a.device().is_cpu() && a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat &&
         a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0) && a.numel() > 0 && b.numel() > 0 && !wants_graph(a) &&
         !wants_graph(b);
}

// out = a·b, or out += a·b, for bf16, rounded once. Computed for one block of columns of b at a time, because the
// weights of an output head can be large.
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

// Whether a·b is a product of few rows with the transpose of a row-major matrix, as in a linear layer. Libraries are
// optimized for many rows and do not reach the memory bandwidth for the weights. If the processor has bf16
// instructions, bf16 products are left to the libraries; if not, the alternatives convert all weights for any number of
// rows.
bool has_few_rows(const Tensor& a, const Tensor& b) {
  constexpr int64_t kDeep = 64;  // each dot product ends with a horizontal sum of its vector
  if (!cl::has_kernels(a) || !b.device().is_cpu() || a.scalar_type() != b.scalar_type() || a.dim() != 2 || b.dim() != 2 ||
      a.size(1) != b.size(0) || wants_graph(a) || wants_graph(b)) {
    return false;
  }
  if (cl::is_bf16(a) && !emulates_bf16()) return false;
  const int64_t most = cl::kernels().few_rows * (cl::is_bf16(a) ? 3 : 1);
  return a.size(0) > 0 && a.size(0) <= most && a.size(1) >= kDeep && b.size(1) > 0 && b.stride(0) == 1 && b.stride(1) == b.size(0);
}

// The product in f32.
Tensor product_of_few_rows(const Tensor& a, const Tensor& b) {
  constexpr int64_t kPaid = 1 << 16;  // multiplications that make another thread worthwhile
  const Tensor x = a.to(at::kFloat).contiguous();
  const int64_t rows = a.size(0), depth = a.size(1), columns = b.size(1);
  Tensor y = at::empty({rows, columns}, x.options());
  const int64_t grain = (kPaid / (rows * depth) + 4) / 4 * 4;
  cl::with_type(b, [&](auto* t) {
    using T = cl::Pointee<decltype(t)>;
    const float* from = cl::data<float>(x);
    const T* weight = cl::data<T>(b);
    float* to = cl::data<float>(y);
    cl::over_ranges(columns, grain, [&](int64_t first, int64_t end) {
      cl::loops<T>().dot_rows(rows, end - first, depth, from, weight + first * depth, to + first, columns);
    });
  });
  return y;
}

// Whether a·b in bf16 is faster when computed in f32, including conversions. Their number is that of the elements of
// all three matrices, so they pay off if each element takes part in many multiplications.
bool is_quicker_in_f32(const Tensor& a, const Tensor& b) {
  constexpr double kPaid = 16;
  if (!emulates_bf16() || !a.device().is_cpu() || a.scalar_type() != at::kBFloat16 || b.scalar_type() != at::kBFloat16 ||
      a.dim() != 2 || b.dim() != 2 || a.size(1) != b.size(0) || wants_graph(a) || wants_graph(b)) {
    return false;
  }
  const double rows = (double)a.size(0), inner = (double)a.size(1), columns = (double)b.size(1);
  return rows * inner * columns > kPaid * (rows * inner + inner * columns + rows * columns);
}

}  // namespace

namespace cl {

Tensor product(const Tensor& a, const Tensor& b, const Tensor& bias) {
  if (has_few_rows(a, b)) {
    Tensor y = product_of_few_rows(a, b);
    if (bias.defined()) y.add_(bias);
    return y.to(a.scalar_type());
  }
  if (is_quicker_in_f32(a, b)) {
    Tensor y = bias.defined() ? bias.expand({a.size(0), b.size(1)}).contiguous() : at::empty({a.size(0), b.size(1)}, a.options());
    product_in_f32(y, a, b, /*add=*/bias.defined());
    return y;
  }
  if (fits_onednn(a, b)) {
    Tensor y = at::empty({a.size(0), b.size(1)}, a.options());
    at::native::mkldnn_matmul(a, b, y, /*beta=*/0, /*alpha=*/1);
    return bias.defined() ? y.add_(bias) : y;
  }
  return bias.defined() ? at::addmm(bias, a, b) : at::mm(a, b);
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

extern "C" int cl_uses_onednn() { return choice().load(std::memory_order_relaxed); }

extern "C" int cl_emulates_bf16() { return emulates_bf16(); }

extern "C" void cl_use_onednn(int on) { choice().store(on != 0 && has_onednn(), std::memory_order_relaxed); }
