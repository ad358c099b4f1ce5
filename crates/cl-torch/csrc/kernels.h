// Kernels over rows of tensors, compiled for several vector widths.
#pragma once

#include <cstdint>

namespace cl {

typedef uint16_t bf16;  // raw bits

// Rows in scratch memory are padded with zeros to a multiple of this many elements, the number of lanes of the widest
// vectors.
constexpr int64_t kPad = 16;

// One key/value head of one sequence in causal attention, with `length` tokens of dimension `d`: element (i, j) of k is
// k[i · kv_stride + j], and likewise for v. Its `groups` query heads follow each other: element (i, j) of query head g is
// q[i · q_stride + g · d + j].
template <class T>
struct Head {
  const T *q, *k, *v;
  int64_t q_stride, kv_stride, length, d, groups;
  float scale;
};

// Number of keys in a block of KvBlocks. Within a block, keys are stored transposed.
constexpr int64_t kBlock = 64;

// Cached keys and values of one head of one sequence. Element j of key i is keys[(i / kBlock · d + j) · kBlock + i %
// kBlock]; element j of value i is values[i · padded + j], where `padded` is d rounded up to a multiple of kPad.
template <class T>
struct Stored {
  T *keys, *values;
};

// One key/value head of sequences that continue after a common prefix. New token t of all sequences has the keys k[t ·
// kv_stride + j] and the queries q[t · q_stride + g · d + j] of `groups` query heads, whose results have the same
// positions in `out`.
template <class T>
struct Continued {
  const T *q, *k, *v;
  T* out;
  int64_t q_stride, kv_stride, groups, d;
  float scale, softcap;  // 0: no cap
  int64_t window;        // positions that a query attends to, including its own; 0: all
  Stored<T> prefix, own;
  int64_t prefix_length, slot_keys, slot_values;  // slot_keys, slot_values: strides between slots of `own`
  const int64_t *slots, *lengths, *widths;        // of each sequence; length: cached tokens, width: new ones
  int64_t sequences;
};

template <class T>
struct Loops {
  void (*silu_mul)(const T* gate, const T* up, T* y, int64_t n);
  void (*silu_mul_back)(const T* gate, const T* up, const T* dy, T* d_gate, T* d_up, int64_t n);
  void (*norm_weight)(const T* x, const T* dy, float r, float* sums, int64_t n);
  void (*rotate)(const T* x, const T* cos, const T* sin, float sign, T* y, int64_t half, int64_t n);
  // Of all query heads; the logarithms of their sums of weights are `row` elements apart.
  void (*attend)(const Head<T>& head, T* out, float* logsumexp, int64_t row, float* scratch);
  // Of one query head.
  void (*attend_back)(const Head<T>& head, const T* out, const T* d_out, const float* logsumexp, T* dq, float* dk, float* dv,
                      float* scratch);
  // Appends the new keys and values to the cache.
  void (*append)(const Continued<T>& head);
  void (*attend_stored)(const Continued<T>& head, float* scratch);
  // y[i · y_row + j] = x_i · w_j for m rows of x and n rows of w, both of `depth` elements.
  void (*dot_rows)(int64_t m, int64_t n, int64_t depth, const float* x, const T* w, float* y, int64_t y_row);
};

template <class T, class W>
struct NormLoops {
  float (*norm)(const T* x, const W* weight, float eps, T* y, int64_t n);
  void (*norm_back)(const T* x, const W* weight, const T* dy, float r, T* dx, int64_t n);
};

struct Kernels {
  Loops<float> f32;
  Loops<bf16> half;
  NormLoops<float, float> norm_f32;
  NormLoops<bf16, float> norm_half_f32;
  NormLoops<bf16, bf16> norm_half;
  // Number of floats of scratch memory that the attention kernels need.
  int64_t (*attend_scratch)(int64_t length, int64_t d);
  int64_t (*attend_back_scratch)(int64_t length, int64_t d);
  int64_t (*attend_stored_scratch)(int64_t rows, int64_t prefix, int64_t longest, int64_t d);
  // Up to this many rows of x, dot_rows in f32 is faster than the libraries (docs/benchmarks.md).
  int64_t few_rows;
};

extern const Kernels baseline;
#if defined(__x86_64__)
extern const Kernels avx2, avx512;
#endif

// Returns the kernels for this processor (dispatch.cpp).
const Kernels& kernels();

template <class T>
const Loops<T>& loops();
template <>
inline const Loops<float>& loops<float>() {
  return kernels().f32;
}
template <>
inline const Loops<bf16>& loops<bf16>() {
  return kernels().half;
}

template <class T, class W>
const NormLoops<T, W>& norm_loops();
template <>
inline const NormLoops<float, float>& norm_loops<float, float>() {
  return kernels().norm_f32;
}
template <>
inline const NormLoops<bf16, float>& norm_loops<bf16, float>() {
  return kernels().norm_half_f32;
}
template <>
inline const NormLoops<bf16, bf16>& norm_loops<bf16, bf16>() {
  return kernels().norm_half;
}

}  // namespace cl
