// Weights quantized to 4 or 8 bits, in the layouts of bitsandbytes.
#pragma once

#include <ATen/core/Tensor.h>

namespace cl {

/// A quantized matrix [out, in].
///
/// NF4: `values` U8 [out, in / 2], `absmax` U8 [blocks], `nested` f32 [1 + blocks / 256, rounded up].
/// int8: `values` I8 [out, in], `absmax` f32 [out], no `nested`.
struct Quantized {
  at::Tensor values, absmax, nested;
};

/// Dequantizes the matrix to a floating-point dtype: computed in f32 and rounded once.
at::Tensor dequantized(const Quantized& matrix, at::ScalarType kind);

}  // namespace cl
