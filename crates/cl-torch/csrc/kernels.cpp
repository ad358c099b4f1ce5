// The kernels of elementwise.cpp, attention.cpp, kv_blocks.cpp and products.cpp. This file is compiled several times,
// for several vector widths (build.rs), so it must not include headers with functions that other files use as well.
#include "kernels.h"

#include "simd.h"

#ifndef CL_KERNELS
#define CL_KERNELS baseline
#endif

namespace {

// y = silu(gate) · up, silu(g) = g / (1 + e^-g).
template <class T>
void silu_mul(const T* gate, const T* up, T* y, int64_t n) {
  over_vectors(n, [&](int64_t i, int64_t m) CL_ALWAYS {
    vf g = load(gate + i, m), u = load(up + i, m);
    store(y + i, rounded<T>(g / (1.0f + unlimited_exponential(-g))) * u, m);
  });
}

template <class T>
void silu_mul_back(const T* gate, const T* up, const T* dy, T* d_gate, T* d_up, int64_t n) {
  over_vectors(n, [&](int64_t i, int64_t m) CL_ALWAYS {
    vf g = load(gate + i, m), u = load(up + i, m), d = load(dy + i, m);
    vf s = 1.0f / (1.0f + unlimited_exponential(-g));
    store(d_up + i, d * g * s, m);
    store(d_gate + i, d * u * s * (1.0f + g * (1.0f - s)), m);
  });
}

// Normalizes one row: y = weight · x · r. Returns r = 1/√(mean(x²) + eps).
template <class T, class W>
float norm(const T* x, const W* weight, float eps, T* y, int64_t n) {
  vf squares{};
  over_vectors(n, [&](int64_t i, int64_t m) CL_ALWAYS {
    vf v = load(x + i, m);
    squares += v * v;
  });
  const float r = 1.0f / __builtin_sqrtf(sum(squares) / (float)n + eps);
  // With a bf16 weight, the quotient is rounded before the product.
  over_vectors(n, [&](int64_t i, int64_t m) CL_ALWAYS {
    store(y + i, rounded<W>(load(x + i, m) * r) * load(weight + i, m), m);
  });
  return r;
}

// dx = r · (g − x · r² · mean(g · x)) with g = dy · weight.
template <class T, class W>
void norm_back(const T* x, const W* weight, const T* dy, float r, T* dx, int64_t n) {
  vf products{};
  over_vectors(n, [&](int64_t i, int64_t m) CL_ALWAYS {
    products += load(dy + i, m) * load(weight + i, m) * load(x + i, m);
  });
  const float mean = sum(products) / (float)n * r * r;
  over_vectors(n, [&](int64_t i, int64_t m) CL_ALWAYS {
    store(dx + i, r * (load(dy + i, m) * load(weight + i, m) - load(x + i, m) * mean), m);
  });
}

// Adds dy · x · r of one row to the sums of n columns.
template <class T>
void norm_weight(const T* x, const T* dy, float r, float* sums, int64_t n) {
  over_vectors(n, [&](int64_t i, int64_t m) CL_ALWAYS {
    store(sums + i, load(sums + i, m) + load(dy + i, m) * load(x + i, m) * r, m);
  });
}

// Rotates one head: element i is paired with i + half, and elements from 2·half on are copied. With sign = −1, the
// rotation is inverted.
template <class T>
void rotate(const T* x, const T* cos, const T* sin, float sign, T* y, int64_t half, int64_t n) {
  over_vectors(half, [&](int64_t i, int64_t m) CL_ALWAYS {
    vf a = load(x + i, m), b = load(x + half + i, m), c = load(cos + i, m), s = sign * load(sin + i, m);
    store(y + i, rounded<T>(a * c) - rounded<T>(b * s), m);
    store(y + half + i, rounded<T>(b * c) + rounded<T>(a * s), m);
  });
  for (int64_t i = 2 * half; i < n; ++i) y[i] = x[i];
}

int64_t padded(int64_t n) { return (n + cl::kPad - 1) / cl::kPad * cl::kPad; }

// Rows and vectors of a register tile of a product, chosen so that its accumulators stay in registers.
#if defined(__AVX512F__)
constexpr int kRows = 8, kCols = 2;
#elif defined(__AVX2__)
constexpr int kRows = 6, kCols = 1;
#else
constexpr int kRows = 2, kCols = 1;
#endif

// A strided matrix: element (i, k) is at[i · row + k · col].
struct Strided {
  const float* at;
  int64_t row, col;
};

template <int M, int N, class B>
CL_INLINE void tile(int64_t depth, Strided a, const B* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  vf sums[M][N];
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) sums[i][j] = add ? load(c + i * c_row + j * kLanes) : vf{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    vf row[N];
    for (int j = 0; j < N; ++j) row[j] = load(b + k * b_row + j * kLanes);
    for (int i = 0; i < M; ++i) {
      const float v = a.at[i * a.row + k * a.col];
      for (int j = 0; j < N; ++j) sums[i][j] += v * row[j];
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) store(c + i * c_row + j * kLanes, sums[i][j]);
  }
}

