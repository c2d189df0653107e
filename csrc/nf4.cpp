// SPDX-License-Identifier: Apache-2.0
// nf4_dequant_ decodes a 4-bit weight into a tensor that is there already: a fresh one costs more in page faults than the
// decoding does. nf4_product_ multiplies with it, decoding row by row into cache: for few tokens, where writing the whole
// decoded weight to memory and reading it again is most of the time.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "checks.h"
#include "nf4_avx512.h"

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

void read_absmax(Nf4& w, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
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

Nf4 checked(const Tensor& packed, const Tensor& absmax, const Tensor& code, const std::optional<Tensor>& nested_absmax,
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

void nf4_dequant_(const Tensor& out, const Tensor& packed, const Tensor& absmax, const Tensor& code,
                  const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                  const std::optional<Tensor>& offset, int64_t blocksize, int64_t nested_blocksize, ScalarType dtype) {
  STD_TORCH_CHECK(is_float_or_half(out.scalar_type()), "out must be float32, bfloat16 or float16, got ",
                  toString(out.scalar_type()));
  check_flat(out, "out", out.scalar_type(), out.numel());
  const Nf4 w = checked(packed, absmax, code, nested_absmax, nested_code, offset, blocksize, nested_blocksize, out.numel(),
                        dtype, out.scalar_type());
  if (w.out == ScalarType::Float) {
    decode(w, out.mutable_data_ptr<float>());
  } else {
    decode(w, static_cast<uint16_t*>(out.mutable_data_ptr()));
  }
}

void multiply_bf16(const Tensor& y, const Tensor& x, const Nf4& w, int64_t m, int64_t n, int64_t k, bool transposed) {
#ifdef FASTADAPT_X86
  if (has_avx512_bf16()) {
    STD_TORCH_CHECK(w.blocksize % 64 == 0 && w.round == ScalarType::BFloat16,
                    "a bfloat16 x needs a blocksize that is a multiple of 64 and dtype bfloat16, got ", w.blocksize, " and ",
                    toString(w.round));
    check_flat(x, "x", ScalarType::BFloat16, m * (transposed ? k : n));
    check_flat(y, "y", ScalarType::BFloat16, m * (transposed ? n : k));
    if (m == 0 || n == 0 || k == 0) return;
    const HalfProduct p{w,
                        static_cast<const uint16_t*>(x.const_data_ptr()),
                        static_cast<uint16_t*>(y.mutable_data_ptr()),
                        m,
                        n,
                        k};
    // units of whole tiles, so that the sums do not depend on how many threads there are
    if (transposed) {
      const int64_t units = (n + kHalfRows - 1) / kHalfRows;
      torch::stable::parallel_for(0, units, std::max<int64_t>(1, kGrain / (k * kHalfRows)), [&](int64_t begin, int64_t end) {
        std::vector<uint16_t> rows(kHalfRows * k);
        forward_bf16(p, begin * kHalfRows, std::min(n, end * kHalfRows), rows.data());
      });
      return;
    }
    torch::stable::parallel_for(0, k / 64, std::max<int64_t>(1, kGrain / (n * 64)), [&](int64_t begin, int64_t end) {
      std::vector<uint16_t> tile(2 * kPairs * kWide);
      std::vector<uint32_t> pairs(m * kPairs);
      std::vector<float> sums(m * kWide);
      for (int64_t c = begin * 64; c < end * 64; c += kWide)
        backward_bf16(p, c, std::min(kWide, end * 64 - c), tile.data(), pairs.data(), sums.data());
    });
    return;
  }
#endif
  STD_TORCH_CHECK(false, "a bfloat16 x needs a CPU with AVX-512 BF16; pass x and y as float32");
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
    const Nf4 w = checked(packed, absmax, code, nested_absmax, nested_code, offset, blocksize, nested_blocksize, n * k, dtype,
                          ScalarType::BFloat16);
    return multiply_bf16(y, x, w, m, n, k, transposed);
  }
  check_flat(x, "x", ScalarType::Float, m * (transposed ? k : n));
  check_flat(y, "y", ScalarType::Float, m * (transposed ? n : k));
  Product p{};
  p.w = checked(packed, absmax, code, nested_absmax, nested_code, offset, blocksize, nested_blocksize, n * k, dtype,
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
