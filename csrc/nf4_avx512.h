// SPDX-License-Identifier: Apache-2.0
// The decoder of nf4.h for AVX-512: a block's 16 results stand in one register, and one permute looks up 16 floats or 32
// halves.
#pragma once

#include "avx512.h"
#include "nf4_product.h"

#ifdef FASTADAPT_X86

namespace fastadapt {

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

}  // namespace fastadapt

#endif