template <int M, class B>
CL_INLINE void tile_rows(int64_t n, int64_t depth, Strided a, const B* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  // With few rows, a tile has more columns, so that there are enough independent accumulators.
  constexpr int N = 2 * M <= kRows ? 2 * kCols : kCols;
  int64_t j = 0;
  for (; j + N * kLanes <= n; j += N * kLanes) tile<M, N>(depth, a, b + j, b_row, c + j, c_row, add);
  for (; j < n; j += kLanes) tile<M, 1>(depth, a, b + j, b_row, c + j, c_row, add);
}

// Like tile_rows, with a number of rows m from 1 to M.
template <int M, class B>
CL_INLINE void tile_last(int64_t m, int64_t n, int64_t depth, Strided a, const B* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  if (m == M) return tile_rows<M>(n, depth, a, b, b_row, c, c_row, add);
  if constexpr (M > 1) tile_last<M - 1>(m, n, depth, a, b, b_row, c, c_row, add);
}

// c = a · b, or c += a · b if `add`: a is m × depth, b is depth × n, n is a multiple of kPad. The order of summation
// does not depend on m and n.
template <class B>
void multiply(int64_t m, int64_t n, int64_t depth, Strided a, const B* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows) {
    tile_rows<kRows>(n, depth, {a.at + i * a.row, a.row, a.col}, b, b_row, c + i * c_row, c_row, add);
  }
  if (i < m) tile_last<kRows - 1>(m - i, n, depth, {a.at + i * a.row, a.row, a.col}, b, b_row, c + i * c_row, c_row, add);
}

// Rows of x and of w in a register tile of dot_rows, chosen so that its accumulators stay in registers.
#if defined(__AVX512F__)
constexpr int kDotRows = 6;
#else
constexpr int kDotRows = 2;
#endif
constexpr int kDotCols = 4;

// Rows of w in a block that stays in the cache while all rows of x are multiplied with it.
constexpr int64_t kDotBlock = 16;

// Multiplies M rows of x with kDotCols rows of w, and meanwhile prefetches some of the kDotCols rows of w that start at
// `next`. The `turns` tiles that cover all rows of x share this prefetching; this one is number `turn`.
template <int M, class T>
CL_INLINE void dot_tile(int64_t depth, const float* x, const T* w, const T* next, int64_t turn, int64_t turns, float* y, int64_t y_row) {
  vf products[M][kDotCols] = {};
  over_vectors(depth, [&](int64_t l, int64_t m) CL_ALWAYS {
    vf row[kDotCols];
    for (int j = 0; j < kDotCols; ++j) row[j] = load(w + j * depth + l, m);
    for (int64_t j = turn; j < kDotCols; j += turns) __builtin_prefetch(next + j * depth + l, 0, 2);
    for (int i = 0; i < M; ++i) {
      const vf v = load(x + i * depth + l, m);
      for (int j = 0; j < kDotCols; ++j) products[i][j] += v * row[j];
    }
  });
  for (int i = 0; i < M; ++i) {
    const vq all = sums(products[i][0], products[i][1], products[i][2], products[i][3]);
    __builtin_memcpy(y + i * y_row, &all, sizeof all);
  }
}

