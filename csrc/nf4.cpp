// SPDX-License-Identifier: Apache-2.0
// nf4_dequant_ decodes a 4-bit weight into a tensor that is there already: a fresh one costs more in page faults than the
// decoding does. nf4_product_ multiplies with it, decoding row by row into cache: for few tokens, where writing the whole
// decoded weight to memory and reading it again is most of the time.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "checks.h"
#include "low_rank.h"
#include "nf4_avx512.h"
#include "nf4_checks.h"

namespace fastadapt {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements a thread should have at least

template <class T>
void decode(const Nf4& w, T* out) {
  const int64_t grain = std::max<int64_t>(1, kGrain / w.blocksize);
  torch::stable::parallel_for(0, w.blocks(), grain, [&](int64_t begin, int64_t end) {
#ifdef FASTADAPT_X86
    if (has_avx512()) return decode_avx512(w, begin, end, out);
    if (has_avx2()) return decode_avx2(w, begin, end, out);
#endif
    decode_plain(w, begin, end, out);
  });
}

void nf4_dequant_(const Tensor& out, const Tensor& packed, const Tensor& absmax, const Tensor& code,
                  const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                  const std::optional<Tensor>& offset, int64_t blocksize, int64_t nested_blocksize, ScalarType dtype) {
  STD_TORCH_CHECK(is_float_or_half(out.scalar_type()), "out must be float32, bfloat16 or float16, got ",
                  toString(out.scalar_type()));
  check_flat(out, "out", out.scalar_type(), out.numel());
  const Nf4 w = checked_nf4(packed, absmax, code, nested_absmax, nested_code, offset, blocksize, nested_blocksize, out.numel(),
                        dtype, out.scalar_type());
  if (w.out == ScalarType::Float) {
    decode(w, out.mutable_data_ptr<float>());
  } else {
    decode(w, static_cast<uint16_t*>(out.mutable_data_ptr()));
  }
}

void nf4_product_(const Tensor& y, const Tensor& x, const Tensor& packed, const Tensor& absmax, const Tensor& code,
                  const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                  const std::optional<Tensor>& offset, int64_t blocksize, int64_t nested_blocksize, int64_t n, int64_t k,
                  ScalarType dtype, bool transposed) {
  STD_TORCH_CHECK(n >= 0 && k >= 0 && x.dim() == 2, "x must be (m, ", transposed ? k : n, "), got ", x.dim(), " dimensions");
  const int64_t m = x.size(0);
  STD_TORCH_CHECK(blocksize >= 32 && blocksize % 32 == 0 && k % blocksize == 0,
                  "blocksize must be a multiple of 32 and divide k, got blocksize ", blocksize, " and k ", k);
  if (x.scalar_type() == ScalarType::BFloat16) {
    STD_TORCH_CHECK(has_avx512_bf16() && whole_blocks(blocksize, nested_blocksize, k),
                    "a bfloat16 x needs a CPU with AVX-512 BF16 and a blocksize that is a power of two from 64 on, got ",
                    blocksize);
  }
  const bool half = x.scalar_type() == ScalarType::BFloat16;
#ifdef FASTADAPT_X86
  if (half || (has_avx512() && whole_blocks(blocksize, nested_blocksize, k))) {
    const ScalarType number = half ? ScalarType::BFloat16 : ScalarType::Float;
    check_flat(x, "x", number, m * (transposed ? k : n));
    check_flat(y, "y", number, m * (transposed ? n : k));
    Weight w;
    w.kind = Weight::kNf4;
    w.nf4 = checked_nf4(packed, absmax, code, nested_absmax, nested_code, offset, blocksize, nested_blocksize, n * k, dtype, number);
    w.rows = n;
    w.columns = k;
    if (m == 0 || n == 0 || k == 0) return;
    if (transposed) {
      Forward f{};
      f.m = m, f.n = n, f.k = k, f.w = w, f.add = true;
      f.x = x.const_data_ptr();
      f.y = y.mutable_data_ptr();
      return half ? forward_bf16(f) : forward_f32(f);
    }
    Backward f{};
    f.m = m, f.n = n, f.k = k, f.w = w, f.add = true;
    f.g = x.const_data_ptr();
    f.dx = y.mutable_data_ptr();
    return half ? backward_bf16(f) : backward_f32(f);
  }
#endif
  check_flat(x, "x", ScalarType::Float, m * (transposed ? k : n));
  check_flat(y, "y", ScalarType::Float, m * (transposed ? n : k));
  Product p{};
  p.w = checked_nf4(packed, absmax, code, nested_absmax, nested_code, offset, blocksize, nested_blocksize, n * k, dtype,
                ScalarType::Float);
  p.x = x.const_data_ptr<float>();
  p.y = y.mutable_data_ptr<float>();
  p.m = m;
  p.n = n;
  p.k = k;
  if (m == 0 || n == 0 || k == 0) return;
  if (transposed) {
    torch::stable::parallel_for(0, n, std::max<int64_t>(1, kGrain / k), [&](int64_t begin, int64_t end) {
      std::vector<float> row(k);
#ifdef FASTADAPT_X86
      if (has_fma()) return forward_fma(p, begin, end, row.data());
#endif
      forward_plain(p, begin, end, row.data());
    });
    return;
  }
  // a thread owns whole columns of y, so the sums do not depend on how many threads there are
  const int64_t width = std::max(blocksize, kColumns / blocksize * blocksize);
  torch::stable::parallel_for(0, (k + width - 1) / width, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> rows(kRows * std::max(width, kColumns));
    for (int64_t c = begin; c < end; ++c) {
      const int64_t count = std::min(width, k - c * width);
#ifdef FASTADAPT_X86
      if (has_fma()) {
        backward_fma(p, c * width, count, width, rows.data());
        continue;
      }
#endif
      backward_plain(p, c * width, count, rows.data());
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt_native, CPU, m) {
  m.impl("nf4_dequant_", TORCH_BOX(&nf4_dequant_));
  m.impl("nf4_product_", TORCH_BOX(&nf4_product_));
}

}  // namespace fastadapt
