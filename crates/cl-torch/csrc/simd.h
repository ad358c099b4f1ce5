// Float vectors of the processor's width, with GCC's and Clang's vector extension.
//
// Only for kernels.cpp, which is compiled for several processors: everything here must be inlined, and no header may be
// included whose functions the linker could share with other files.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define CL_ALWAYS __attribute__((always_inline))
#define CL_INLINE static inline CL_ALWAYS

namespace {

using cl::bf16;

#if defined(__AVX512F__)
#define CL_BYTES 64
#elif defined(__AVX2__)
#define CL_BYTES 32
#else
#define CL_BYTES 16
#endif

typedef float vf __attribute__((vector_size(CL_BYTES)));
typedef int32_t vi __attribute__((vector_size(CL_BYTES)));
typedef uint32_t vu __attribute__((vector_size(CL_BYTES)));
typedef uint16_t vh __attribute__((vector_size(CL_BYTES / 2)));

constexpr int64_t kLanes = CL_BYTES / sizeof(float);

CL_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// GCC generates several instructions for these conversions, although the processor has one.
#if defined(__AVX512F__)
CL_INLINE vu widen(vh v) { return (vu)_mm512_cvtepu16_epi32((__m256i)v); }
CL_INLINE vh narrow(vu v) { return (vh)_mm512_cvtepi32_epi16((__m512i)v); }
#elif defined(__AVX2__)
CL_INLINE vu widen(vh v) { return (vu)_mm256_cvtepu16_epi32((__m128i)v); }
CL_INLINE vh narrow(vu v) { return __builtin_convertvector(v, vh); }
#else
CL_INLINE vu widen(vh v) { return __builtin_convertvector(v, vu); }
CL_INLINE vh narrow(vu v) { return __builtin_convertvector(v, vh); }
#endif

CL_INLINE vf load(const bf16* p) {
  vh v;
  __builtin_memcpy(&v, p, sizeof v);
  return (vf)(widen(v) << 16);
}

CL_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

// Rounds to nearest, ties to even. A NaN stays a NaN: it is either a widened bf16 NaN or the processor's default NaN,
// whose lower 16 bits are all zero, so the addition does not carry into the upper half.
CL_INLINE vh to_bf16(vf v) {
  vu bits = (vu)v;
  return narrow((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

CL_INLINE void store(bf16* p, vf v) {
  vh half = to_bf16(v);
  __builtin_memcpy(p, &half, sizeof half);
}

// Loads n elements, at most one vector, and sets the remaining lanes to zero.
template <class T>
CL_INLINE vf load(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T part[kLanes] = {};
  __builtin_memcpy(part, p, n * sizeof(T));
  return load(part);
}

template <class T>
CL_INLINE void store(T* p, vf v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T part[kLanes];
  store(part, v);
  __builtin_memcpy(p, part, n * sizeof(T));
}

// Rounds v to the precision of T.
template <class T>
CL_INLINE vf rounded(vf v);

template <>
inline CL_ALWAYS vf rounded<float>(vf v) {
  return v;
}

template <>
inline CL_ALWAYS vf rounded<bf16>(vf v) {
  return (vf)(widen(to_bf16(v)) << 16);
}

// Calls `body` with the offset of every vector in n elements and its number of elements, which is a compile-time
// constant for all but the last vector.
template <class F>
CL_INLINE void over_vectors(int64_t n, const F& body) {
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, n - i);
}

CL_INLINE vf select(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

CL_INLINE vf splat(float v) { return vf{} + v; }

CL_INLINE float sum(vf v) {
  float all = 0;
  for (int64_t i = 0; i < kLanes; ++i) all += v[i];
  return all;
}

// Four floats.
typedef float vq __attribute__((vector_size(16)));

// Sums of neighbouring elements, alternating between a and b. Within each 128 bits, `interleaved` gives (a0+a2, b0+b2,
// a1+a3, b1+b3) of elements 0 to 3; `interleaved_pairs` of two such vectors gives the sums of all four elements.
#if defined(__AVX512F__)
CL_INLINE vf interleaved(vf a, vf b) {
  return (vf)_mm512_unpacklo_ps((__m512)a, (__m512)b) + (vf)_mm512_unpackhi_ps((__m512)a, (__m512)b);
}
CL_INLINE vf interleaved_pairs(vf a, vf b) {
  return (vf)_mm512_unpacklo_pd((__m512d)a, (__m512d)b) + (vf)_mm512_unpackhi_pd((__m512d)a, (__m512d)b);
}
CL_INLINE vq folded(vf v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  return (vq)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#elif defined(__AVX2__)
CL_INLINE vf interleaved(vf a, vf b) {
  return (vf)_mm256_unpacklo_ps((__m256)a, (__m256)b) + (vf)_mm256_unpackhi_ps((__m256)a, (__m256)b);
}
CL_INLINE vf interleaved_pairs(vf a, vf b) {
  return (vf)_mm256_unpacklo_pd((__m256d)a, (__m256d)b) + (vf)_mm256_unpackhi_pd((__m256d)a, (__m256d)b);
}
CL_INLINE vq folded(vf v) { return (vq)_mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1)); }
#else
CL_INLINE vf interleaved(vf a, vf b) { return vf{a[0], b[0], a[1], b[1]} + vf{a[2], b[2], a[3], b[3]}; }
CL_INLINE vf interleaved_pairs(vf a, vf b) { return vf{a[0], a[1], b[0], b[1]} + vf{a[2], a[3], b[2], b[3]}; }
CL_INLINE vq folded(vf v) { return v; }
#endif

// Returns the sums over the elements of a, b, c and d.
CL_INLINE vq sums(vf a, vf b, vf c, vf d) { return folded(interleaved_pairs(interleaved(a, b), interleaved(c, d))); }

CL_INLINE float largest(vf v) {
  float most = v[0];
  for (int64_t i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// Element-wise maximum and minimum. A NaN in b is returned.
#if defined(__AVX512F__)
CL_INLINE vf larger(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
CL_INLINE vf smaller(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
CL_INLINE vf larger(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
CL_INLINE vf smaller(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
CL_INLINE vf larger(vf a, vf b) { return select(a > b, a, b); }
CL_INLINE vf smaller(vf a, vf b) { return select(a < b, a, b); }
#endif

// Computes e^v, within 2 units in the last place between −87 and 88: e^v = 2^n · e^f, |f| ≤ ln 2 / 2, with Cephes'
// polynomial for e^f. Beyond these limits, returns the value at the limit: about 1.6e-38 or 1.7e38.
CL_INLINE vf exponential(vf v) {
  v = larger(splat(-87.0f), smaller(splat(88.0f), v));
  const float magic = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer, held by the lowest bits
  const vf sum = v * 1.44269504f + magic, n = sum - magic;
  const vf f = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + (f + 1.0f);
  return (vf)((vi)p + ((vi)sum << 23));
}

// As exponential, but infinity above 88.
CL_INLINE vf unlimited_exponential(vf v) { return select(v > 88.0f, splat(__builtin_inff()), exponential(v)); }

}  // namespace
