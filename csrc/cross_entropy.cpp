// SPDX-License-Identifier: Apache-2.0
// cross_entropy_fwd: loss[t] = log(sum_v exp(x[t, v])) - x[t, label[t]], and the logarithm as the row's largest
// logit and the rest, in fp32 from float32 or bfloat16 logits as they are. cross_entropy_bwd: dx = (exp(x - lse) - [v = label]) g[t]. A row whose label is
// `ignore` has loss 0 and dx 0. For AVX-512.
#include <cmath>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "avx512.h"
#include "checks.h"
#include "halves.h"

namespace fastadapt {
namespace {

struct Rows {
  const void* x;
  int64_t columns;
  bool half;
  const int64_t* labels;
  int64_t ignore;
};

#ifdef FASTADAPT_X86
FASTADAPT_AVX512 inline __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : (1u << count) - 1; }

FASTADAPT_AVX512 inline __m512 load(const Rows& r, int64_t at, __mmask16 here) {
  if (!r.half) return _mm512_maskz_loadu_ps(here, static_cast<const float*>(r.x) + at);
  const __m256i bits = _mm256_maskz_loadu_epi16(here, static_cast<const uint16_t*>(r.x) + at);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// exp of x <= 0 (or NaN): 2^n e^r with |r| <= ln 2 / 2, the series of e^r to its seventh term; about 1 ulp.
FASTADAPT_AVX512 inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126), x);  // e^-126 rounds to nothing next to the row's e^0
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 p = _mm512_set1_ps(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

FASTADAPT_AVX512 void row_forward(const Rows& r, int64_t row, float* loss, float* lse) {
  const int64_t from = row * r.columns;
  __m512 most = _mm512_set1_ps(-INFINITY), nans = _mm512_setzero_ps();
  for (int64_t v = 0; v < r.columns; v += 16) {
    const __mmask16 here = first(r.columns - v);
    const __m512 x = load(r, from + v, here);
    most = _mm512_mask_max_ps(most, here, x, most);
    nans = _mm512_mask_mul_ps(nans, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x, x);
  }
  const float top = _mm512_reduce_max_ps(most) + _mm512_reduce_add_ps(nans);
  // four sums, each of a sixty-fourth of the row, and a sum of those
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t v = 0, i = 0; v < r.columns; v += 16, ++i) {
    const __mmask16 here = first(r.columns - v);
    const __m512 e = exponential(_mm512_sub_ps(load(r, from + v, here), _mm512_set1_ps(top)));
    sums[i % 4] = _mm512_mask_add_ps(sums[i % 4], here, sums[i % 4], e);
  }
  const float sum = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
  lse[2 * row] = top;
  lse[2 * row + 1] = std::log(sum);
  if (r.labels[row] == r.ignore) {
    loss[row] = 0;
    return;
  }
  const int64_t at = from + r.labels[row];
  const float x = r.half ? from_bf16(static_cast<const uint16_t*>(r.x)[at]) : static_cast<const float*>(r.x)[at];
  loss[row] = (top - x) + std::log(sum);
}

FASTADAPT_AVX512 void row_backward(const Rows& r, int64_t row, const float* lse, float g, void* out) {
  const int64_t from = row * r.columns, label = r.labels[row];
  const bool ignored = label == r.ignore;
  for (int64_t v = 0; v < r.columns; v += 16) {
    const __mmask16 here = first(r.columns - v);
    __m512 d = _mm512_setzero_ps();
    if (!ignored) {
      d = _mm512_sub_ps(load(r, from + v, here), _mm512_set1_ps(lse[2 * row]));
      d = exponential(_mm512_sub_ps(d, _mm512_set1_ps(lse[2 * row + 1])));
      if (label - v < 16 && label >= v) d = _mm512_mask_sub_ps(d, 1u << (label - v), d, _mm512_set1_ps(1));
      d = _mm512_mul_ps(d, _mm512_set1_ps(g));
    }
    if (r.half) {
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + from + v, here, _mm512_cvtepi32_epi16(bf16_bits(d)));
    } else {
      _mm512_mask_storeu_ps(static_cast<float*>(out) + from + v, here, d);
    }
  }
}
#endif

Rows checked(const Tensor& x, const Tensor& labels, int64_t ignore) {
  STD_TORCH_CHECK(has_avx512(), "cross_entropy needs a CPU with AVX-512");
  STD_TORCH_CHECK(x.dim() == 2, "x must be (rows, columns), got ", x.dim(), " dimensions");
  const bool half = x.scalar_type() == ScalarType::BFloat16;
  check_flat(x, "x", half ? ScalarType::BFloat16 : ScalarType::Float, x.numel());
  check_flat(labels, "labels", ScalarType::Long, x.size(0));
  const Rows r{x.const_data_ptr(), x.size(1), half, labels.const_data_ptr<int64_t>(), ignore};
  for (int64_t i = 0; i < x.size(0); ++i)
    STD_TORCH_CHECK(r.labels[i] == ignore || (r.labels[i] >= 0 && r.labels[i] < r.columns), "Target ", r.labels[i],
                    " is out of bounds.");
  return r;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& labels, int64_t ignore) {
  const Rows r = checked(x, labels, ignore);
  const int64_t rows = x.size(0);
  Tensor loss = torch::stable::new_empty(x, {rows}, ScalarType::Float), lse = torch::stable::new_empty(x, {rows, 2}, ScalarType::Float);
  float *loss_to = loss.mutable_data_ptr<float>(), *lse_to = lse.mutable_data_ptr<float>();
#ifdef FASTADAPT_X86
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row_forward(r, i, loss_to, lse_to);
  });
#endif
  return {loss, lse};
}

Tensor backward(const Tensor& x, const Tensor& labels, const Tensor& lse, const Tensor& g, int64_t ignore) {
  const Rows r = checked(x, labels, ignore);
  const int64_t rows = x.size(0);
  check_flat(lse, "lse", ScalarType::Float, 2 * rows);
  check_flat(g, "g", ScalarType::Float, rows);
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  const float *lse_at = lse.const_data_ptr<float>(), *g_at = g.const_data_ptr<float>();
  void* to = dx.mutable_data_ptr();
#ifdef FASTADAPT_X86
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row_backward(r, i, lse_at, g_at[i], to);
  });
#endif
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt_native, CPU, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&forward));
  m.impl("cross_entropy_bwd", TORCH_BOX(&backward));
}

}  // namespace fastadapt
