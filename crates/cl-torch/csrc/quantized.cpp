#include "quantized.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "guard.h"
#include "parallel.h"

using at::Tensor;

namespace {

constexpr int64_t kBlock = 64;         // weights that share one absmax
constexpr int64_t kNestedBlock = 256;  // absmax values that share one absmax of their own
constexpr int64_t kGrain = 256;        // minimum number of blocks or rows per task
constexpr float kPerStep = 1.0f / 127.0f;

// NF4 codes (Dettmers et al., arXiv:2305.14314, appendix E): quantiles of a normal distribution with an exact 0, scaled
// to [-1, 1].
constexpr std::array<float, 16> kNf4 = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// Codes of the dynamic 8-bit type (Dettmers et al., arXiv:2110.02861): 0, 1, and seven decades of both signs. Each
// decade is divided into equal intervals, twice as many as the decade below, whose midpoints are the codes.
const Tensor& dynamic_map() {
  static const Tensor map = [] {
    std::array<float, 256> codes{0.0f, 1.0f};
    size_t n = 2;
    const double decades[] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
    for (int64_t i = 0; i < 7; ++i) {
      Tensor bounds = at::linspace(0.1, 1.0, (1 << i) + 1, at::kFloat);
      Tensor middle = bounds.slice(0, 0, -1).add(bounds.slice(0, 1)).div_(2).mul_(decades[i]);
      for (int64_t k = 0; k < middle.numel(); ++k) {
        const float value = middle.const_data_ptr<float>()[k];
        codes[n++] = value;
        codes[n++] = -value;
      }
    }
    std::sort(codes.begin(), codes.end());
    return at::from_blob(codes.data(), {256}, at::kFloat).clone();
  }();
  return map;
}

/// Finds the index of the nearest code among ascending codes; the lower of two at the same distance.
template <size_t N>
class Nearest {
 public:
  explicit Nearest(const float* codes) {
    for (size_t i = 0; i + 1 < N; ++i) middles_[i] = (codes[i] + codes[i + 1]) / 2;
  }
  uint8_t operator()(float x) const {
    return (uint8_t)(std::lower_bound(middles_.begin(), middles_.end(), x) - middles_.begin());
  }

 private:
  std::array<float, N - 1> middles_;
};

int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

float largest(const float* x, int64_t n) {
  float m = 0;
  for (int64_t i = 0; i < n; ++i) m = std::max(m, std::fabs(x[i]));
  return m;
}

/// The factor that scales values up to `m` into [-1, 1].
float inverse(float m) { return 1.0f / std::max(m, 1e-38f); }

/// Rounds the matrix to the dtype `range` and returns it as f32 on the CPU.
Tensor matrix_of(const Tensor& weight, at::ScalarType range) {
  TORCH_CHECK(weight.dim() == 2, "expected a matrix, got a shape of ", weight.sizes());
  Tensor rounded = weight.detach().to(at::kCPU, range);
  TORCH_CHECK(rounded.isfinite().all().item<bool>(), "a weight is NaN, infinite or too large for ", range);
  return rounded.to(at::kFloat).contiguous();
}

cl::Quantized quantized_nf4(const Tensor& weight) {
  Tensor w = matrix_of(weight, at::kFloat);
  TORCH_CHECK(w.size(1) % 2 == 0, "nf4 stores two values in a byte: expected an even number of inputs, got ", w.size(1));
  const int64_t n = w.numel(), blocks = blocks_of(n, kBlock), outer = blocks_of(blocks, kNestedBlock);
  Tensor values = at::empty({w.size(0), w.size(1) / 2}, at::kByte), scales = at::empty({blocks}, at::kFloat);
  const Nearest<16> code(kNf4.data());
  const float* x = w.const_data_ptr<float>();
  float* scale = scales.mutable_data_ptr<float>();
  uint8_t* packed = values.mutable_data_ptr<uint8_t>();
  cl::over_ranges(blocks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t start = b * kBlock, stop = std::min(n, start + kBlock);
      scale[b] = largest(x + start, stop - start);
      const float factor = inverse(scale[b]);
      // The first of two values is in the high bits.
      for (int64_t i = start; i < stop; i += 2)
        packed[i / 2] = (uint8_t)(code(x[i] * factor) << 4 | code(x[i + 1] * factor));
    }
  });
  // Double quantization: the absmax values of the blocks are quantized as differences from their mean.
  Tensor nested = at::empty({1 + outer}, at::kFloat), absmax = at::empty({blocks}, at::kByte);
  Tensor mean = blocks > 0 ? scales.mean() : scales.sum();
  nested[0].copy_(mean);
  scales.sub_(mean);
  const Nearest<256> fine(dynamic_map().const_data_ptr<float>());
  for (int64_t b = 0; b < outer; ++b) {
    const int64_t start = b * kNestedBlock, stop = std::min(blocks, start + kNestedBlock);
    const float m = largest(scale + start, stop - start), factor = inverse(m);
    nested.mutable_data_ptr<float>()[1 + b] = m;
    for (int64_t i = start; i < stop; ++i) absmax.mutable_data_ptr<uint8_t>()[i] = fine(scale[i] * factor);
  }
  return {values, absmax, nested};
}

