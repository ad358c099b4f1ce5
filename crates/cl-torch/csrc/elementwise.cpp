// Fused elementwise operations of a decoder layer, on a CPU in f32 or bf16: one pass over memory in the forward pass
// and one in the backward pass. libtorch's operators take one pass for every step of the formula and keep the
// intermediate results for the backward pass.
//
// All arithmetic is in f32. Where libtorch's operators would round an intermediate result to bf16, the forward pass
// rounds as well; the backward pass rounds only once.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "dtype.h"
#include "guard.h"
#include "kernels.h"
#include "parallel.h"

using at::Tensor;
using cl::bf16;
using cl::data;
using cl::is_bf16;
using cl::Pointee;
using cl::with_type;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// Minimum number of elements per thread.
constexpr int64_t kGrain = 1 << 14;

template <class F>
void over_rows(int64_t rows, int64_t width, const F& body) {
  cl::over_ranges(rows, kGrain / std::max<int64_t>(1, width), body);
}

void no_second_derivative() {
  TORCH_CHECK(!c10::GradMode::is_enabled(), "this operator has no second derivative");
}

struct SiluMul : torch::autograd::Function<SiluMul> {
  static Tensor forward(AutogradContext* ctx, Tensor gate, Tensor up) {
    gate = gate.contiguous(), up = up.contiguous();
    Tensor y = at::empty_like(gate);
    with_type(gate, [&](auto* t) {
      using T = Pointee<decltype(t)>;
      T *g = data<T>(gate), *u = data<T>(up), *out = data<T>(y);
      cl::over_ranges(gate.numel(), kGrain, [&](int64_t a, int64_t b) { cl::loops<T>().silu_mul(g + a, u + a, out + a, b - a); });
    });
    ctx->save_for_backward({gate, up});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    no_second_derivative();
    variable_list saved = ctx->get_saved_variables();
    Tensor dy = grads[0].contiguous(), d_gate = at::empty_like(dy), d_up = at::empty_like(dy);
    with_type(dy, [&](auto* t) {
      using T = Pointee<decltype(t)>;
      T *g = data<T>(saved[0]), *u = data<T>(saved[1]), *d = data<T>(dy), *dg = data<T>(d_gate), *du = data<T>(d_up);
      cl::over_ranges(dy.numel(), kGrain, [&](int64_t a, int64_t b) {
        cl::loops<T>().silu_mul_back(g + a, u + a, d + a, dg + a, du + a, b - a);
      });
    });
    return {d_gate, d_up};
  }
};

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static Tensor forward(AutogradContext* ctx, Tensor x, Tensor weight, double eps) {
    x = x.contiguous(), weight = weight.contiguous();
    const int64_t n = x.size(-1), rows = x.numel() / std::max<int64_t>(1, n);
    Tensor y = at::empty_like(x), factors = at::empty({rows}, x.options().dtype(at::kFloat));
    float* r = data<float>(factors);
    with_type(x, [&](auto* t) {
      using T = Pointee<decltype(t)>;
      auto compute = [&](auto* w) {
        using W = Pointee<decltype(w)>;
        T *in = data<T>(x), *out = data<T>(y);
        over_rows(rows, n, [&](int64_t a, int64_t b) {
          for (int64_t i = a; i < b; ++i) r[i] = cl::norm_loops<T, W>().norm(in + i * n, w, (float)eps, out + i * n, n);
        });
      };
      if constexpr (std::is_same_v<T, bf16>) {
        if (is_bf16(weight)) return compute(data<bf16>(weight));
      }
      compute(data<float>(weight));
    });
    ctx->save_for_backward({x, weight, factors});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    no_second_derivative();
    variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const float* r = data<float>(saved[2]);
    const int64_t n = x.size(-1), rows = x.numel() / std::max<int64_t>(1, n);
    Tensor dy = grads[0].contiguous(), dx, d_weight;
    with_type(x, [&](auto* t) {
      using T = Pointee<decltype(t)>;
      T *in = data<T>(x), *d = data<T>(dy);
      if (ctx->needs_input_grad(0)) {
        dx = at::empty_like(x);
        T* out = data<T>(dx);
        auto compute = [&](auto* w) {
        using W = Pointee<decltype(w)>;
          over_rows(rows, n, [&](int64_t a, int64_t b) {
            for (int64_t i = a; i < b; ++i) cl::norm_loops<T, W>().norm_back(in + i * n, w, d + i * n, r[i], out + i * n, n);
          });
        };
        if constexpr (std::is_same_v<T, bf16>) {
          if (is_bf16(weight)) {
            compute(data<bf16>(weight));
          } else {
            compute(data<float>(weight));
          }
        } else {
          compute(data<float>(weight));
        }
      }
      if (ctx->needs_input_grad(1)) {
        d_weight = at::zeros({n}, weight.options().dtype(at::kFloat));
        float* sums = data<float>(d_weight);
        // Threads divide the columns, so rows are summed in the same order for any number of threads.
        over_rows(n, rows, [&](int64_t a, int64_t b) {
          for (int64_t i = 0; i < rows; ++i) cl::loops<T>().norm_weight(in + i * n + a, d + i * n + a, r[i], sums + a, b - a);
        });
        d_weight = d_weight.to(weight.scalar_type());
      }
    });
    return {dx, d_weight, Tensor()};
  }
};

