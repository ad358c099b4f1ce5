// Loops on libtorch's threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

namespace cl {

// Calls body(begin, end) with ranges that together are 0 to n, on several threads if n exceeds `grain`. Ranges begin at multiples
// of `grain`.
//
// at::parallel_for would be a loop of the file that includes it, and needs that file to be linked with the OpenMP library that
// libtorch happens to have; with another one there would be twice the threads. libtorch's iterator over a tensor divides its
// elements from inside libtorch, and their places in memory are the numbers wanted here.
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

// Calls body(unit, scratch) for units with a `cost`, the costly ones first, such that each thread has about the same costs.
// `scratch` is a vector of the thread, for the body to enlarge.
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
