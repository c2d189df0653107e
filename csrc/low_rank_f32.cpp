// SPDX-License-Identifier: Apache-2.0
// low_rank_avx512.h in float32. A sum of at most 128 products stands in a register, and such sums are added: a single long
// one loses digits.
#include <cstring>

#include <torch/csrc/stable/ops.h>

#include "low_rank.h"
#include "philox.h"

#ifdef FASTADAPT_X86
#define TARGET FASTADAPT_AVX512

namespace fastadapt {
namespace {

TARGET inline __mmask16 mask16(int64_t left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }

struct Number {
  static constexpr int64_t kPer = 1, kUnits = 128;

  TARGET static __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }

  static int64_t lane(int64_t vector, int64_t l) { return 16 * vector + l; }
  TARGET static void natural(__m512*) {}
  TARGET static void arrange(__m512i low, __m512i high, __m512i out[2]) {
    out[0] = low;
    out[1] = high;
  }
  TARGET static void lanes_of(uint32_t keep, __mmask16 out[2]) {
    out[0] = static_cast<__mmask16>(keep);
    out[1] = static_cast<__mmask16>(keep >> 16);
  }

  TARGET static __m512i both(__m512 first, __m512) { return _mm512_castps_si512(first); }
  TARGET static __m512i units(const float* from, int64_t left, float scale) {
    return _mm512_castps_si512(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask16(left), from), _mm512_set1_ps(scale)));
  }
  TARGET static __m512i load(const char* from, int64_t left) { return _mm512_maskz_loadu_epi32(mask16(left), from); }
  TARGET static void pair(const char* first, const char*, int64_t left, __m512i out[2]) {
    out[0] = load(first, left);
    out[1] = load(first + 64, left - 16);
  }
  TARGET static void pair_masked(const char* first, const char*, int64_t left, uint32_t keep, uint32_t, __m512i out[2]) {
    for (int i = 0; i < 2; ++i)
      out[i] = _mm512_maskz_loadu_epi32(mask16(left - 16 * i) & static_cast<__mmask16>(keep >> 16 * i), first + 64 * i);
  }
  TARGET static void mask64(const char* from, uint64_t keep, int64_t left, char* to) {
    for (int i = 0; i < 4; ++i)
      _mm512_storeu_si512(to + 64 * i, _mm512_maskz_loadu_epi32(
                                           mask16(left - 16 * i) & static_cast<__mmask16>(keep >> 16 * i), from + 64 * i));
  }

  TARGET static __m512i table(__m512 values) { return _mm512_castps_si512(values); }
  TARGET static __m512i pick(__m512i table, const uint8_t* packed) {
    const __m512i b = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
    return _mm512_permutexvar_epi32(_mm512_or_si512(_mm512_srli_epi64(b, 4), _mm512_slli_epi64(b, 32)), table);
  }
  TARGET static void pick_pair(__m512 values, __m512, const uint8_t* first, const uint8_t*, int64_t width, __m512i* out) {
    for (int64_t c = 0; c < width; c += 16) out[c / 16] = pick(_mm512_castps_si512(values), first + c / 2);
  }

  TARGET static void store16(__m512 v, __mmask16 here, char* to) { _mm512_mask_storeu_ps(to, here, v); }
  TARGET static void store32(__m512 v[2], int64_t left, bool add, char* to) {
    for (int i = 0; i < 2; ++i) {
      const __mmask16 here = mask16(left - 16 * i);
      if (add) v[i] = _mm512_add_ps(v[i], _mm512_maskz_loadu_ps(here, to + 64 * i));
      _mm512_mask_storeu_ps(to + 64 * i, here, v[i]);
    }
  }
};

#include "low_rank_avx512.h"

}  // namespace

void forward_f32(const Forward& f) { forward(f); }
void backward_f32(const Backward& f) { backward(f); }

}  // namespace fastadapt
#endif