// x [tokens, heads, n]; cos and sin [tokens, 1, half].
Tensor rotated(const Tensor& x, const Tensor& cos, const Tensor& sin, float sign) {
  const int64_t heads = x.size(1), n = x.size(2), half = cos.size(-1);
  Tensor y = at::empty_like(x);
  with_type(x, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    T *in = data<T>(x), *c = data<T>(cos), *s = data<T>(sin), *out = data<T>(y);
    over_rows(x.size(0), heads * n, [&](int64_t a, int64_t b) {
      for (int64_t i = a * heads; i < b * heads; ++i) {
        const int64_t t = i / heads * half;
        cl::loops<T>().rotate(in + i * n, c + t, s + t, sign, out + i * n, half, n);
      }
    });
  });
  return y;
}

struct Rotate : torch::autograd::Function<Rotate> {
  static Tensor forward(AutogradContext* ctx, Tensor x, Tensor cos, Tensor sin) {
    cos = cos.contiguous(), sin = sin.contiguous();
    ctx->save_for_backward({cos, sin});
    return rotated(x.contiguous(), cos, sin, 1.0f);
  }

  // The transpose of a rotation is the inverse rotation.
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    no_second_derivative();
    variable_list saved = ctx->get_saved_variables();
    return {rotated(grads[0].contiguous(), saved[0], saved[1], -1.0f), Tensor(), Tensor()};
  }
};

void check(bool holds) { TORCH_CHECK(holds, "expected f32 or bf16 tensors on a CPU whose shapes and dtypes fit"); }

}  // namespace

// gate and up have the same shape and dtype.
extern "C" int cl_silu_mul(Tensor* gate, Tensor* up, Tensor** result) {
  return guarded([&] {
    check(cl::has_kernels(*gate) && cl::has_kernels(*up) && gate->sizes() == up->sizes() && gate->scalar_type() == up->scalar_type());
    *result = new Tensor(SiluMul::apply(*gate, *up));
  });
}

// x [..., n]; weight [n] in the dtype of x or in f32.
extern "C" int cl_rms_norm(Tensor* x, Tensor* weight, double eps, Tensor** result) {
  return guarded([&] {
    check(cl::has_kernels(*x) && cl::has_kernels(*weight) && x->dim() > 0 && weight->dim() == 1 && weight->size(0) == x->size(-1) &&
          (weight->scalar_type() == x->scalar_type() || !is_bf16(*weight)));
    *result = new Tensor(RmsNorm::apply(*x, *weight, eps));
  });
}

// x [tokens, heads, n]; cos and sin [tokens, 1, half]; all of one dtype, with 2·half ≤ n.
extern "C" int cl_rotate(Tensor* x, Tensor* cos, Tensor* sin, Tensor** result) {
  return guarded([&] {
    check(cl::has_kernels(*x) && cl::has_kernels(*cos) && cl::has_kernels(*sin) && x->dim() == 3 && cos->sizes() == sin->sizes() &&
          2 * cos->size(-1) <= x->size(2) && cos->numel() == x->size(0) * cos->size(-1) &&
          cos->scalar_type() == x->scalar_type() && sin->scalar_type() == x->scalar_type());
    *result = new Tensor(Rotate::apply(*x, *cos, *sin));
  });
}
