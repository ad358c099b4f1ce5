// Maps a tensor's dtype to the element type of the kernels in kernels.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <type_traits>

#include "kernels.h"

namespace cl {

inline bool is_bf16(const at::Tensor& t) { return t.scalar_type() == at::kBFloat16; }

inline bool has_kernels(const at::Tensor& t) { return t.device().is_cpu() && (t.scalar_type() == at::kFloat || is_bf16(t)); }

template <class T>
T* data(const at::Tensor& t) {
  return (T*)t.data_ptr();
}

// Calls `body` with a null pointer whose type is a pointer to the tensor's element type.
template <class F>
void with_type(const at::Tensor& t, const F& body) {
  if (is_bf16(t)) {
    body((bf16*)nullptr);
  } else {
    body((float*)nullptr);
  }
}

template <class P>
using Pointee = std::remove_pointer_t<P>;

}  // namespace cl
