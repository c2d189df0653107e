// SPDX-License-Identifier: Apache-2.0
// The ops' schemas. Written against libtorch's stable ABI: one build serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastadapt_native, m) {
  m.def(
      "nf4_dequant_(Tensor(a!) out, Tensor packed, Tensor absmax, Tensor code, Tensor? nested_absmax, "
      "Tensor? nested_code, Tensor? offset, int blocksize, int nested_blocksize, ScalarType dtype) -> ()");
  m.def(
      "nf4_product_(Tensor(a!) y, Tensor x, Tensor packed, Tensor absmax, Tensor code, Tensor? nested_absmax, "
      "Tensor? nested_code, Tensor? offset, int blocksize, int nested_blocksize, int n, int k, ScalarType dtype, "
      "bool transposed) -> ()");
  m.def(
      "low_rank_fwd(Tensor x, Tensor? bias, Tensor a, Tensor b, float scale, float p, Tensor? seed, Tensor? w, Tensor? absmax, "
      "Tensor? code, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, int blocksize, int nested_blocksize, "
      "ScalarType dtype) -> (Tensor, Tensor)");
  m.def(
      "low_rank_bwd(Tensor g, Tensor x, Tensor u, Tensor a, Tensor b, float scale, float p, Tensor? seed, bool need_x, "
      "bool need_a, bool need_b, Tensor? w, Tensor? absmax, "
      "Tensor? code, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, int blocksize, int nested_blocksize, "
      "ScalarType dtype) -> (Tensor, Tensor, Tensor)");
  m.def("cross_entropy_fwd(Tensor x, Tensor labels, int ignore) -> (Tensor, Tensor)");
  m.def("cross_entropy_bwd(Tensor x, Tensor labels, Tensor lse, Tensor g, int ignore) -> Tensor");
  m.def("isa() -> int");
  m.def("dropout(Tensor x, Tensor seed, float p, ScalarType out_dtype) -> Tensor");
}
