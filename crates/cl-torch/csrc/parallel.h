// Parallel loops on libtorch's threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

namespace cl {

// Calls body(begin, end) with ranges that partition [0, n), on several threads if n exceeds `grain`. Ranges begin at
// multiples of `grain`.
//
// at::parallel_for is compiled into the file that includes it, which would then have to be linked with the same OpenMP
// library as libtorch; with a different one, there would be twice as many threads. Instead, this uses a TensorIterator,
// which divides the elements of a tensor among threads inside libtorch: their offsets in memory are the indices of the
// loop.
template <class F>
void over_ranges(int64_t n, int64_t grain, const F& body) {
  if (n == 0) return;
  grain = std::max<int64_t>(1, grain);
  const at::Tensor grains = at::empty({(n + grain - 1) / grain}, at::kByte);
  at::TensorIterator ranges = at::TensorIteratorConfig().add_const_input(grains).build();
  const char* first = (const char*)grains.const_data_ptr();
  ranges.for_each([&](char** data, const int64_t*, int64_t columns, int64_t rows) {
    const int64_t begin = data[0] - first;
    body(begin * grain, std::min(n, (begin + columns * rows) * grain));
  }, /*grain_size=*/1);
}

// Calls body(unit, scratch) for all units, which have a member `cost`. Units are assigned to threads in order of
// descending cost, so that all threads have about the same total cost. `scratch` is a vector owned by the thread, which
// the body may enlarge.
template <class U, class F>
void over_units(std::vector<U> units, const F& body) {
  std::stable_sort(units.begin(), units.end(), [](const U& a, const U& b) { return a.cost > b.cost; });
  std::vector<std::vector<U>> shares(std::max<int64_t>(1, at::get_num_threads()));
  std::vector<int64_t> loads(shares.size());
  for (const U& unit : units) {
    const size_t least = std::min_element(loads.begin(), loads.end()) - loads.begin();
    shares[least].push_back(unit);
    loads[least] += unit.cost;
  }
  over_ranges((int64_t)shares.size(), 1, [&](int64_t a, int64_t b) {
    std::vector<float> scratch;
    for (int64_t share = a; share < b; ++share) {
      for (const U& unit : shares[share]) body(unit, scratch);
    }
  });
}

}  // namespace cl
