// SPDX-License-Identifier: Apache-2.0
// A 4-bit weight as raw pointers (bitsandbytes' layout, high nibble first), and the plain C++ decoder.
//   w[i] = code[nibble(i)] * absmax[i / blocksize]
// A block has one absmax, so its 16 possible results are computed and rounded once; the rest is table lookup.
#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/headeronly/core/ScalarType.h>

#include "halves.h"

namespace fastadapt {

using torch::headeronly::ScalarType;

struct Nf4 {
  const uint8_t* packed;
  const float* code;  // 16
  int64_t numel, blocksize;
  ScalarType round;  // what values are rounded to
  ScalarType out;    // what they are stored as

  const float* absmax;         // one a block, or null:
  const uint8_t* absmax_code;  // then nested_code[absmax_code[b]] * nested_absmax[b / nested_blocksize] + offset
  const float* nested_code;    // 256
  const float* nested_absmax;
  float offset;
  int64_t nested_blocksize;

  int64_t blocks() const { return numel / blocksize + (numel % blocksize != 0); }
  int64_t length(int64_t block) const { return std::min(blocksize, numel - block * blocksize); }

  // Two roundings, like bitsandbytes: the build turns contraction into fma off.
  FASTADAPT_INLINE float scale(int64_t block) const {
    if (absmax) return absmax[block];
    float product = nested_code[absmax_code[block]] * nested_absmax[block / nested_blocksize];
    return product + offset;
  }
};

template <class T>  // float, or the bits of a half
FASTADAPT_INLINE void look_up(const uint8_t* packed, const T* table, int64_t from, int64_t to, T* out) {
  for (int64_t i = from; i < to; ++i) out[i] = table[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4];
}

inline float rounded(float v, ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return from_bf16(to_bf16(v));
  if (dtype == ScalarType::Half) return from_f16(to_f16(v));
  return v;
}

inline void store(float v, ScalarType, float* out) { *out = v; }
inline void store(float v, ScalarType dtype, uint16_t* out) {
  *out = dtype == ScalarType::BFloat16 ? to_bf16(v) : to_f16(v);
}

template <class T>
void decode_plain(const Nf4& w, int64_t block, int64_t end, T* out) {
  for (; block < end; ++block) {
    const float scale = w.scale(block);
    T table[16];
    for (int k = 0; k < 16; ++k) store(rounded(w.code[k] * scale, w.round), w.out, table + k);
    const int64_t first = block * w.blocksize;
    look_up(w.packed + first / 2, table, 0, w.length(block), out + first);
  }
}

}  // namespace fastadapt
