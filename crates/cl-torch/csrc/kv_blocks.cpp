// Attention of new tokens to the KV cache of their sequences, on a CPU.
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "dtype.h"
#include "guard.h"
#include "kernels.h"
#include "parallel.h"

using at::Tensor;
using cl::data;
using cl::Pointee;
using cl::with_type;

namespace {

// Maximum number of query rows for which sequences are computed together.
constexpr int64_t kRows = 32;

struct Spans {
  const int64_t *slots, *lengths, *widths;
  int64_t n;

  int64_t tokens() const { return std::accumulate(widths, widths + n, int64_t{0}); }
};

// keys [slots, kv_heads, blocks, d, kBlock], values [slots, kv_heads, blocks · kBlock, padded d]; k and v [tokens,
// kv_heads, d].
bool fits(const Tensor& keys, const Tensor& values, const Tensor& k, const Tensor& v, const Spans& spans) {
  const bool shapes = cl::has_kernels(keys) && keys.dim() == 5 && values.dim() == 4 && k.dim() == 3 && k.sizes() == v.sizes() &&
                      keys.is_contiguous() && values.is_contiguous() && values.scalar_type() == keys.scalar_type() &&
                      k.scalar_type() == keys.scalar_type() && v.scalar_type() == keys.scalar_type() && k.device().is_cpu() &&
                      v.device().is_cpu() && keys.size(1) == k.size(1) && keys.size(3) == k.size(2) && keys.size(4) == cl::kBlock &&
                      values.size(0) == keys.size(0) && values.size(1) == keys.size(1) &&
                      values.size(2) == keys.size(2) * cl::kBlock &&
                      values.size(3) == (k.size(2) + cl::kPad - 1) / cl::kPad * cl::kPad && spans.tokens() == k.size(0);
  if (!shapes) return false;
  std::vector<bool> taken(keys.size(0));
  for (int64_t s = 0; s < spans.n; ++s) {
    if (spans.slots[s] < 0 || spans.slots[s] >= keys.size(0) || taken[spans.slots[s]]) return false;
    taken[spans.slots[s]] = true;
    if (spans.lengths[s] < 0 || spans.widths[s] < 0 || spans.lengths[s] + spans.widths[s] > values.size(2)) return false;
  }
  return true;
}

template <class T>
cl::Stored<T> stored(const Tensor& keys, const Tensor& values, int64_t head) {
  return {data<T>(keys) + head * keys.stride(1), data<T>(values) + head * values.stride(1)};
}

// The continuation of one head for the sequences [s, end), whose first new token is number `token`.
template <class T>
cl::Continued<T> of_head(const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values, const Spans& spans, int64_t head,
                         int64_t s, int64_t end, int64_t token) {
  cl::Continued<T> c{};
  c.d = k.size(2), c.kv_stride = k.size(1) * c.d;
  c.k = data<T>(k) + token * c.kv_stride + head * c.d, c.v = data<T>(v) + token * c.kv_stride + head * c.d;
  c.own = stored<T>(keys, values, head), c.slot_keys = keys.stride(0), c.slot_values = values.stride(0);
  c.slots = spans.slots + s, c.lengths = spans.lengths + s, c.widths = spans.widths + s, c.sequences = end - s;
  return c;
}

struct Unit {
  int64_t head, first, end, token, rows, longest, cost;
};

// Units of work: one for each key/value head and group of consecutive sequences.
std::vector<Unit> units_of(const Spans& spans, int64_t kv_heads, int64_t groups, int64_t prefix) {
  std::vector<Unit> units;
  for (int64_t s = 0, token = 0; s < spans.n;) {
    Unit unit{0, s, s, token, 0, 0, 0};
    for (; s < spans.n && (unit.rows == 0 || unit.rows + spans.widths[s] * groups <= kRows); ++s) {
      const int64_t all = spans.lengths[s] + spans.widths[s], rows = spans.widths[s] * groups;
      unit.rows += rows, unit.longest = std::max(unit.longest, all), unit.cost += (rows + 4) * (all + prefix);
      token += spans.widths[s];
    }
    unit.end = s;
    for (; unit.head < kv_heads; ++unit.head) units.push_back(unit);
  }
  return units;
}

}  // namespace

