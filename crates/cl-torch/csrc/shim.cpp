// Functions of libtorch that tch does not bind: gradients with given output gradients, a custom autograd node, foreach
// and fused optimizer kernels, and variable-length flash attention. Every entry point is a C function that catches C++
// exceptions and keeps the text of the last one per thread.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/stack.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <string>
#include <vector>

#include "guard.h"

using at::Tensor;

thread_local std::string cl_error_text;

extern "C" {

const char* cl_last_error() { return cl_error_text.c_str(); }

void cl_set_error(const char* text, size_t length) { cl_error_text.assign(text, length); }

int cl_disable_cudnn_attention() {
  return guarded([] { at::globalContext().setSDPUseCuDNN(false); });
}

int cl_backward(Tensor* const* outputs, Tensor* const* gradients, size_t n, int keep_graph) {
  return guarded([&] { torch::autograd::backward(gather(outputs, n), gather(gradients, n), keep_graph != 0); });
}

int cl_grad(Tensor* const* outputs, Tensor* const* gradients, size_t n, Tensor* const* inputs, size_t m,
            Tensor** result, int keep_graph, int create_graph) {
  return guarded([&] {
    auto r = torch::autograd::grad(gather(outputs, n), gather(inputs, m), gather(gradients, n), keep_graph != 0,
                                   create_graph != 0, /*allow_unused=*/true);
    for (size_t i = 0; i < m; ++i) result[i] = new Tensor(r[i]);
  });
}

// A null gradient removes the leaf's gradient.
int cl_set_gradient(Tensor* leaf, Tensor* gradient) {
  return guarded([&] { leaf->mutable_grad() = gradient == nullptr ? Tensor() : *gradient; });
}

int cl_fused_adamw(Tensor* const* params, Tensor* const* grads, Tensor* const* exp_avg, Tensor* const* exp_avg_sq,
                   Tensor* const* steps, size_t n, double lr, double beta1, double beta2, double weight_decay,
                   double eps) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_fused_adamw_(gather(params, n), gather(grads, n), gather(exp_avg, n), gather(exp_avg_sq, n), {},
                      gather(steps, n), lr, beta1, beta2, weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false);
  });
}

int cl_global_norm(Tensor* const* tensors, size_t n, Tensor** result) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto norms = at::_foreach_norm(gather(tensors, n), 2);
    for (auto& x : norms) x = x.to(at::kFloat);
    *result = new Tensor(at::stack(norms).norm());
  });
}

int cl_foreach_mul_(Tensor* const* tensors, size_t n, Tensor* factor) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_mul_(gather(tensors, n), *factor);
  });
}

// q [total, heads, head_dim], k and v [total, kv_heads, head_dim], cu_seqlens int32 [sequences + 1]; CUDA only.
// The operator has its own derivative formula, so it is differentiable.
int cl_flash_varlen(Tensor* q, Tensor* k, Tensor* v, Tensor* cu_q, Tensor* cu_k, int64_t max_q, int64_t max_k,
                    int causal, double scale, int64_t window_left, Tensor** result) {
  return guarded([&] {
    std::optional<int64_t> left = window_left >= 0 ? std::optional<int64_t>(window_left) : std::nullopt;
    std::optional<int64_t> right = window_left >= 0 ? std::optional<int64_t>(0) : std::nullopt;
    auto r = at::_flash_attention_forward(*q, *k, *v, *cu_q, *cu_k, max_q, max_k, /*dropout_p=*/0.0, causal != 0,
                                          /*return_debug_mask=*/false, scale, left, right);
    *result = new Tensor(std::get<0>(r));
  });
}

// Forward and backward functions of a node implemented in Rust. Both return 0 on success.
typedef int (*node_forward)(void*, Tensor* const* inputs, size_t n, Tensor** output);
typedef int (*node_backward)(void*, Tensor* const* inputs, size_t n, Tensor* grad_output, Tensor** grad_inputs);
typedef void (*node_free)(void*);

}  // extern "C"

namespace {

// Owns the boxed Rust closure for as long as the graph needs it.
struct Closure : torch::CustomClassHolder {
  void* data;
  node_forward forward;
  node_backward backward;
  node_free free;
  Closure(void* d, node_forward f, node_backward b, node_free r) : data(d), forward(f), backward(b), free(r) {}
  ~Closure() override { free(data); }
};

struct RustNode : torch::autograd::Function<RustNode> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, at::TensorList inputs,
                                                c10::intrusive_ptr<Closure> closure) {
    std::vector<Tensor> in = inputs.vec();
    ctx->save_for_backward(in);
    ctx->saved_data["closure"] = c10::IValue::make_capsule(closure);
    std::vector<Tensor*> pointers;
    for (auto& t : in) pointers.push_back(&t);
    Tensor* out = nullptr;
    TORCH_CHECK(closure->forward(closure->data, pointers.data(), pointers.size(), &out) == 0,
                "the forward of a Rust autograd node failed: ", cl_error_text);
    torch::autograd::variable_list result{*out};
    delete out;
    return result;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    auto saved = ctx->get_saved_variables();
    auto closure = c10::static_intrusive_pointer_cast<Closure>(ctx->saved_data["closure"].toCapsule());
    std::vector<Tensor*> pointers, results(saved.size(), nullptr);
    for (auto& t : saved) pointers.push_back(&t);
    TORCH_CHECK(closure->backward(closure->data, pointers.data(), pointers.size(), &grads[0], results.data()) == 0,
                "the backward of a Rust autograd node failed: ", cl_error_text);
    torch::autograd::variable_list out;
    for (auto* t : results) {
      out.push_back(t ? *t : Tensor());
      delete t;
    }
    out.push_back(Tensor());  // the closure has no gradient
    return out;
  }
};

}  // namespace

extern "C" int cl_rust_node(Tensor* const* inputs, size_t n, void* data, node_forward forward, node_backward backward,
                            node_free free, Tensor** output) {
  return guarded([&] {
    auto closure = c10::make_intrusive<Closure>(data, forward, backward, free);
    auto r = RustNode::apply(at::TensorList(gather(inputs, n)), closure);
    *output = new Tensor(r[0]);
  });
}
