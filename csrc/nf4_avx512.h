// SPDX-License-Identifier: Apache-2.0
// The decoder of nf4.h and the products of nf4_product.h for AVX-512: a block's 16 results stand in one register, and one
// permute looks up 16 floats or 32 halves. The bf16 products add pairs in fp32 (vdpbf16ps) and round each result once.
#pragma once

#include <cstring>

#include "nf4_product.h"

#ifdef FASTADAPT_X86
#define FASTADAPT_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#define FASTADAPT_BF16 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace fastadapt {

inline bool has_avx512() {
  static const bool found = has_fma() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return found;
}

inline bool has_avx512_bf16() {
  static const bool found = [] {  // by cpuid, as f16c in isa.h: leaf 7, subleaf 1
    unsigned a, b, c, d;
    return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
  }();
  return found;
}

FASTADAPT_AVX512 inline __m512i bf16_bits(__m512 v) {  // in the low half of each 32 bits; vcvtneps2bf16 drops denormals
  __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  u = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  return _mm512_mask_mov_epi32(u, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
}

FASTADAPT_AVX512 inline __m512 rounded(__m512 v, ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return _mm512_castsi512_ps(_mm512_slli_epi32(bf16_bits(v), 16));
  if (dtype == ScalarType::Half) return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  return v;
}

FASTADAPT_AVX512 inline __m512 table_of(const Nf4& w, int64_t block) {
  const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(w.code), _mm512_set1_ps(w.scale(block)));
  return w.round == w.out ? v : rounded(v, w.round);
}

FASTADAPT_AVX512 inline __m256i halves_of(__m512 table, ScalarType out) {
  if (out == ScalarType::Half) return _mm512_cvtps_ph(table, _MM_FROUND_TO_NEAREST_INT);
  return _mm512_cvtepi32_epi16(bf16_bits(table));
}

FASTADAPT_AVX512 inline __m512i bytes16(const uint8_t* packed) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
}

// 32 halves for 16 bytes. The permute reads 5 bits of an index, so the table stands there twice.
FASTADAPT_AVX512 inline __m512i pick(__m512i twice, const uint8_t* packed) {
  const __m512i b = bytes16(packed);
  return _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi32(b, 4), _mm512_slli_epi32(b, 16)), twice);
}

// 16 floats for 8 bytes; the permute reads 4 bits of an index.
FASTADAPT_AVX512 inline __m512 pick(__m512 table, const uint8_t* packed) {
  const __m512i b = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
  return _mm512_permutexvar_ps(_mm512_or_si512(_mm512_srli_epi64(b, 4), _mm512_slli_epi64(b, 32)), table);
}

FASTADAPT_AVX512 inline void decode_block512(const Nf4& w, int64_t block, const uint8_t* packed, int64_t n, uint16_t* out) {
  const __m256i table = halves_of(table_of(w, block), w.out);
  const __m512i twice = _mm512_broadcast_i64x4(table);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) _mm512_storeu_si512(out + i, pick(twice, packed + i / 2));
  if (i < n) {
    alignas(32) uint16_t spilled[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(spilled), table);
    look_up(packed, spilled, i, n, out);
  }
}

FASTADAPT_AVX512 inline void decode_block512(const Nf4& w, int64_t block, const uint8_t* packed, int64_t n, float* out) {
  const __m512 table = table_of(w, block);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) _mm512_storeu_ps(out + i, pick(table, packed + i / 2));
  if (i < n) {
    alignas(64) float spilled[16];
    _mm512_store_ps(spilled, table);
    look_up(packed, spilled, i, n, out);
  }
}

template <class T>
FASTADAPT_AVX512 void decode_avx512(const Nf4& w, int64_t block, int64_t end, T* out) {
  for (; block < end; ++block) {
    const int64_t first = block * w.blocksize;
    decode_block512(w, block, w.packed + first / 2, w.length(block), out + first);
  }
}

