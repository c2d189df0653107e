// SPDX-License-Identifier: Apache-2.0
// low_rank_avx512.h in bfloat16: pairs are multiplied and added in fp32 (vdpbf16ps), and each result is rounded once.
#include <cstring>

#include <torch/csrc/stable/ops.h>

#include "low_rank.h"
#include "philox.h"

#ifdef FASTADAPT_X86
#define TARGET FASTADAPT_BF16

namespace fastadapt {
namespace {

TARGET inline __mmask16 mask16(int64_t left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }
TARGET inline __mmask32 mask32(int64_t left) { return left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1; }

struct Number {
  static constexpr int64_t kPer = 2, kUnits = 512;

  TARGET static __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

  // Outputs of 32 stand as the 16 even ones and the 16 odd ones.
  static int64_t lane(int64_t vector, int64_t l) { return vector / 2 * 32 + 2 * l + vector % 2; }
  TARGET static void natural(__m512 v[2]) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 even = v[0];
    v[0] = _mm512_permutex2var_ps(even, low, v[1]);
    v[1] = _mm512_permutex2var_ps(even, high, v[1]);
  }
  TARGET static void arrange(__m512i low, __m512i high, __m512i out[2]) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    out[0] = _mm512_permutex2var_epi32(low, even, high);
    out[1] = _mm512_permutex2var_epi32(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
  }
  TARGET static void lanes_of(uint32_t keep, __mmask16 out[2]) {
    out[0] = _pext_u32(keep, 0x55555555);
    out[1] = _pext_u32(keep, 0xaaaaaaaa);
  }

  TARGET static __m512i both(__m512 first, __m512 second) {
    return _mm512_or_si512(bf16_bits(first), _mm512_slli_epi32(bf16_bits(second), 16));
  }
  TARGET static __m512i units(const float* from, int64_t left, float scale) {
    const __m512 factor = _mm512_set1_ps(scale);
    const __m512 low = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask16(left), from), factor);
    const __m512 high = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask16(left - 16), from + 16), factor);
    return join(low, high);
  }
  TARGET static __m512i load(const char* from, int64_t left) { return _mm512_maskz_loadu_epi16(mask32(left), from); }
  TARGET static void interleave(__m512i first, __m512i second, __m512i out[2]) {
    const __m512i low = _mm512_set1_epi32(0xffff);
    out[0] = _mm512_or_si512(_mm512_and_si512(first, low), _mm512_slli_epi32(second, 16));
    out[1] = _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_andnot_si512(low, second));
  }
  TARGET static void pair(const char* first, const char* second, int64_t left, __m512i out[2]) {
    interleave(load(first, left), second ? load(second, left) : _mm512_setzero_si512(), out);
  }
  TARGET static void pair_masked(const char* first, const char* second, int64_t left, uint32_t keep, uint32_t keep_second,
                                 __m512i out[2]) {
    const __mmask32 here = mask32(left);
    interleave(_mm512_maskz_loadu_epi16(here & keep, first),
               second ? _mm512_maskz_loadu_epi16(here & keep_second, second) : _mm512_setzero_si512(), out);
  }
  TARGET static void mask64(const char* from, uint64_t keep, int64_t left, char* to) {
    for (int i = 0; i < 2; ++i)
      _mm512_storeu_si512(to + 64 * i, _mm512_maskz_loadu_epi16(mask32(left - 32 * i) & static_cast<uint32_t>(keep >> 32 * i),
                                                               from + 64 * i));
  }

  TARGET static __m512i table(__m512 values) {  // the permute reads 5 bits of an index, so the table stands there twice
    return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(bf16_bits(values)));
  }
  TARGET static __m512i bytes16(const uint8_t* packed) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  }
  TARGET static __m512i pick(__m512i table, const uint8_t* packed) {
    const __m512i b = bytes16(packed);
    return _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi32(b, 4), _mm512_slli_epi32(b, 16)), table);
  }
  // The tables of both rows stand in one register, so that one permute gives pairs.
  TARGET static void pick_pair(__m512 upper, __m512 lower, const uint8_t* first, const uint8_t* second, int64_t width,
                               __m512i* out) {
    const __m512i tables = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(bf16_bits(upper))),
                                              _mm512_cvtepi32_epi16(bf16_bits(lower)), 1);
    const __m512i nibble = _mm512_set1_epi32(15), half = _mm512_set1_epi32(16 << 16);
    for (int64_t c = 0; c < width; c += 32) {
      const __m512i a = bytes16(first + c / 2), b = bytes16(second + c / 2);
      const __m512i even = _mm512_or_si512(_mm512_srli_epi32(a, 4), _mm512_slli_epi32(_mm512_srli_epi32(b, 4), 16));
      const __m512i odd =
          _mm512_or_si512(_mm512_and_si512(a, nibble), _mm512_slli_epi32(_mm512_and_si512(b, nibble), 16));
      out[c / 16] = _mm512_permutexvar_epi16(_mm512_or_si512(even, half), tables);
      out[c / 16 + 1] = _mm512_permutexvar_epi16(_mm512_or_si512(odd, half), tables);
    }
  }

  TARGET static void store16(__m512 v, __mmask16 here, char* to) {
    _mm256_mask_storeu_epi16(to, here, _mm512_cvtepi32_epi16(bf16_bits(v)));
  }
  TARGET static void store32(__m512 v[2], int64_t left, bool add, char* to) {
    const __mmask32 here = mask32(left);
    if (add) {
      const __m512i old = _mm512_maskz_loadu_epi16(here, to);
      for (int i = 0; i < 2; ++i) {
        const __m256i half = i ? _mm512_extracti64x4_epi64(old, 1) : _mm512_castsi512_si256(old);
        v[i] = _mm512_add_ps(v[i], _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
      }
    }
    _mm512_mask_storeu_epi16(to, here, join(v[0], v[1]));
  }

 private:
  TARGET static __m512i join(__m512 low, __m512 high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(bf16_bits(low))),
                              _mm512_cvtepi32_epi16(bf16_bits(high)), 1);
  }
};

#include "low_rank_avx512.h"

}  // namespace

void forward_bf16(const Forward& f) { forward(f); }
void backward_bf16(const Backward& f) { backward(f); }

}  // namespace fastadapt
#endif
