// Products of matrices by what is quicker on this processor.
#pragma once

#include <ATen/core/Tensor.h>

namespace cl {

/// a·b, or a·b + bias; a and b may be transposed. Products of bf16 are accumulated in f32 and rounded once, after the bias.
///
/// Few rows times the transpose of a matrix are computed by own loops, so that each row has the same result whatever the number of
/// rows; other f32 products by oneDNN or libtorch's BLAS. On processors without instructions for bf16, large products of bf16 are
/// computed in f32.
at::Tensor product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias = {});

/// out += a·b, in place.
void add_product(at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

}  // namespace cl