// Like dot_tile, with a number of rows m from 1 to M.
template <int M, class T>
CL_INLINE void dot_last(int64_t m, int64_t depth, const float* x, const T* w, const T* next, int64_t turn, int64_t turns, float* y,
                        int64_t y_row) {
  if (m == M) return dot_tile<M>(depth, x, w, next, turn, turns, y, y_row);
  if constexpr (M > 1) dot_last<M - 1>(m, depth, x, w, next, turn, turns, y, y_row);
}

// A product with few rows of x. It reads w once, in the order in which it is stored, so it is bound by memory
// bandwidth.
template <class T>
void dot_rows(int64_t m, int64_t n, int64_t depth, const float* x, const T* w, float* y, int64_t y_row) {
  const int64_t tiled = n / kDotCols * kDotCols, turns = (m + kDotRows - 1) / kDotRows;
  for (int64_t first = 0; first < tiled; first += kDotBlock) {
    const int64_t end = first + kDotBlock < tiled ? first + kDotBlock : tiled;
    for (int64_t i = 0, turn = 0; i < m; i += kDotRows, ++turn) {
      for (int64_t j = first; j < end; j += kDotCols) {
        const T *rows = w + j * depth, *next = rows + kDotBlock * depth;
        if (i + kDotRows <= m) {
          dot_tile<kDotRows>(depth, x + i * depth, rows, next, turn, turns, y + i * y_row + j, y_row);
        } else {
          dot_last<kDotRows - 1>(m - i, depth, x + i * depth, rows, next, turn, turns, y + i * y_row + j, y_row);
        }
      }
    }
  }
  for (int64_t j = tiled; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) {
      vf products{};
      over_vectors(depth, [&](int64_t l, int64_t some) CL_ALWAYS { products += load(x + i * depth + l, some) * load(w + j * depth + l, some); });
      y[i * y_row + j] = sum(products);
    }
  }
}

// Number of queries in a block.
constexpr int64_t kQueries = 32;

// Converts rows of x to f32 and pads each with zeros to the padded width.
template <class T>
void copy_rows(const T* x, int64_t stride, int64_t rows, int64_t d, float* y) {
  const int64_t width = padded(d);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; j += kLanes) store(y + i * width + j, j < d ? load(x + i * stride + j, d - j) : vf{});
  }
}

template <class T>
void narrow_rows(const float* x, int64_t width, int64_t rows, int64_t d, T* y, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < d; j += kLanes) store(y + i * stride + j, load(x + i * width + j), d - j);
  }
}

// Transposes rows × padded(d) to d × padded(rows), padding each row with zeros.
void transpose(const float* x, int64_t rows, int64_t d, float* y) {
  const int64_t width = padded(rows), x_width = padded(d);
  for (int64_t j = 0; j < d; ++j) {
    for (int64_t i = 0; i < rows; ++i) y[j * width + i] = x[i * x_width + j];
    for (int64_t i = rows; i < width; ++i) y[j * width + i] = 0;
  }
}

CL_INLINE vi lane_numbers() {
  vi numbers;
  for (int i = 0; i < kLanes; ++i) numbers[i] = i;
  return numbers;
}

// Turns dot products into scores, in place; returns the largest score in [first, n). A cap turns s into cap · tanh(s /
// cap).
float score(float* row, int64_t first, int64_t n, float scale, float cap) {
  vf most = splat(-__builtin_inff());
  for (int64_t j = 0; j < n; j += kLanes) {
    vf s = load(row + j) * scale;
    if (cap > 0) s = cap * (1.0f - 2.0f / (1.0f + exponential(s * (2.0f / cap))));
    store(row + j, s);
    const vi place = lane_numbers() + (int32_t)j;
    s = select((place >= (int32_t)first) & (place < (int32_t)n), s, splat(-__builtin_inff()));
    most = select(s > most, s, most);
  }
  return largest(most);
}

// Returns the largest of the first n elements.
float largest_of(const float* row, int64_t n) {
  vf most = splat(-__builtin_inff());
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) most = larger(load(row + j), most);
  if (j < n) {
    const vf last = load(row + j);  // rows are padded
    most = larger(select(lane_numbers() < (int32_t)(n - j), last, splat(-__builtin_inff())), most);
  }
  return largest(most);
}

