// SPDX-License-Identifier: Apache-2.0
// float32 <-> bfloat16 and float16 bits, to nearest even; a NaN becomes the quiet one, as in torch.
#pragma once

#include <cstdint>
#include <cstring>

#include <torch/headeronly/util/Half.h>

#include "isa.h"

namespace fastadapt {

FASTADAPT_INLINE uint16_t to_bf16(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

FASTADAPT_INLINE float from_bf16(uint16_t h) {
  uint32_t u = static_cast<uint32_t>(h) << 16;
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}

inline uint16_t to_f16(float v) { return torch::headeronly::detail::fp16_ieee_from_fp32_value(v); }

inline float from_f16(uint16_t h) { return torch::headeronly::detail::fp16_ieee_to_fp32_value(h); }

}  // namespace fastadapt
