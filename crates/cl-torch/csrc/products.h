// Matrix products, computed by the fastest library or kernel for this processor.
#pragma once

#include <ATen/core/Tensor.h>

namespace cl {

/// a·b, or a·b + bias; a and b may be transposed. bf16 products are accumulated in f32 and rounded once, after the bias
/// is added.
///
/// Few rows times the transpose of a matrix are computed by our own kernels, so that the result of a row does not
/// depend on the number of rows. Other f32 products are computed by oneDNN or libtorch's BLAS. On processors without
/// bf16 instructions, large bf16 products are computed in f32.
at::Tensor product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias = {});

/// out += a·b, in place.
void add_product(at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

}  // namespace cl