// Turns scores into exp(scale · score − most), in place; entries before `first` and in [n, end) become 0. Returns the sum.
float weights_of(float* row, int64_t first, int64_t n, int64_t end, float scale, float most) {
  vf sums{};
  for (int64_t j = 0; j < end; j += kLanes) {
    vf p = exponential(load(row + j) * scale - most);
    if (j < first || j + kLanes > n) {
      const vi place = lane_numbers() + (int32_t)j;
      p = select((place >= (int32_t)first) & (place < (int32_t)n), p, vf{});
    }
    sums += p;
    store(row + j, p);
  }
  return sum(sums);
}

// Products of the queries, m × d, with the first n cached keys.
template <class T>
void multiply_keys(int64_t m, int64_t n, int64_t d, Strided queries, const T* keys, float* products, int64_t row) {
  for (int64_t i = 0; i < n; i += cl::kBlock) {
    const int64_t some = n - i < cl::kBlock ? padded(n - i) : cl::kBlock;
    multiply(m, some, d, queries, keys + i * d, cl::kBlock, products + i, row, false);
  }
}

// Transposes keys, rows × padded(d), within blocks of kBlock rows; the last block is padded with zeros.
void transpose_blocks(const float* x, int64_t rows, int64_t d, float* y) {
  const int64_t x_width = padded(d);
  for (int64_t start = 0; start < rows; start += cl::kBlock, x += cl::kBlock * x_width, y += d * cl::kBlock) {
    const int64_t some = rows - start < cl::kBlock ? rows - start : cl::kBlock;
    for (int64_t j = 0; j < d; ++j) {
      for (int64_t i = 0; i < some; ++i) y[j * cl::kBlock + i] = x[i * x_width + j];
      for (int64_t i = some; i < cl::kBlock; ++i) y[j * cl::kBlock + i] = 0;
    }
  }
}

// Floats of scratch memory: values and keys as rows, keys transposed in blocks, queries, products, outputs.
int64_t attend_scratch(int64_t length, int64_t d) {
  return (length + cl::kBlock) * d + 2 * length * padded(d) + kQueries * (padded(length) + 2 * padded(d));
}

template <class T>
void attend(const cl::Head<T>& head, T* out, float* logsumexp, int64_t row, float* scratch) {
  const int64_t d = head.d, width = padded(d), keys = padded(head.length);
  float* values = scratch;
  float* key_rows = values + head.length * width;
  float* keys_t = key_rows + head.length * width;
  float* queries = keys_t + (head.length + cl::kBlock) * d;
  float* products = queries + kQueries * width;
  float* results = products + kQueries * keys;
  copy_rows(head.v, head.kv_stride, head.length, d, values);
  copy_rows(head.k, head.kv_stride, head.length, d, key_rows);
  transpose_blocks(key_rows, head.length, d, keys_t);
  for (int64_t start = 0; start < head.length; start += kQueries) {
    const int64_t end = start + kQueries < head.length ? start + kQueries : head.length, rows = end - start;
    for (int64_t g = 0; g < head.groups; ++g) {
      const int64_t at = start * head.q_stride + g * d;
      copy_rows(head.q + at, head.q_stride, rows, d, queries);
      multiply_keys(rows, end, d, {queries, width, 1}, keys_t, products, keys);
      float totals[kQueries];
      for (int64_t i = 0; i < rows; ++i) {
        float* scores = products + i * keys;
        const float most = head.scale * largest_of(scores, start + i + 1);
        totals[i] = weights_of(scores, 0, start + i + 1, padded(end), head.scale, most);
        logsumexp[g * row + start + i] = most + __builtin_logf(totals[i]);
      }
      // Blocks of values stay in the L1 cache for all rows.
      for (int64_t i = 0; i < end; i += cl::kBlock) {
        const int64_t some = end - i < cl::kBlock ? end - i : cl::kBlock;
        multiply(rows, width, some, {products + i, keys, 1}, values + i * width, width, results, width, i > 0);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const float factor = 1.0f / totals[i];
        for (int64_t j = 0; j < width; j += kLanes) store(results + i * width + j, load(results + i * width + j) * factor);
      }
      narrow_rows(results, width, rows, d, out + at, head.q_stride);
    }
  }
}

