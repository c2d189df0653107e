// SPDX-License-Identifier: Apache-2.0
// nf4_dequant_ for CUDA tensors: the schema of library.cpp, on the current stream; no host waits.
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "nf4_decode.cuh"

namespace fastadapt {
namespace {

template <class T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

template <class Round>
cudaError_t decode_to(const cuda::Nf4& w, const Tensor& out, ScalarType round, cudaStream_t stream) {
  if (out.scalar_type() == ScalarType::Float) return cuda::decode<Round>(w, out.mutable_data_ptr<float>(), stream);
  STD_TORCH_CHECK(out.scalar_type() == round, "out must be float32 or what values are rounded to, ", toString(round), ", got ",
                  toString(out.scalar_type()));
  return cuda::decode<Round>(w, static_cast<Round*>(out.mutable_data_ptr()), stream);
}

void nf4_dequant_(const Tensor& out, const Tensor& packed, const Tensor& absmax, const Tensor& code,
                  const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                  const std::optional<Tensor>& offset, int64_t blocksize, int64_t nested_blocksize, ScalarType dtype) {
  STD_TORCH_CHECK(blocksize > 0 && blocksize % cuda::kGroup == 0, "blocksize must be a multiple of ", cuda::kGroup, ", got ",
                  blocksize);
  STD_TORCH_CHECK(out.is_contiguous() && packed.is_contiguous(), "out and packed must be contiguous");
  const int64_t numel = out.numel(), blocks = (numel + blocksize - 1) / blocksize;
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.numel() >= (numel + 1) / 2,
                  "packed must be uint8, at least ", (numel + 1) / 2, " bytes, got ", packed.numel());
  STD_TORCH_CHECK(code.scalar_type() == ScalarType::Float && code.numel() == 16, "code must be 16 float32 values");
  const bool nested = absmax.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(absmax.numel() >= blocks, "absmax must have ", blocks, " values, got ", absmax.numel());
  STD_TORCH_CHECK(!nested || (nested_absmax && nested_code && offset && nested_blocksize > 0),
                  "a uint8 absmax needs nested_absmax, nested_code, offset and nested_blocksize");
  cuda::Nf4 w{};
  w.packed = packed.const_data_ptr<uint8_t>();
  w.absmax = nested ? nullptr : absmax.const_data_ptr<float>();
  w.absmax_code = nested ? absmax.const_data_ptr<uint8_t>() : nullptr;
  w.nested_absmax = pointer<float>(nested_absmax);
  w.nested_code = pointer<float>(nested_code);
  w.offset = pointer<float>(offset);
  w.code = code.const_data_ptr<float>();
  w.numel = numel, w.blocksize = blocksize, w.nested_blocksize = nested_blocksize;
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(out.get_device_index(), &stream);
  auto* on = static_cast<cudaStream_t>(stream);
  cudaError_t done = cudaErrorInvalidValue;
  if (dtype == ScalarType::Float) done = decode_to<float>(w, out, dtype, on);
  if (dtype == ScalarType::BFloat16) done = decode_to<__nv_bfloat16>(w, out, dtype, on);
  if (dtype == ScalarType::Half) done = decode_to<__half>(w, out, dtype, on);
  STD_TORCH_CHECK(done == cudaSuccess, "nf4_dequant_: ", cudaGetErrorString(done));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt_native, CUDA, m) { m.impl("nf4_dequant_", TORCH_BOX(&nf4_dequant_)); }

}  // namespace fastadapt
