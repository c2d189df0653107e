// SPDX-License-Identifier: Apache-2.0
// What the AVX-512 kernels share: their targets, roundings, a transpose.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "isa.h"

#ifdef FASTADAPT_X86
#define FASTADAPT_AVX512 __attribute__((target("avx2,bmi,bmi2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#define FASTADAPT_BF16 __attribute__((target("avx2,bmi,bmi2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace fastadapt {

using torch::headeronly::ScalarType;

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

// Rows to columns of 16 x 16 words.
FASTADAPT_AVX512 inline void transpose(__m512i v[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

}  // namespace fastadapt
#endif