// Floats of scratch memory: keys and values as rows and transposed; queries, outputs and their gradients; softmax
// weights and their gradients.
int64_t attend_back_scratch(int64_t length, int64_t d) {
  return 2 * padded(length) * d + 2 * length * padded(d) + kQueries * (2 * padded(length) + 4 * padded(d));
}

// dk and dv are [length, padded(d)]; the caller sets them to zero.
template <class T>
void attend_back(const cl::Head<T>& head, const T* out, const T* d_out, const float* logsumexp, T* dq, float* dk, float* dv,
                 float* scratch) {
  const int64_t d = head.d, width = padded(d), keys = padded(head.length);
  float* key_rows = scratch;
  float* value_rows = key_rows + head.length * width;
  float* keys_t = value_rows + head.length * width;
  float* values_t = keys_t + d * keys;
  float* queries = values_t + d * keys;
  float* results = queries + kQueries * width;
  float* d_results = results + kQueries * width;
  float* d_queries = d_results + kQueries * width;
  float* weights = d_queries + kQueries * width;
  float* d_weights = weights + kQueries * keys;
  copy_rows(head.k, head.kv_stride, head.length, d, key_rows);
  copy_rows(head.v, head.kv_stride, head.length, d, value_rows);
  transpose(key_rows, head.length, d, keys_t);
  transpose(value_rows, head.length, d, values_t);
  for (int64_t start = 0; start < head.length; start += kQueries) {
    const int64_t end = start + kQueries < head.length ? start + kQueries : head.length, rows = end - start;
    copy_rows(head.q + start * head.q_stride, head.q_stride, rows, d, queries);
    copy_rows(out + start * head.q_stride, head.q_stride, rows, d, results);
    copy_rows(d_out + start * head.q_stride, head.q_stride, rows, d, d_results);
    multiply(rows, padded(end), d, {queries, width, 1}, keys_t, keys, weights, keys, false);
    multiply(rows, padded(end), d, {d_results, width, 1}, values_t, keys, d_weights, keys, false);
    for (int64_t i = 0; i < rows; ++i) {
      vf products{};
      for (int64_t j = 0; j < width; j += kLanes) products += load(results + i * width + j) * load(d_results + i * width + j);
      const float delta = sum(products);
      float *w = weights + i * keys, *dw = d_weights + i * keys;
      for (int64_t j = 0; j < padded(end); j += kLanes) {
        vf p = exponential(load(w + j) * head.scale - logsumexp[start + i]);
        p = select(lane_numbers() <= (int32_t)(start + i - j), p, vf{});
        store(w + j, p);
        store(dw + j, p * (load(dw + j) - delta) * head.scale);
      }
    }
    multiply(end, width, rows, {weights, 1, keys}, d_results, width, dv, width, true);
    multiply(end, width, rows, {d_weights, 1, keys}, queries, width, dk, width, true);
    multiply(rows, width, end, {d_weights, keys, 1}, key_rows, width, d_queries, width, false);
    narrow_rows(d_queries, width, rows, d, dq + start * head.q_stride, head.q_stride);
  }
}

template <class T>
void append(const cl::Continued<T>& head) {
  const int64_t d = head.d, width = padded(d);
  const T *k = head.k, *v = head.v;
  for (int64_t s = 0; s < head.sequences; ++s) {
    T* keys = head.own.keys + head.slots[s] * head.slot_keys;
    T* values = head.own.values + head.slots[s] * head.slot_values;
    for (int64_t i = head.lengths[s]; i < head.lengths[s] + head.widths[s]; ++i, k += head.kv_stride, v += head.kv_stride) {
      T* key = keys + i / cl::kBlock * d * cl::kBlock + i % cl::kBlock;
      for (int64_t j = 0; j < d; ++j) key[j * cl::kBlock] = k[j];
      __builtin_memcpy(values + i * width, v, d * sizeof(T));
    }
  }
}

