// Causal attention over packed sequences on a CPU as one autograd node (Dao, "FlashAttention-2", arXiv:2307.08691): the
// backward pass recomputes the softmax weights from the saved log-sum-exp of the scores.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "dtype.h"
#include "guard.h"
#include "kernels.h"
#include "parallel.h"

using at::Tensor;
using cl::data;
using cl::Pointee;
using cl::with_type;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// Calls `body` for every sequence and for heads 0, `step`, 2 · `step`, … below `heads`, with scratch memory.
template <class S, class F>
void over_heads(const std::vector<int64_t>& starts, int64_t heads, int64_t step, const S& scratch_of, const F& body) {
  struct Unit {
    int64_t sequence, head, length, cost;
  };
  std::vector<Unit> units;
  for (size_t s = 0; s + 1 < starts.size(); ++s) {
    const int64_t length = starts[s + 1] - starts[s];
    for (int64_t h = 0; length > 0 && h < heads; h += step) units.push_back({(int64_t)s, h, length, length * length});
  }
  cl::over_units(std::move(units), [&](const Unit& unit, std::vector<float>& scratch) {
    const size_t floats = scratch_of(unit.length);
    if (scratch.size() < floats) scratch.resize(floats);
    body(unit.sequence, unit.head, scratch.data());
  });
}

// `groups` query heads from `head` on, which share a key/value head.
template <class T>
cl::Head<T> head_of(const Tensor& q, const Tensor& k, const Tensor& v, int64_t start, int64_t end, int64_t head, int64_t groups,
                    double scale) {
  const int64_t d = q.size(2), heads = q.size(1), kv_heads = k.size(1), kv_head = head / (heads / kv_heads);
  const int64_t kv = (start * kv_heads + kv_head) * d;
  return {data<T>(q) + (start * heads + head) * d, data<T>(k) + kv, data<T>(v) + kv, heads * d, kv_heads * d, end - start, d, groups,
          (float)scale};
}

struct PackedAttention : torch::autograd::Function<PackedAttention> {
  static Tensor forward(AutogradContext* ctx, Tensor q, Tensor k, Tensor v, std::vector<int64_t> starts, double scale) {
    q = q.contiguous(), k = k.contiguous(), v = v.contiguous();
    const int64_t tokens = q.size(0), heads = q.size(1), d = q.size(2), kv_heads = k.size(1);
    // Query heads that share keys are computed together, if that leaves enough units to balance the threads.
    const bool together = (int64_t)(starts.size() - 1) * kv_heads >= 4 * at::get_num_threads();
    const int64_t groups = together ? heads / kv_heads : 1;
    Tensor out = at::empty_like(q), logsumexp = at::empty({heads, tokens}, q.options().dtype(at::kFloat));
    with_type(q, [&](auto* t) {
      using T = Pointee<decltype(t)>;
      auto scratch = [&](int64_t length) { return cl::kernels().attend_scratch(length, d); };
      over_heads(starts, heads, groups, scratch, [&](int64_t s, int64_t h, float* memory) {
        const int64_t a = starts[s];
        cl::loops<T>().attend(head_of<T>(q, k, v, a, starts[s + 1], h, groups, scale), data<T>(out) + (a * heads + h) * d,
                              data<float>(logsumexp) + h * tokens + a, tokens, memory);
      });
    });
    ctx->save_for_backward({q, k, v, out, logsumexp});
    ctx->saved_data["starts"] = starts;
    ctx->saved_data["scale"] = scale;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(!c10::GradMode::is_enabled(), "attention has no second derivative");
    variable_list saved = ctx->get_saved_variables();
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &logsumexp = saved[4];
    const std::vector<int64_t> starts = ctx->saved_data["starts"].toIntVector();
    const double scale = ctx->saved_data["scale"].toDouble();
    const int64_t tokens = q.size(0), heads = q.size(1), d = q.size(2), kv_heads = k.size(1);
    const int64_t width = (d + cl::kPad - 1) / cl::kPad * cl::kPad;
    Tensor d_out = grads[0].contiguous(), dq = at::empty_like(q);
    // Gradients of each query head, [heads, tokens, width]; those of query heads that share a key head are summed
    // afterwards.
    Tensor dk = at::zeros({heads, tokens, width}, q.options().dtype(at::kFloat)), dv = at::zeros_like(dk);
    with_type(q, [&](auto* t) {
      using T = Pointee<decltype(t)>;
      auto scratch = [&](int64_t length) { return cl::kernels().attend_back_scratch(length, d); };
      over_heads(starts, heads, 1, scratch, [&](int64_t s, int64_t h, float* memory) {
        const int64_t a = starts[s], at = (a * heads + h) * d, part = (h * tokens + a) * width;
        cl::loops<T>().attend_back(head_of<T>(q, k, v, a, starts[s + 1], h, 1, scale), data<T>(out) + at, data<T>(d_out) + at,
                                   data<float>(logsumexp) + h * tokens + a, data<T>(dq) + at, data<float>(dk) + part,
                                   data<float>(dv) + part, memory);
      });
    });
    auto shared = [&](const Tensor& parts) {
      Tensor of_groups = parts.narrow(2, 0, d).view({kv_heads, heads / kv_heads, tokens, d});
      return of_groups.sum(1).to(q.scalar_type()).transpose(0, 1).contiguous();
    };
    return {dq, shared(dk), shared(dv), Tensor(), Tensor()};
  }
};

}  // namespace

// q [tokens, heads, d], k and v [tokens, kv_heads, d]; starts: number of tokens before each sequence, then the total.
extern "C" int cl_packed_attention(Tensor* q, Tensor* k, Tensor* v, const int64_t* starts, size_t n, double scale, Tensor** result) {
  return guarded([&] {
    auto like_q = [&](const Tensor& t) { return cl::has_kernels(t) && t.scalar_type() == q->scalar_type() && t.dim() == 3; };
    bool fits = like_q(*q) && like_q(*k) && like_q(*v) && k->sizes() == v->sizes() && q->size(0) == k->size(0) &&
                q->size(2) == k->size(2) && k->size(1) > 0 && q->size(1) % k->size(1) == 0 && n > 0 && starts[0] == 0 &&
                starts[n - 1] == q->size(0) && std::is_sorted(starts, starts + n);
    TORCH_CHECK(fits, "expected q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] in f32 or bf16 on a CPU, and the "
                      "boundaries of their sequences");
    *result = new Tensor(PackedAttention::apply(*q, *k, *v, std::vector<int64_t>(starts, starts + n), scale));
  });
}