// bitsandbytes converts a weight to f16 before it computes the absmax of each row.
cl::Quantized quantized_int8(const Tensor& weight) {
  Tensor w = matrix_of(weight, at::kHalf);
  const int64_t rows = w.size(0), columns = w.size(1);
  Tensor values = at::empty({rows, columns}, at::kChar), absmax = at::empty({rows}, at::kFloat);
  const float* x = w.const_data_ptr<float>();
  cl::over_ranges(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float m = largest(x + r * columns, columns), factor = m == 0 ? 0 : 127.0f / m;
      absmax.mutable_data_ptr<float>()[r] = m;
      int8_t* out = values.mutable_data_ptr<int8_t>() + r * columns;
      for (int64_t i = 0; i < columns; ++i) out[i] = (int8_t)std::nearbyint(x[r * columns + i] * factor);
    }
  });
  return {values, absmax, Tensor()};
}

/// Repeats each value `times` times and truncates the result to `n` values.
Tensor repeated(const Tensor& values, int64_t times, int64_t n) {
  return values.unsqueeze(1).expand({-1, times}).reshape({-1}).narrow(0, 0, n);
}

/// Dequantizes the absmax values of the blocks of an NF4 matrix, to f32.
Tensor absmax_of_blocks(const cl::Quantized& matrix) {
  Tensor fine = dynamic_map().to(matrix.absmax.device()).index_select(0, matrix.absmax.to(at::kInt));
  // Two separate operations, so that no compiler fuses them: rounding the product before the sum is part of the format.
  fine.mul_(repeated(matrix.nested.slice(0, 1), kNestedBlock, fine.numel()));
  return fine.add_(matrix.nested[0]);
}

template <class T>
void unpack_nf4(const cl::Quantized& matrix, const Tensor& scales, Tensor& out) {
  const uint8_t* packed = matrix.values.const_data_ptr<uint8_t>();
  const float* scale = scales.const_data_ptr<float>();
  T* w = out.mutable_data_ptr<T>();
  const int64_t n = out.numel();
  cl::over_ranges(scales.numel(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      // A block has at most 16 different values.
      T values[16];
      for (int k = 0; k < 16; ++k) values[k] = static_cast<T>(kNf4[k] * scale[b]);
      const int64_t stop = std::min(n, (b + 1) * kBlock);
      for (int64_t i = b * kBlock; i < stop; i += 2) {
        const uint8_t byte = packed[i / 2];
        w[i] = values[byte >> 4];
        w[i + 1] = values[byte & 15];
      }
    }
  });
}

template <class T>
void unpack_int8(const cl::Quantized& matrix, Tensor& out) {
  const int8_t* q = matrix.values.const_data_ptr<int8_t>();
  const float* absmax = matrix.absmax.const_data_ptr<float>();
  T* w = out.mutable_data_ptr<T>();
  const int64_t columns = out.size(1);
  cl::over_ranges(out.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t i = r * columns; i < (r + 1) * columns; ++i) w[i] = static_cast<T>(q[i] * absmax[r] * kPerStep);
    }
  });
}

Tensor on_cpu(const cl::Quantized& matrix, at::ScalarType kind) {
  const bool nf4 = matrix.nested.defined();
  Tensor out = at::empty({matrix.values.size(0), matrix.values.size(1) * (nf4 ? 2 : 1)}, kind);
  Tensor scales = nf4 ? absmax_of_blocks(matrix) : Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, kind, "dequantized", [&] {
    if (nf4) {
      unpack_nf4<scalar_t>(matrix, scales, out);
    } else {
      unpack_int8<scalar_t>(matrix, out);
    }
  });
  return out;
}

// Dequantization with libtorch's operators, for other devices.
Tensor by_operators(const cl::Quantized& matrix, at::ScalarType kind) {
  if (!matrix.nested.defined()) {
    return matrix.values.to(at::kFloat).mul_(matrix.absmax.unsqueeze(1)).mul_(kPerStep).to(kind);
  }
  Tensor codes = at::from_blob((void*)kNf4.data(), {16}, at::kFloat).to(matrix.values.device());
  Tensor halves = at::stack({matrix.values.bitwise_right_shift(4), matrix.values.bitwise_and(15)}, -1);
  Tensor w = codes.index_select(0, halves.reshape({-1}).to(at::kInt));
  w.mul_(repeated(absmax_of_blocks(matrix), kBlock, w.numel()));
  return w.view({matrix.values.size(0), -1}).to(kind);
}

}  // namespace

namespace cl {

Tensor dequantized(const Quantized& matrix, at::ScalarType kind) {
  return matrix.values.is_cpu() ? on_cpu(matrix, kind) : by_operators(matrix, kind);
}

}  // namespace cl

// results: values, absmax and, for NF4, nested; all on the CPU.
extern "C" int cl_quantize(Tensor* weight, int nf4, Tensor** results) {
  return guarded([&] {
    cl::Quantized matrix = nf4 ? quantized_nf4(*weight) : quantized_int8(*weight);
    results[0] = new Tensor(matrix.values);
    results[1] = new Tensor(matrix.absmax);
    results[2] = matrix.nested.defined() ? new Tensor(matrix.nested) : nullptr;
  });
}

// nested is null for int8. `portable` selects libtorch's operators on every device.
extern "C" int cl_dequantize(Tensor* values, Tensor* absmax, Tensor* nested, int kind, int portable, Tensor** result) {
  return guarded([&] {
    cl::Quantized matrix{*values, *absmax, nested ? *nested : Tensor()};
    auto dtype = static_cast<at::ScalarType>(kind);
    *result = new Tensor(portable ? by_operators(matrix, dtype) : cl::dequantized(matrix, dtype));
  });
}
