// Products of matrices by the library that is quicker on this processor.
#pragma once

#include <ATen/core/Tensor.h>

namespace cl {

/// Whether f32 products on a CPU go to oneDNN instead of libtorch's BLAS.
bool uses_onednn();

/// Whether a·b of bf16 is quicker in f32, conversions included: they are as many as the elements of all three matrices, and pay if
/// each of these takes part in many multiplications.
bool is_quicker_in_f32(const at::Tensor& a, const at::Tensor& b);

/// a·b; either may be transposed. Products of bf16 are accumulated in f32 and rounded once; on processors without instructions for
/// bf16, large ones are computed in f32.
at::Tensor product(const at::Tensor& a, const at::Tensor& b);

/// out += a·b, in place.
void add_product(at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

}  // namespace cl
