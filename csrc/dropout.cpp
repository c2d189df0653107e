// SPDX-License-Identifier: Apache-2.0
// dropout: y = x * (keep ? 1 / (1 - p) : 0) with the mask made from a seed, nothing to store for backward.
//   element e: lane e % 8 of philox(counter = e / 8, key = seed); a lane is 16 bits; kept when lane >= round(65536 p)
// The product is fp32 (fp64 for a float64 x) and rounded once, as Tensor.to rounds.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "halves.h"
#include "philox.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the lanes of a word are read in memory order");

namespace fastadapt {
namespace {

constexpr int64_t kChunk = 512;  // elements that stay in the L1 cache between the steps below
constexpr int64_t kGrain = 1 << 14;

struct Dropout {
  const void* x;
  void* y;
  ScalarType x_type, y_type;
  int64_t numel;
  uint64_t seed;
  uint32_t threshold;
  double scale;
};

struct Plain {
  static void philox(uint64_t key, uint64_t first, int count, uint32_t* words) { philox_plain(key, first, count, words); }
  static void load(const uint16_t* x, int64_t n, float* v) {
    for (int64_t i = 0; i < n; ++i) v[i] = from_f16(x[i]);
  }
  static void store(const float* v, int64_t n, uint16_t* y) {
    for (int64_t i = 0; i < n; ++i) y[i] = to_f16(v[i]);
  }
};

#ifdef FASTADAPT_X86
struct Avx2 {
  FASTADAPT_AVX2 static void philox(uint64_t key, uint64_t first, int count, uint32_t* words) {
    philox_avx2(key, first, count, words);
  }
  FASTADAPT_AVX2 static void load(const uint16_t* x, int64_t n, float* v) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(v + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
    for (; i < n; ++i) v[i] = _cvtsh_ss(x[i]);
  }
  FASTADAPT_AVX2 static void store(const float* v, int64_t n, uint16_t* y) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(v + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; ++i) y[i] = _cvtss_sh(v[i], _MM_FROUND_TO_NEAREST_INT);
  }
};
#endif

template <class Cpu, class Wide>
FASTADAPT_INLINE void load(const Dropout& d, int64_t first, int64_t n, Wide* v) {
  if constexpr (std::is_same_v<Wide, double>) {
    std::memcpy(v, static_cast<const double*>(d.x) + first, n * sizeof(double));
  } else if (d.x_type == ScalarType::Float) {
    std::memcpy(v, static_cast<const float*>(d.x) + first, n * sizeof(float));
  } else if (d.x_type == ScalarType::BFloat16) {
    const uint16_t* x = static_cast<const uint16_t*>(d.x) + first;
    for (int64_t i = 0; i < n; ++i) v[i] = from_bf16(x[i]);
  } else {
    Cpu::load(static_cast<const uint16_t*>(d.x) + first, n, v);
  }
}

template <class Cpu, class Wide>
FASTADAPT_INLINE void store(const Dropout& d, int64_t first, int64_t n, const Wide* v) {
  if (d.y_type == ScalarType::Double) {
    double* y = static_cast<double*>(d.y) + first;
    for (int64_t i = 0; i < n; ++i) y[i] = v[i];
  } else if (d.y_type == ScalarType::Float) {
    float* y = static_cast<float*>(d.y) + first;
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<float>(v[i]);
  } else if (d.y_type == ScalarType::BFloat16) {
    uint16_t* y = static_cast<uint16_t*>(d.y) + first;
    for (int64_t i = 0; i < n; ++i) y[i] = to_bf16(static_cast<float>(v[i]));
  } else if constexpr (std::is_same_v<Wide, float>) {
    Cpu::store(v, n, static_cast<uint16_t*>(d.y) + first);
  } else {
    float narrow[kChunk];
    for (int64_t i = 0; i < n; ++i) narrow[i] = static_cast<float>(v[i]);
    Cpu::store(narrow, n, static_cast<uint16_t*>(d.y) + first);
  }
}

typedef uint16_t __attribute__((may_alias)) Lane;

template <class Cpu, class Wide>
FASTADAPT_INLINE void run(const Dropout& d, int64_t chunk, int64_t end) {
  alignas(64) uint32_t words[kChunk / 2];
  alignas(64) Wide v[kChunk] = {};
  const Lane* lanes = reinterpret_cast<const Lane*>(words);
  const uint32_t threshold = d.threshold;
  const Wide scale = static_cast<Wide>(d.scale);
  for (; chunk < end; ++chunk) {
    const int64_t first = chunk * kChunk, n = std::min(kChunk, d.numel - first);
    Cpu::philox(d.seed, static_cast<uint64_t>(first) / 8, kChunk / 8, words);
    load<Cpu>(d, first, n, v);
    for (int64_t i = 0; i < kChunk; ++i) v[i] *= lanes[i] >= threshold ? scale : Wide{0};
    store<Cpu>(d, first, n, v);
  }
}

#ifdef FASTADAPT_X86
template <class Wide>
FASTADAPT_AVX2 void run_avx2(const Dropout& d, int64_t chunk, int64_t end) {
  run<Avx2, Wide>(d, chunk, end);
}
#endif

template <class Wide>
void run_parallel(const Dropout& d) {
  const int64_t chunks = d.numel / kChunk + (d.numel % kChunk != 0);
  torch::stable::parallel_for(0, chunks, kGrain / kChunk, [&](int64_t begin, int64_t end) {
#ifdef FASTADAPT_X86
    if (has_avx2()) return run_avx2<Wide>(d, begin, end);
#endif
    run<Plain, Wide>(d, begin, end);
  });
}

void check_dtype(ScalarType t, const char* name) {
  STD_TORCH_CHECK(is_float_or_half(t) || t == ScalarType::Double, name,
                  " must be float32, bfloat16, float16 or float64, got ", toString(t));
}

Tensor dropout(const Tensor& x, const Tensor& seed, double p, ScalarType out_dtype) {
  STD_TORCH_CHECK(x.is_cpu(), "x must be on the CPU, got device type ", static_cast<int>(x.device().type()));
  check_dtype(x.scalar_type(), "x");
  check_dtype(out_dtype, "out_dtype");
  check_flat(seed, "seed", ScalarType::Long, 1);
  // nearbyint rounds half to even, as Python's round() does
  const double threshold = std::nearbyint(p * 65536);
  STD_TORCH_CHECK(threshold >= 0 && threshold < 65536, "p must be in [0, 1) when rounded to 1/65536, got ", p);

  const Tensor from = torch::stable::contiguous(x);
  Tensor y = torch::stable::new_empty(x, x.sizes(), out_dtype);
  Dropout d{};
  d.x = from.const_data_ptr();
  d.y = y.mutable_data_ptr();
  d.x_type = x.scalar_type();
  d.y_type = out_dtype;
  d.numel = x.numel();
  d.seed = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  d.threshold = static_cast<uint32_t>(threshold);
  d.scale = 65536 / (65536 - threshold);
  if (d.x_type == ScalarType::Double) {
    run_parallel<double>(d);
  } else {
    run_parallel<float>(d);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastadapt_native, CPU, m) { m.impl("dropout", TORCH_BOX(&dropout)); }

}  // namespace fastadapt
