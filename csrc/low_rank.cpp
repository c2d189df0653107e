// SPDX-License-Identifier: Apache-2.0
// low_rank_fwd, low_rank_bwd: the whole adapted linear layer in one call each way; nf4_product_, the weight's part alone.
// Arguments as in fastadapt/ops/low_rank.py.
#include <cmath>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "low_rank.h"
#include "nf4_checks.h"

namespace fastadapt {
namespace {

using Maybe = std::optional<Tensor>;

std::vector<int64_t> shape_of(const Tensor& like, int64_t last) {
  std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
  shape.back() = last;
  return shape;
}

Tensor as_float(const Tensor& t) {
  return torch::stable::contiguous(t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
}

Dropout16 dropout_of(double p, const Maybe& seed, int64_t k) {
  if (!seed) return {};
  check_flat(*seed, "seed", ScalarType::Long, 1);
  const double threshold = std::nearbyint(p * 65536);
  STD_TORCH_CHECK(threshold >= 0 && threshold < 65536, "p must be in [0, 1) when rounded to 1/65536, got ", p);
  STD_TORCH_CHECK(k % 8 == 0, "dropout needs k to be a multiple of 8, got ", k);
  return {true, static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()), static_cast<uint32_t>(threshold),
          static_cast<float>(65536 / (65536 - threshold))};
}

Weight weight_of(const Maybe& w, const Maybe& absmax, const Maybe& code, const Maybe& nested_absmax, const Maybe& nested_code,
                 const Maybe& offset, int64_t blocksize, int64_t nested_blocksize, int64_t n, int64_t k, ScalarType round,
                 ScalarType number) {
  Weight found;
  if (!w) return found;
  found.rows = n;
  found.columns = found.stride = k;
  if (!absmax) {
    STD_TORCH_CHECK(w->is_cpu() && w->dim() == 2 && w->size(0) == n && w->size(1) == k && w->scalar_type() == number,
                    "w must be (", n, ", ", k, ") in x's dtype on the CPU");
    const bool rows = w->stride(1) == 1 || k == 1, columns = w->stride(0) == 1 || n == 1;
    STD_TORCH_CHECK(rows || columns, "w must be contiguous in a dimension");
    found.kind = Weight::kDense;
    found.dense = w->const_data_ptr();
    found.transposed = !rows;
    if (found.transposed) std::swap(found.rows, found.columns);
    found.stride = rows ? w->stride(0) : w->stride(1);
    return found;
  }
  if (w->scalar_type() == ScalarType::Char) {
    check_flat(*w, "w", ScalarType::Char, n * k);
    check_flat(*absmax, "absmax", ScalarType::Float, n);
    found.kind = Weight::kInt8;
    found.int8 = w->const_data_ptr<int8_t>();
    found.row_scale = absmax->const_data_ptr<float>();
    return found;
  }
  STD_TORCH_CHECK(code, "a 4-bit weight needs a code");
  STD_TORCH_CHECK(whole_blocks(blocksize, nested_blocksize, k),
                  "blocksize must be a power of two, 64 at least, that divides k, got ", blocksize, " and k ", k);
  found.kind = Weight::kNf4;
  found.nf4 = checked_nf4(*w, *absmax, *code, nested_absmax, nested_code, offset, blocksize, nested_blocksize, n * k, round, number);
  return found;
}

bool run_in_bf16(ScalarType number) {
  const bool half = number == ScalarType::BFloat16;
  STD_TORCH_CHECK(half || number == ScalarType::Float, "x must be float32 or bfloat16, got ", toString(number));
  STD_TORCH_CHECK(half ? has_avx512_bf16() : has_avx512(), "needs a CPU with AVX-512", half ? " BF16" : "");
  return half;
}

void run(const Forward& f, bool half) {
#ifdef FASTADAPT_X86
  half ? forward_bf16(f) : forward_f32(f);
#endif
}

void run(const Backward& f, bool half) {
#ifdef FASTADAPT_X86
  half ? backward_bf16(f) : backward_f32(f);
#endif
}

std::tuple<Tensor, Tensor> low_rank_fwd(const Tensor& x, const Maybe& bias, const Tensor& a, const Tensor& b, double scale,
                                        double p, const Maybe& seed, const Maybe& w, const Maybe& absmax, const Maybe& code,
                                        const Maybe& nested_absmax, const Maybe& nested_code, const Maybe& offset,
                                        int64_t blocksize, int64_t nested_blocksize, ScalarType dtype) {
  const ScalarType number = x.scalar_type();
  const bool half = run_in_bf16(number);
  STD_TORCH_CHECK(x.dim() >= 1 && a.dim() == 2 && b.dim() == 2, "x must be (.., k), a (r, k), b (n, r)");
  Forward f{};
  f.k = x.size(x.dim() - 1);
  f.m = f.k ? x.numel() / f.k : 0;
  f.n = b.size(0);
  f.r = a.size(0);
  const Tensor rows = torch::stable::contiguous(x), a32 = as_float(a), b32 = as_float(b);
  check_flat(rows, "x", number, f.m * f.k);
  check_flat(a32, "a", ScalarType::Float, f.r * f.k);
  check_flat(b32, "b", ScalarType::Float, f.n * f.r);
  std::optional<Tensor> bias32;
  if (bias) {
    bias32 = as_float(*bias);
    check_flat(*bias32, "bias", ScalarType::Float, f.n);
    f.bias = bias32->const_data_ptr<float>();
  }
  Tensor y = torch::stable::new_empty(x, shape_of(x, f.n)), u = torch::stable::new_empty(x, {f.m, f.r});
  f.w = weight_of(w, absmax, code, nested_absmax, nested_code, offset, blocksize, nested_blocksize, f.n, f.k, dtype, number);
  f.drop = dropout_of(p, seed, f.k);
  f.x = rows.const_data_ptr();
  f.a = a32.const_data_ptr<float>();
  f.b = b32.const_data_ptr<float>();
  f.scale = static_cast<float>(scale);
  f.y = y.mutable_data_ptr();
  f.u = u.mutable_data_ptr();
  if (f.m && f.n) run(f, half);
  return {y, u};
}

std::tuple<Tensor, Tensor, Tensor> low_rank_bwd(const Tensor& g, const Tensor& x, const Tensor& u, const Tensor& a,
                                                const Tensor& b, double scale, double p, const Maybe& seed, bool need_x,
                                                bool need_a, bool need_b, const Maybe& w, const Maybe& absmax,
                                                const Maybe& code, const Maybe& nested_absmax, const Maybe& nested_code,
                                                const Maybe& offset, int64_t blocksize, int64_t nested_blocksize,
                                                ScalarType dtype) {
  const ScalarType number = x.scalar_type();
  const bool half = run_in_bf16(number);
  STD_TORCH_CHECK(x.dim() >= 1 && a.dim() == 2 && b.dim() == 2, "x must be (.., k), a (r, k), b (n, r)");
  Backward f{};
  f.k = x.size(x.dim() - 1);
  f.m = f.k ? x.numel() / f.k : 0;
  f.n = b.size(0);
  f.r = a.size(0);
  const Tensor rows = torch::stable::contiguous(x), gs = torch::stable::contiguous(g), us = torch::stable::contiguous(u);
  const Tensor a32 = as_float(a), b32 = as_float(b);
  check_flat(rows, "x", number, f.m * f.k);
  check_flat(gs, "g", number, f.m * f.n);
  check_flat(us, "u", number, f.m * f.r);
  check_flat(a32, "a", ScalarType::Float, f.r * f.k);
  check_flat(b32, "b", ScalarType::Float, f.n * f.r);
  const int64_t none[] = {0};
  Tensor dx = need_x ? torch::stable::new_empty(x, x.sizes()) : torch::stable::new_empty(x, none);
  Tensor da = need_a ? torch::stable::new_empty(a32, a32.sizes()) : torch::stable::new_empty(a32, none);
  Tensor db = need_b ? torch::stable::new_empty(b32, b32.sizes()) : torch::stable::new_empty(b32, none);
  f.w = weight_of(w, absmax, code, nested_absmax, nested_code, offset, blocksize, nested_blocksize, f.n, f.k, dtype, number);
  f.drop = dropout_of(p, seed, f.k);
  f.g = gs.const_data_ptr();
  f.x = rows.const_data_ptr();
  f.u = us.const_data_ptr();
  f.a = a32.const_data_ptr<float>();
  f.b = b32.const_data_ptr<float>();
  f.scale = static_cast<float>(scale);
  if (need_x) f.dx = dx.mutable_data_ptr();
  if (need_a) f.da = da.mutable_data_ptr<float>();
  if (need_b) f.db = db.mutable_data_ptr<float>();
  if (f.m && f.n) {
    run(f, half);
  } else {
    for (Tensor* t : {&dx, &da, &db}) torch::stable::zero_(*t);
  }
  if (need_a && a.scalar_type() != ScalarType::Float) da = torch::stable::to(da, a.scalar_type());
  if (need_b && b.scalar_type() != ScalarType::Float) db = torch::stable::to(db, b.scalar_type());
  return {dx, da, db};
}

int64_t isa_level() { return isa(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt_native, CPU, m) {
  m.impl("low_rank_fwd", TORCH_BOX(&low_rank_fwd));
  m.impl("low_rank_bwd", TORCH_BOX(&low_rank_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastadapt_native, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa_level)); }

}  // namespace fastadapt
