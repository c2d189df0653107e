// SPDX-License-Identifier: Apache-2.0
// philox4x32-10 (Salmon et al., SC 2011): a counter and a key to four random 32-bit words.
//   words: (count, 4) for the counters first, first + 1, ...; none of these may cross a multiple of 2^32
#pragma once

#include <cstdint>

#include "avx512.h"

namespace fastadapt {

constexpr uint32_t kMul0 = 0xd2511f53, kMul1 = 0xcd9e8d57, kKey0 = 0x9e3779b9, kKey1 = 0xbb67ae85;
constexpr int kRounds = 10;

inline void philox_plain(uint64_t key, uint64_t first, int count, uint32_t* words) {
  for (int i = 0; i < count; ++i) {
    uint32_t c0 = static_cast<uint32_t>(first) + i, c1 = static_cast<uint32_t>(first >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int r = 0; r < kRounds; ++r, k0 += kKey0, k1 += kKey1) {
      const uint64_t a = uint64_t{kMul0} * c0, b = uint64_t{kMul1} * c2;
      c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
      c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
      c1 = static_cast<uint32_t>(b);
      c3 = static_cast<uint32_t>(a);
    }
    words[4 * i] = c0;
    words[4 * i + 1] = c1;
    words[4 * i + 2] = c2;
    words[4 * i + 3] = c3;
  }
}

#ifdef FASTADAPT_X86
// Four counters a register, each word in the low half of 64 bits: the multiply reads no more, so the high halves may
// hold anything. The counters stand in the order 0 2 1 3, so that unpacking leaves them in theirs. count % 4 == 0.
FASTADAPT_AVX2 inline void philox_avx2(uint64_t key, uint64_t first, int count, uint32_t* words) {
  __m256i keys[2 * kRounds];
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int r = 0; r < kRounds; ++r, k0 += kKey0, k1 += kKey1) {
    keys[2 * r] = _mm256_set1_epi64x(k0);
    keys[2 * r + 1] = _mm256_set1_epi64x(k1);
  }
  const __m256i mul0 = _mm256_set1_epi64x(kMul0), mul1 = _mm256_set1_epi64x(kMul1);
  const __m256i high = _mm256_set1_epi64x(first >> 32), order = _mm256_setr_epi64x(0, 2, 1, 3);
  for (int i = 0; i < count; i += 4) {
    __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<uint32_t>(first) + i), order), c1 = high;
    __m256i c2 = _mm256_setzero_si256(), c3 = c2;
#pragma GCC unroll 10
    for (int r = 0; r < kRounds; ++r) {
      const __m256i a = _mm256_mul_epu32(c0, mul0), b = _mm256_mul_epu32(c2, mul1);
      c0 = _mm256_xor_si256(_mm256_srli_epi64(b, 32), _mm256_xor_si256(c1, keys[2 * r]));
      c2 = _mm256_xor_si256(_mm256_srli_epi64(a, 32), _mm256_xor_si256(c3, keys[2 * r + 1]));
      c1 = b;
      c3 = a;
    }
    const __m256i c01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xaa);
    const __m256i c23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xaa);
    __m256i* to = reinterpret_cast<__m256i*>(words + 4 * i);
    _mm256_storeu_si256(to, _mm256_unpacklo_epi64(c01, c23));
    _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi64(c01, c23));
  }
}

// Which of 64 elements dropout keeps (dropout.cpp), one a bit; `first` is a multiple of 8. Eight counters, 8 lanes each.
FASTADAPT_AVX512 inline uint64_t keep64(uint64_t key, uint64_t first, uint32_t threshold) {
  const __m512i mul0 = _mm512_set1_epi64(kMul0), mul1 = _mm512_set1_epi64(kMul1);
  __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(first / 8), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  __m512i c1 = _mm512_srli_epi64(c0, 32), c2 = _mm512_setzero_si512(), c3 = c2;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
  for (int r = 0; r < kRounds; ++r, k0 += kKey0, k1 += kKey1) {
    const __m512i a = _mm512_mul_epu32(c0, mul0), b = _mm512_mul_epu32(c2, mul1);
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(b, 32), c1, _mm512_set1_epi64(k0), 0x96);
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), c3, _mm512_set1_epi64(k1), 0x96);
    c1 = b;
    c3 = a;
  }
  const __m512i least = _mm512_set1_epi16(static_cast<short>(threshold));
  const __m512i c01 = _mm512_mask_blend_epi32(0xaaaa, c0, _mm512_slli_epi64(c1, 32));
  const __m512i c23 = _mm512_mask_blend_epi32(0xaaaa, c2, _mm512_slli_epi64(c3, 32));
  return _pdep_u64(_mm512_cmpge_epu16_mask(c01, least), 0x0f0f0f0f0f0f0f0f) |
         _pdep_u64(_mm512_cmpge_epu16_mask(c23, least), 0xf0f0f0f0f0f0f0f0);
}
#endif

}  // namespace fastadapt