// Appends new keys and values [tokens, kv_heads, d] to the cache.
extern "C" int cl_append_stored(Tensor* k, Tensor* v, Tensor* keys, Tensor* values, const int64_t* slots, const int64_t* lengths,
                                const int64_t* widths, size_t n) {
  return guarded([&] {
    const Spans spans{slots, lengths, widths, (int64_t)n};
    TORCH_CHECK(fits(*keys, *values, *k, *v, spans), "keys and values do not fit those that are stored");
    const Tensor k_rows = k->contiguous(), v_rows = v->contiguous();
    with_type(*keys, [&](auto* t) {
      using T = Pointee<decltype(t)>;
      cl::over_ranges(keys->size(1), 1, [&](int64_t a, int64_t b) {
        for (int64_t h = a; h < b; ++h) cl::loops<T>().append(of_head<T>(k_rows, v_rows, *keys, *values, spans, h, 0, spans.n, 0));
      });
    });
  });
}

// q [tokens, heads, d]; the prefix's keys and values have one slot. Also appends the new keys and values to the cache.
extern "C" int cl_attend_stored(Tensor* q, Tensor* k, Tensor* v, Tensor* keys, Tensor* values, Tensor* prefix_keys,
                                Tensor* prefix_values, int64_t prefix, const int64_t* slots, const int64_t* lengths,
                                const int64_t* widths, size_t n, double scale, double softcap, int64_t window, Tensor** result) {
  return guarded([&] {
    const Spans spans{slots, lengths, widths, (int64_t)n};
    TORCH_CHECK(fits(*keys, *values, *k, *v, spans), "keys and values do not fit those that are stored");
    TORCH_CHECK(q->dim() == 3 && q->size(0) == k->size(0) && q->size(2) == k->size(2) && q->scalar_type() == k->scalar_type() &&
                    q->device().is_cpu() && q->size(1) % k->size(1) == 0,
                "queries do not fit the keys");
    TORCH_CHECK(prefix == 0 || (prefix_keys && prefix_values && prefix_keys->dim() == 5 && prefix_values->dim() == 4 &&
                                prefix_keys->is_contiguous() && prefix_values->is_contiguous() && prefix_keys->size(0) == 1 &&
                                prefix_keys->scalar_type() == keys->scalar_type() && prefix_keys->size(1) == keys->size(1) &&
                                prefix_keys->size(3) == keys->size(3) && prefix_values->size(3) == values->size(3) && window == 0 &&
                                prefix <= prefix_values->size(2)),
                "the prefix does not fit the keys and values");
    const Tensor q_rows = q->contiguous(), k_rows = k->contiguous(), v_rows = v->contiguous();
    Tensor out = at::empty_like(q_rows);
    const int64_t d = q->size(2), heads = q->size(1), kv_heads = k->size(1), groups = heads / kv_heads;
    with_type(q_rows, [&](auto* t) {
      using T = Pointee<decltype(t)>;
      cl::over_units(units_of(spans, kv_heads, groups, prefix), [&](const Unit& unit, std::vector<float>& scratch) {
        const size_t floats = cl::kernels().attend_stored_scratch(unit.rows, prefix, unit.longest, d);
        if (scratch.size() < floats) scratch.resize(floats);
        auto head = of_head<T>(k_rows, v_rows, *keys, *values, spans, unit.head, unit.first, unit.end, unit.token);
        const int64_t at = (unit.token * heads + unit.head * groups) * d;
        head.q = data<T>(q_rows) + at, head.out = data<T>(out) + at, head.q_stride = heads * d, head.groups = groups;
        head.scale = (float)scale, head.softcap = (float)softcap, head.window = window, head.prefix_length = prefix;
        if (prefix > 0) head.prefix = stored<T>(*prefix_keys, *prefix_values, unit.head);
        cl::loops<T>().append(head);
        cl::loops<T>().attend_stored(head, scratch.data());
      });
    });
    *result = new Tensor(out);
  });
}
