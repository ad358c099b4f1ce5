// Several linear layers on one input as one autograd node, each with or without a low-rank update.
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "guard.h"
#include "products.h"
#include "quantized.h"

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// The node's tensors are x, followed by these tensors for each layer; those that a layer does not have are undefined.
// For a quantized weight, `kAbsmax` is defined and `kWeight` holds the quantized values.
enum Part { kWeight, kBias, kA, kB, kAbsmax, kNested, kParts };

size_t place(size_t layer, Part part) { return 1 + layer * kParts + part; }

// A quantized weight is dequantized for each use, so that the dense weight is never kept.
Tensor dense_weight(const variable_list& tensors, size_t layer, at::ScalarType kind) {
  const Tensor &weight = tensors[place(layer, kWeight)], &absmax = tensors[place(layer, kAbsmax)];
  return absmax.defined() ? cl::dequantized({weight, absmax, tensors[place(layer, kNested)]}, kind) : weight;
}

// y_i = x·W_iᵀ + b_i + s_i·(x·A_iᵀ)·B_iᵀ. The products with all A are computed as one, and sums are accumulated in
// place.
struct Linears : torch::autograd::Function<Linears> {
  // `present` holds the defined tensors, since autograd does not accept undefined ones; `places` gives the position of
  // each.
  static variable_list forward(AutogradContext* ctx, at::TensorList present, std::vector<int64_t> places,
                               std::vector<double> scalings) {
    variable_list tensors(1 + scalings.size() * kParts);
    for (size_t i = 0; i < places.size(); ++i) tensors[places[i]] = present[i];
    const Tensor& x = tensors[0];
    const size_t layers = scalings.size();
    std::vector<Tensor> as;
    for (size_t i = 0; i < layers; ++i) {
      if (tensors[place(i, kA)].defined()) as.push_back(tensors[place(i, kA)]);
    }
    Tensor stacked, narrow;
    if (!as.empty()) {
      stacked = as.size() == 1 ? as[0] : at::cat(as, 0);
      narrow = cl::product(x, stacked.t());
    }
    variable_list outputs, saved = tensors;
    saved.push_back(stacked);
    int64_t start = 0;
    for (size_t i = 0; i < layers; ++i) {
      const Tensor &bias = tensors[place(i, kBias)], &b = tensors[place(i, kB)];
      Tensor y = cl::product(x, dense_weight(tensors, i, x.scalar_type()).t(), bias);
      Tensor h;
      if (b.defined()) {
        h = as.size() == 1 ? narrow : narrow.narrow(1, start, b.size(1)).contiguous();
        start += b.size(1);
        // Scaling x·Aᵀ costs `r` multiplications per token; scaling the update would cost `out`.
        h.mul_(scalings[i]);
        cl::add_product(y, h, b.t());
      }
      saved.push_back(h);
      outputs.push_back(y);
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["places"] = places;
    ctx->saved_data["scalings"] = scalings;
    ctx->set_materialize_grads(false);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(!c10::GradMode::is_enabled(), "a linear layer has no second derivative");
    variable_list saved = ctx->get_saved_variables();
    std::vector<double> scalings = ctx->saved_data["scalings"].toDoubleVector();
    const size_t layers = scalings.size(), inputs = 1 + layers * kParts;
    const Tensor &x = saved[0], &stacked = saved[inputs];
    std::vector<int64_t> places = ctx->saved_data["places"].toIntVector();
    variable_list result(inputs);
    std::vector<bool> wanted(inputs);
    for (size_t i = 0; i < places.size(); ++i) wanted[places[i]] = ctx->needs_input_grad(i);
    auto wants = [&](size_t i) { return wanted[i]; };
    Tensor dx;
    auto add_dx = [&](const Tensor& dy, const Tensor& w) {
      if (dx.defined()) {
        cl::add_product(dx, dy, w);
      } else {
        dx = cl::product(dy, w);
      }
    };
    std::vector<Tensor> dhs;
    for (size_t i = 0; i < layers; ++i) {
      const Tensor &dy = grads[i], &b = saved[place(i, kB)], &h = saved[inputs + 1 + i];
      if (!dy.defined()) {
        if (b.defined()) dhs.push_back(at::zeros_like(h));
        continue;
      }
      if (wants(0)) add_dx(dy, dense_weight(saved, i, dy.scalar_type()));
      if (wants(place(i, kWeight))) result[place(i, kWeight)] = cl::product(dy.t(), x);
      if (wants(place(i, kBias))) result[place(i, kBias)] = dy.sum(0);
      if (!b.defined()) continue;
      if (wants(place(i, kB))) result[place(i, kB)] = cl::product(h.t(), dy).t();  // the faster order of factors
      dhs.push_back(cl::product(dy, b).mul_(scalings[i]));
    }
    if (!dhs.empty()) {
      Tensor dh = dhs.size() == 1 ? dhs[0] : at::cat(dhs, 1);
      if (wants(0)) add_dx(dh, stacked);
      // The A are stacked, so one product gives the gradients of all of them.
      Tensor da;
      int64_t start = 0;
      for (size_t i = 0; i < layers; ++i) {
        const Tensor& a = saved[place(i, kA)];
        if (!a.defined()) continue;
        if (wants(place(i, kA))) {
          if (!da.defined()) da = cl::product(dh.t(), x);
          result[place(i, kA)] = da.narrow(0, start, a.size(0));
        }
        start += a.size(0);
      }
    }
    result[0] = dx;
    variable_list gradients;
    for (int64_t place : places) gradients.push_back(result[place]);
    gradients.insert(gradients.end(), 2, Tensor());  // places and scalings have no gradient
    return gradients;
  }
};

}  // namespace

// tensors: x [rows, in], then for each layer: weight [out, in], bias [out], A [r, in], B [out, r], absmax, nested; null
// if absent.
extern "C" int cl_linears(Tensor* const* tensors, const double* scalings, size_t layers, Tensor** outputs) {
  return guarded([&] {
    std::vector<Tensor> present;
    std::vector<int64_t> places;
    for (size_t i = 0; i < 1 + layers * kParts; ++i) {
      if (!tensors[i]) continue;
      present.push_back(*tensors[i]);
      places.push_back((int64_t)i);
    }
    std::vector<double> factors(scalings, scalings + layers);
    variable_list y = Linears::apply(at::TensorList(present), places, factors);
    for (size_t i = 0; i < layers; ++i) outputs[i] = new Tensor(y[i]);
  });
}