struct HalfProduct {
  Nf4 w;              // (n, k), k a multiple of the blocksize, the blocksize one of 64; out = bfloat16
  const uint16_t* x;  // (m, k), or (m, n) for y += x W
  uint16_t* y;        // (m, n), or (m, k)
  int64_t m, n, k;
};

constexpr int64_t kTokens = 6, kHalfRows = 4;  // 24 sums in registers
constexpr int64_t kPairs = 32, kWide = 256;    // a tile of dx: 64 rows by 256 columns, 32 kB

// The dot products of 4 rows with `Tokens` inputs.
template <int Tokens>
FASTADAPT_BF16 inline void half_dots(const uint16_t* x, int64_t stride, const uint16_t* rows, int64_t k, int64_t count,
                                     uint16_t* y, int64_t step) {
  __m512 sum[Tokens][kHalfRows];
  for (int t = 0; t < Tokens; ++t)
    for (int r = 0; r < kHalfRows; ++r) sum[t][r] = _mm512_setzero_ps();
  for (int64_t j = 0; j < k; j += 32) {
    __m512bh w[kHalfRows];
    for (int r = 0; r < kHalfRows; ++r) w[r] = (__m512bh)_mm512_loadu_si512(rows + r * k + j);
    for (int t = 0; t < Tokens; ++t) {
      const __m512bh v = (__m512bh)_mm512_loadu_si512(x + t * stride + j);
      for (int r = 0; r < kHalfRows; ++r) sum[t][r] = _mm512_dpbf16_ps(sum[t][r], w[r], v);
    }
  }
  for (int t = 0; t < Tokens; ++t)
    for (int r = 0; r < count; ++r)
      y[t * step + r] = to_bf16(from_bf16(y[t * step + r]) + _mm512_reduce_add_ps(sum[t][r]));
}

// y[:, rows] += x W[rows]^T
FASTADAPT_BF16 inline void forward_bf16(const HalfProduct& p, int64_t begin, int64_t end, uint16_t* rows) {
  for (int64_t i = begin; i < end; i += kHalfRows) {
    const int64_t count = std::min(kHalfRows, end - i);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t j = 0; j < p.k; j += p.w.blocksize) {
        const int64_t first = (i + r) * p.k + j;
        decode_block512(p.w, first / p.w.blocksize, p.w.packed + first / 2, p.w.blocksize, rows + r * p.k + j);
      }
    int64_t t = 0;
    for (; t + kTokens <= p.m; t += kTokens)
      half_dots<kTokens>(p.x + t * p.k, p.k, rows, p.k, count, p.y + t * p.n + i, p.n);
    for (; t + 2 <= p.m; t += 2) half_dots<2>(p.x + t * p.k, p.k, rows, p.k, count, p.y + t * p.n + i, p.n);
    for (; t < p.m; ++t) half_dots<1>(p.x + t * p.k, p.k, rows, p.k, count, p.y + t * p.n + i, p.n);
  }
}

// Two rows, 64 columns, as pairs: the even columns of 0-31, the odd ones, the even of 32-63, the odd ones. The tables of
// both rows stand in one register, so that one permute gives the pairs that vdpbf16ps multiplies.
FASTADAPT_BF16 inline void decode_pairs(const Nf4& w, int64_t upper, int64_t lower, bool both, uint16_t* out) {
  const __m256i high = both ? halves_of(table_of(w, lower / w.blocksize), w.out) : _mm256_setzero_si256();
  const __m512i tables =
      _mm512_inserti64x4(_mm512_castsi256_si512(halves_of(table_of(w, upper / w.blocksize), w.out)), high, 1);
  const __m512i second = _mm512_set1_epi32(16 << 16), nibble = _mm512_set1_epi32(15);
  for (int h = 0; h < 2; ++h) {
    const __m512i a = bytes16(w.packed + upper / 2 + 16 * h), b = bytes16(w.packed + (both ? lower : upper) / 2 + 16 * h);
    const __m512i even = _mm512_or_si512(_mm512_srli_epi32(a, 4), _mm512_slli_epi32(_mm512_srli_epi32(b, 4), 16));
    const __m512i odd = _mm512_or_si512(_mm512_and_si512(a, nibble), _mm512_slli_epi32(_mm512_and_si512(b, nibble), 16));
    _mm512_storeu_si512(out + 64 * h, _mm512_permutexvar_epi16(_mm512_or_si512(even, second), tables));
    _mm512_storeu_si512(out + 64 * h + 32, _mm512_permutexvar_epi16(_mm512_or_si512(odd, second), tables));
  }
}