// Floats of scratch memory: queries, results, products with the prefix and with the longest sequence, sums.
int64_t attend_stored_scratch(int64_t rows, int64_t prefix, int64_t longest, int64_t d) {
  return rows * (2 * padded(d) + padded(prefix) + padded(longest) + 1);
}

// A query attends to the prefix, to the cached tokens of its sequence, and to the new ones up to its own; with a
// window, there is no prefix. Products with the prefix are computed for all sequences at once. Results do not depend on
// the other sequences.
template <class T>
void attend_stored(const cl::Continued<T>& head, float* scratch) {
  const int64_t d = head.d, width = padded(d), groups = head.groups, prefix = head.prefix_length, own_at = padded(prefix);
  int64_t rows = 0, longest = 0;
  for (int64_t s = 0; s < head.sequences; ++s) {
    rows += head.widths[s] * groups;
    const int64_t all = head.lengths[s] + head.widths[s];
    longest = all > longest ? all : longest;
  }
  const int64_t row = own_at + padded(longest);
  float* queries = scratch;
  float* results = queries + rows * width;
  float* products = results + rows * width;
  float* totals = products + rows * row;
  for (int64_t t = 0; t < rows / groups; ++t) copy_rows(head.q + t * head.q_stride, d, groups, d, queries + t * groups * width);
  multiply_keys(rows, prefix, d, {queries, width, 1}, head.prefix.keys, products, row);
  for (int64_t s = 0, start = 0; s < head.sequences; start += head.widths[s] * groups, ++s) {
    const int64_t all = head.lengths[s] + head.widths[s];
    float* of_own = products + start * row + own_at;
    const T* keys = head.own.keys + head.slots[s] * head.slot_keys;
    multiply_keys(head.widths[s] * groups, all, d, {queries + start * width, width, 1}, keys, of_own, row);
    for (int64_t i = 0; i < head.widths[s] * groups; ++i) {
      const int64_t seen = head.lengths[s] + i / groups + 1;
      const int64_t first = head.window > 0 && head.window < seen ? seen - head.window : 0;
      float *before = products + (start + i) * row, *own = before + own_at;
      float most = score(own, first, seen, head.scale, head.softcap);
      if (prefix > 0) {
        const float other = score(before, 0, prefix, head.scale, head.softcap);
        most = other > most ? other : most;
      }
      totals[start + i] = weights_of(before, 0, prefix, own_at, 1, most) + weights_of(own, first, seen, padded(all), 1, most);
    }
  }
  if (prefix > 0) multiply(rows, width, prefix, {products, row, 1}, head.prefix.values, width, results, width, false);
  for (int64_t s = 0, start = 0; s < head.sequences; start += head.widths[s] * groups, ++s) {
    const T* values = head.own.values + head.slots[s] * head.slot_values;
    multiply(head.widths[s] * groups, width, head.lengths[s] + head.widths[s], {products + start * row + own_at, row, 1}, values,
             width, results + start * width, width, prefix > 0);
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; j += kLanes) store(results + i * width + j, load(results + i * width + j) / totals[i]);
  }
  for (int64_t t = 0; t < rows / groups; ++t) narrow_rows(results + t * groups * width, width, groups, d, head.out + t * head.q_stride, d);
}

}  // namespace

namespace cl {

extern const Kernels CL_KERNELS = {
    {silu_mul<float>, silu_mul_back<float>, norm_weight<float>, rotate<float>, attend<float>, attend_back<float>, append<float>,
     attend_stored<float>, dot_rows<float>},
    {silu_mul<bf16>, silu_mul_back<bf16>, norm_weight<bf16>, rotate<bf16>, attend<bf16>, attend_back<bf16>, append<bf16>,
     attend_stored<bf16>, dot_rows<bf16>},
    {norm<float, float>, norm_back<float, float>},
    {norm<bf16, float>, norm_back<bf16, float>},
    {norm<bf16, bf16>, norm_back<bf16, bf16>},
    attend_scratch,
    attend_back_scratch,
    attend_stored_scratch,
#if defined(__AVX512F__)
    48,
#elif defined(__AVX2__)
    32,
#else
    0,
#endif
};

}  // namespace cl
