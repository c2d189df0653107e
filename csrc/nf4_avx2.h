// SPDX-License-Identifier: Apache-2.0
// The decoder of nf4.h with 16-entry tables in registers: halves as two byte tables (pshufb), floats as two vpermps.
#pragma once

#include "nf4.h"

#ifdef FASTADAPT_X86

namespace fastadapt {

FASTADAPT_AVX2 inline __m256i bf16_bits(__m256 v) {  // in the low half of each 32 bits
  __m256i u = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  u = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(u, _mm256_set1_epi32(0x7fc0), nan);
}

FASTADAPT_AVX2 inline __m128i f16_bits(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

FASTADAPT_AVX2 inline __m256 rounded(__m256 v, ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return _mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits(v), 16));
  if (dtype == ScalarType::Half) return _mm256_cvtph_ps(f16_bits(v));
  return v;
}

// The 16 values of one block; where they are rounded to the dtype of `out`, storing them does it.
FASTADAPT_AVX2 inline void make_table(const Nf4& w, int64_t block, __m256* low, __m256* high) {
  const __m256 scale = _mm256_set1_ps(w.scale(block));
  *low = _mm256_mul_ps(_mm256_loadu_ps(w.code), scale);
  *high = _mm256_mul_ps(_mm256_loadu_ps(w.code + 8), scale);
  if (w.round == w.out) return;
  *low = rounded(*low, w.round);
  *high = rounded(*high, w.round);
}

FASTADAPT_AVX2 inline __m256i pack_table(__m256 low, __m256 high, ScalarType out) {  // 16 halves
  if (out == ScalarType::Half) return _mm256_set_m128i(f16_bits(high), f16_bits(low));
  __m256i mixed = _mm256_packus_epi32(bf16_bits(low), bf16_bits(high));
  return _mm256_permute4x64_epi64(mixed, 0xd8);
}

// Nibbles of 16 bytes, one a byte, so that unpacking within each 128-bit lane leaves runs of 8 in order:
// elements 0-7 and 16-23 in the low lane, 8-15 and 24-31 in the high one.
FASTADAPT_AVX2 inline __m256i nibbles_crossed(const uint8_t* packed) {
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  bytes = _mm_shuffle_epi32(bytes, 0xd8);
  const __m128i mask = _mm_set1_epi8(15);
  __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask), odd = _mm_and_si128(bytes, mask);
  return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}

FASTADAPT_AVX2 inline void decode_block(const Nf4& w, int64_t block, const uint8_t* packed, int64_t n, uint16_t* out) {
  __m256 low, high;
  make_table(w, block, &low, &high);
  const __m256i table = pack_table(low, high, w.out);
  const __m256i split = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12,
                                         14, 1, 3, 5, 7, 9, 11, 13, 15);
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(table, split), 0xd8);
  const __m256i low_bytes = _mm256_permute2x128_si256(bytes, bytes, 0x00);
  const __m256i high_bytes = _mm256_permute2x128_si256(bytes, bytes, 0x11);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m256i index = nibbles_crossed(packed + i / 2);
    const __m256i a = _mm256_shuffle_epi8(low_bytes, index), b = _mm256_shuffle_epi8(high_bytes, index);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_unpacklo_epi8(a, b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i + 16), _mm256_unpackhi_epi8(a, b));
  }
  if (i < n) {
    alignas(32) uint16_t spilled[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(spilled), table);
    look_up(packed, spilled, i, n, out);
  }
}

// 8 floats for the 8 nibbles of 4 bytes, given one a byte in the low half of `nibbles`.
FASTADAPT_AVX2 inline __m256 pick(__m256 low, __m256 high, __m128i nibbles) {
  const __m256i index = _mm256_cvtepu8_epi32(nibbles);
  const __m256 upper_half = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 becomes the sign
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper_half);
}

FASTADAPT_AVX2 inline void decode_block(const Nf4& w, int64_t block, const uint8_t* packed, int64_t n, float* out) {
  __m256 low, high;
  make_table(w, block, &low, &high);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m256i index = nibbles_crossed(packed + i / 2);
    const __m128i a = _mm256_castsi256_si128(index), b = _mm256_extracti128_si256(index, 1);
    _mm256_storeu_ps(out + i, pick(low, high, a));
    _mm256_storeu_ps(out + i + 8, pick(low, high, b));
    _mm256_storeu_ps(out + i + 16, pick(low, high, _mm_srli_si128(a, 8)));
    _mm256_storeu_ps(out + i + 24, pick(low, high, _mm_srli_si128(b, 8)));
  }
  if (i < n) {
    alignas(32) float spilled[16];
    _mm256_store_ps(spilled, low);
    _mm256_store_ps(spilled + 8, high);
    look_up(packed, spilled, i, n, out);
  }
}

template <class T>
FASTADAPT_AVX2 void decode_avx2(const Nf4& w, int64_t block, int64_t end, T* out) {
  for (; block < end; ++block) {
    const int64_t first = block * w.blocksize;
    decode_block(w, block, w.packed + first / 2, w.length(block), out + first);
  }
}

}  // namespace fastadapt

#endif