// sums (Tokens, 64) += g (Tokens, 2 pairs) tile (pairs, 64), the columns in the order of decode_pairs
template <int Tokens>
FASTADAPT_BF16 inline void add_pairs(const uint32_t* g, const uint16_t* tile, int64_t pairs, float* sums) {
  __m512 sum[Tokens][4];
  for (int t = 0; t < Tokens; ++t)
    for (int c = 0; c < 4; ++c) sum[t][c] = _mm512_loadu_ps(sums + t * kWide + 16 * c);
  for (int64_t i = 0; i < pairs; ++i) {
    __m512bh w[4];
    for (int c = 0; c < 4; ++c) w[c] = (__m512bh)_mm512_loadu_si512(tile + i * 2 * kWide + 32 * c);
    for (int t = 0; t < Tokens; ++t) {
      const __m512bh v = (__m512bh)_mm512_set1_epi32(static_cast<int>(g[t * kPairs + i]));
      for (int c = 0; c < 4; ++c) sum[t][c] = _mm512_dpbf16_ps(sum[t][c], w[c], v);
    }
  }
  for (int t = 0; t < Tokens; ++t)
    for (int c = 0; c < 4; ++c) _mm512_storeu_ps(sums + t * kWide + 16 * c, sum[t][c]);
}

// y[:, columns] += x W[:, columns], count a multiple of 64 and at most kWide; tile: 2 kPairs kWide, pairs: m kPairs,
// sums: m kWide
FASTADAPT_BF16 inline void backward_bf16(const HalfProduct& p, int64_t column, int64_t count, uint16_t* tile,
                                         uint32_t* pairs, float* sums) {
  std::fill(sums, sums + p.m * kWide, 0.0f);
  for (int64_t i = 0; i < p.n; i += 2 * kPairs) {
    const int64_t rows = std::min(2 * kPairs, p.n - i), here = (rows + 1) / 2;
    for (int64_t r = 0; r < here; ++r)
      for (int64_t c = 0; c < count; c += 64) {
        const int64_t first = (i + 2 * r) * p.k + column + c;
        decode_pairs(p.w, first, first + p.k, 2 * r + 1 < rows, tile + r * 2 * kWide + 2 * c);
      }
    for (int64_t t = 0; t < p.m; ++t) {
      pairs[t * kPairs + here - 1] = 0;
      std::memcpy(pairs + t * kPairs, p.x + t * p.n + i, rows * sizeof(uint16_t));
    }
    for (int64_t c = 0; c < count; c += 64) {
      int64_t t = 0;
      for (; t + kTokens <= p.m; t += kTokens)
        add_pairs<kTokens>(pairs + t * kPairs, tile + 2 * c, here, sums + t * kWide + c);
      for (; t + 2 <= p.m; t += 2) add_pairs<2>(pairs + t * kPairs, tile + 2 * c, here, sums + t * kWide + c);
      for (; t < p.m; ++t) add_pairs<1>(pairs + t * kPairs, tile + 2 * c, here, sums + t * kWide + c);
    }
  }
  for (int64_t t = 0; t < p.m; ++t)
    for (int64_t c = 0; c < count; c += 32) {
      const float *even = sums + t * kWide + c, *odd = even + 16;
      uint16_t* y = p.y + t * p.k + column + c;
      for (int64_t j = 0; j < 16; ++j) {
        y[2 * j] = to_bf16(from_bf16(y[2 * j]) + even[j]);
        y[2 * j + 1] = to_bf16(from_bf16(y[2 * j + 1]) + odd[j]);
      }
    }
}

}  // namespace fastadapt

#endif
