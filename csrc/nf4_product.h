// SPDX-License-Identifier: Apache-2.0
// Rows of a 4-bit weight, decoded into cache and multiplied there: y += x W^T and y += x W for few tokens.
#pragma once

#include "nf4_avx2.h"

namespace fastadapt {

constexpr int64_t kRows = 4;      // rows of W decoded together
constexpr int64_t kColumns = 512;  // columns of dx that one thread owns at a time

struct Product {
  Nf4 w;          // (n, k), k a multiple of the blocksize, out = float
  const float* x;  // (m, k), or (m, n) for y += x W
  float* y;        // (m, n), or (m, k)
  int64_t m, n, k;
};

template <class Decode>
FASTADAPT_INLINE void decode_part(const Nf4& w, int64_t first, int64_t count, float* out, Decode decode) {
  for (int64_t i = 0; i < count; i += w.blocksize)
    decode(w, (first + i) / w.blocksize, w.packed + (first + i) / 2, std::min(w.blocksize, count - i), out + i);
}

inline void decode_one_plain(const Nf4& w, int64_t block, const uint8_t* packed, int64_t n, float* out) {
  const float scale = w.scale(block);
  float table[16];
  for (int k = 0; k < 16; ++k) table[k] = rounded(w.code[k] * scale, w.round);
  look_up(packed, table, 0, n, out);
}

// y[:, rows] += x W[rows]^T
inline void forward_plain(const Product& p, int64_t begin, int64_t end, float* row) {
  for (int64_t i = begin; i < end; ++i) {
    decode_part(p.w, i * p.k, p.k, row, decode_one_plain);
    for (int64_t t = 0; t < p.m; ++t) {
      float sum = 0;
      for (int64_t j = 0; j < p.k; ++j) sum += p.x[t * p.k + j] * row[j];
      p.y[t * p.n + i] += sum;
    }
  }
}

// y[:, columns] += x W[:, columns]
inline void backward_plain(const Product& p, int64_t column, int64_t count, float* row) {
  for (int64_t i = 0; i < p.n; ++i) {
    decode_part(p.w, i * p.k + column, count, row, decode_one_plain);
    for (int64_t t = 0; t < p.m; ++t) {
      const float g = p.x[t * p.n + i];
      float* y = p.y + t * p.k + column;
      for (int64_t j = 0; j < count; ++j) y[j] += g * row[j];
    }
  }
}

#ifdef FASTADAPT_X86
#define FASTADAPT_FMA __attribute__((target("avx2,f16c,fma")))

inline bool has_fma() {
  static const bool found = has_avx2() && __builtin_cpu_supports("fma");
  return found;
}

FASTADAPT_FMA inline float total(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

// The dot products of one row with `Tokens` inputs; k is a multiple of 16 (a block has 32 elements at least).
template <int Tokens>
FASTADAPT_FMA inline void dots(const float* x, int64_t stride, const float* row, int64_t k, float* y, int64_t step) {
  __m256 even[Tokens], odd[Tokens];
  for (int t = 0; t < Tokens; ++t) even[t] = odd[t] = _mm256_setzero_ps();
  for (int64_t j = 0; j < k; j += 16) {
    const __m256 a = _mm256_loadu_ps(row + j), b = _mm256_loadu_ps(row + j + 8);
    for (int t = 0; t < Tokens; ++t) {
      even[t] = _mm256_fmadd_ps(a, _mm256_loadu_ps(x + t * stride + j), even[t]);
      odd[t] = _mm256_fmadd_ps(b, _mm256_loadu_ps(x + t * stride + j + 8), odd[t]);
    }
  }
  for (int t = 0; t < Tokens; ++t) y[t * step] += total(_mm256_add_ps(even[t], odd[t]));
}

FASTADAPT_FMA inline void decode_row(const Nf4& w, int64_t first, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += w.blocksize)
    decode_block(w, (first + i) / w.blocksize, w.packed + (first + i) / 2, std::min(w.blocksize, count - i), out + i);
}

FASTADAPT_FMA inline void forward_fma(const Product& p, int64_t begin, int64_t end, float* row) {
  for (int64_t i = begin; i < end; ++i) {
    decode_row(p.w, i * p.k, p.k, row);
    int64_t t = 0;
    for (; t + 4 <= p.m; t += 4) dots<4>(p.x + t * p.k, p.k, row, p.k, p.y + t * p.n + i, p.n);
    for (; t < p.m; ++t) dots<1>(p.x + t * p.k, p.k, row, p.k, p.y + t * p.n + i, p.n);
  }
}

// y += sum_r g[r] rows[r]
template <int Rows>
FASTADAPT_FMA inline void add_rows(const float* g, const float* rows, int64_t stride, int64_t count, float* y) {
  __m256 scale[Rows];
  for (int r = 0; r < Rows; ++r) scale[r] = _mm256_set1_ps(g[r]);
  for (int64_t j = 0; j < count; j += 8) {
    __m256 sum = _mm256_loadu_ps(y + j);
    for (int r = 0; r < Rows; ++r) sum = _mm256_fmadd_ps(scale[r], _mm256_loadu_ps(rows + r * stride + j), sum);
    _mm256_storeu_ps(y + j, sum);
  }
}

FASTADAPT_FMA inline void backward_fma(const Product& p, int64_t column, int64_t count, int64_t stride, float* rows) {
  int64_t i = 0;
  for (; i + kRows <= p.n; i += kRows) {
    for (int64_t r = 0; r < kRows; ++r) decode_row(p.w, (i + r) * p.k + column, count, rows + r * stride);
    for (int64_t t = 0; t < p.m; ++t)
      add_rows<kRows>(p.x + t * p.n + i, rows, stride, count, p.y + t * p.k + column);
  }
  for (; i < p.n; ++i) {
    decode_row(p.w, i * p.k + column, count, rows);
    for (int64_t t = 0; t < p.m; ++t) add_rows<1>(p.x + t * p.n + i, rows, stride, count, p.y + t * p.k + column);
  }
}
#endif

}  // namespace fastadapt
