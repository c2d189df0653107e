// SPDX-License-Identifier: Apache-2.0
// What an op may read: every tensor is checked for dtype, size and layout before its pointer is taken.
#pragma once

#include <optional>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace fastadapt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_flat(const Tensor& t, const char* name, ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU, got device type ", static_cast<int>(t.device().type()));
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", toString(dtype), ", got ", toString(t.scalar_type()));
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous: pass ", name, ".contiguous()");
  STD_TORCH_CHECK(t.numel() == numel, name, " must have ", numel, " elements, got ", t.numel());
}

inline bool is_float_or_half(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half;
}

}  // namespace fastadapt
