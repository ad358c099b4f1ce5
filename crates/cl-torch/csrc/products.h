// Products of matrices by the library that is quicker on this processor.
#pragma once

#include <ATen/core/Tensor.h>

namespace cl {

/// Whether f32 products on a CPU go to oneDNN instead of libtorch's BLAS.
bool uses_onednn();

/// a·b; either may be transposed.
at::Tensor product(const at::Tensor& a, const at::Tensor& b);

/// out += a·b, in place.
void add_product(at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

}  // namespace cl
