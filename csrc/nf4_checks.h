// SPDX-License-Identifier: Apache-2.0
// A 4-bit weight's tensors, checked, as raw pointers.
#pragma once

#include "checks.h"
#include "nf4.h"

namespace fastadapt {

inline void read_absmax(Nf4& w, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
                 const std::optional<Tensor>& nested_code, const std::optional<Tensor>& offset) {
  const bool nested = absmax.scalar_type() == ScalarType::Byte;
  const bool given = nested_absmax || nested_code || offset;
  if (!nested) {
    STD_TORCH_CHECK(!given, "absmax must be uint8 where nested_absmax, nested_code or offset is given, got ",
                    toString(absmax.scalar_type()));
    check_flat(absmax, "absmax", ScalarType::Float, w.blocks());
    w.absmax = absmax.const_data_ptr<float>();
    return;
  }
  STD_TORCH_CHECK(nested_absmax && nested_code && offset,
                  "a uint8 absmax needs nested_absmax, nested_code and offset, got ", nested_absmax ? "" : "no nested_absmax ",
                  nested_code ? "" : "no nested_code ", offset ? "" : "no offset");
  STD_TORCH_CHECK(w.nested_blocksize > 0, "nested_blocksize must be positive, got ", w.nested_blocksize);
  check_flat(absmax, "absmax", ScalarType::Byte, w.blocks());
  check_flat(*nested_absmax, "nested_absmax", ScalarType::Float,
             w.blocks() / w.nested_blocksize + (w.blocks() % w.nested_blocksize != 0));
  check_flat(*nested_code, "nested_code", ScalarType::Float, 256);
  check_flat(*offset, "offset", ScalarType::Float, 1);
  w.absmax_code = absmax.const_data_ptr<uint8_t>();
  w.nested_absmax = nested_absmax->const_data_ptr<float>();
  w.nested_code = nested_code->const_data_ptr<float>();
  w.offset = *offset->const_data_ptr<float>();
}

inline Nf4 checked_nf4(const Tensor& packed, const Tensor& absmax, const Tensor& code, const std::optional<Tensor>& nested_absmax,
            const std::optional<Tensor>& nested_code, const std::optional<Tensor>& offset, int64_t blocksize,
            int64_t nested_blocksize, int64_t numel, ScalarType round, ScalarType out) {
  STD_TORCH_CHECK(blocksize > 0 && blocksize % 2 == 0, "blocksize must be positive and even, got ", blocksize);
  STD_TORCH_CHECK(is_float_or_half(round), "dtype must be float32, bfloat16 or float16, got ", toString(round));
  check_flat(packed, "packed", ScalarType::Byte, numel / 2 + numel % 2);
  check_flat(code, "code", ScalarType::Float, 16);
  Nf4 w{};
  w.packed = packed.const_data_ptr<uint8_t>();
  w.code = code.const_data_ptr<float>();
  w.numel = numel;
  w.blocksize = blocksize;
  w.nested_blocksize = nested_blocksize;
  w.round = round;
  w.out = out;
  read_absmax(w, absmax, nested_absmax, nested_code, offset);
  return w;
}

}  // namespace fastadapt
