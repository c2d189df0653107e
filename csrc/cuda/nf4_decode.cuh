// SPDX-License-Identifier: Apache-2.0
// Decodes 4-bit weights on an NVIDIA GPU, bit for bit bitsandbytes' values:
//   out[i] = round(code[nibble(i)] * absmax[i / blocksize]), the even element in the high nibble.
// A lane of a warp holds one of the 16 code values and a look-up is a shuffle, which is exact and
// takes no shared memory. Products and the nested sum are rounded one by one, never contracted.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fastadapt::cuda {

struct Nf4 {
  const uint8_t* packed;
  const float* absmax;         // or
  const uint8_t* absmax_code;  // with the three that follow
  const float* nested_absmax;
  const float* nested_code;
  const float* offset;
  const float* code;
  int64_t numel, blocksize, nested_blocksize;
};

constexpr int kGroup = 32;     // elements of a thread: 16 bytes, all of one quantisation block
constexpr int kThreads = 256;

__device__ __forceinline__ float scale_of(const Nf4& w, int64_t block) {
  if (w.absmax) return w.absmax[block];
  const float fine = w.nested_code[w.absmax_code[block]];
  return __fadd_rn(__fmul_rn(fine, w.nested_absmax[block / w.nested_blocksize]), *w.offset);
}

template <class T>
__device__ __forceinline__ T rounded(float v);
template <>
__device__ __forceinline__ float rounded<float>(float v) { return v; }
template <>
__device__ __forceinline__ __nv_bfloat16 rounded<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }
template <>
__device__ __forceinline__ __half rounded<__half>(float v) { return __float2half_rn(v); }

__device__ __forceinline__ float widened(float v) { return v; }
__device__ __forceinline__ float widened(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widened(__half v) { return __half2float(v); }

// Round: what values are rounded to; Out: what they are stored in, Round or wider.
// vectors: packed and out are 16-byte aligned.
template <class Round, class Out>
__global__ void __launch_bounds__(kThreads) decode_kernel(const Nf4 w, Out* __restrict__ out, bool vectors) {
  const float mine = w.code[threadIdx.x & 15];
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t first = group * kGroup;
  const int64_t left = w.numel - first;  // every lane goes on to the shuffles, also one with nothing to do
  uint32_t words[4] = {0, 0, 0, 0};
  float scale = 0;
  if (left > 0) {
    scale = scale_of(w, first / w.blocksize);
    if (vectors && left >= kGroup) {
      const uint4 read = *reinterpret_cast<const uint4*>(w.packed + first / 2);
      words[0] = read.x, words[1] = read.y, words[2] = read.z, words[3] = read.w;
    } else {
#pragma unroll
      for (int i = 0; i < kGroup / 2; ++i)
        if (2 * i < left) words[i / 4] |= static_cast<uint32_t>(w.packed[first / 2 + i]) << (8 * (i % 4));
    }
  }
  alignas(16) Out values[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup / 2; ++i) {
    const uint32_t byte = words[i / 4] >> (8 * (i % 4));
    const float even = __shfl_sync(0xffffffffu, mine, (byte >> 4) & 15);
    const float odd = __shfl_sync(0xffffffffu, mine, byte & 15);
    values[2 * i] = rounded<Out>(widened(rounded<Round>(__fmul_rn(even, scale))));
    values[2 * i + 1] = rounded<Out>(widened(rounded<Round>(__fmul_rn(odd, scale))));
  }
  if (vectors && left >= kGroup) {
    constexpr int kVectors = kGroup * sizeof(Out) / 16;
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      reinterpret_cast<uint4*>(out + first)[i] = reinterpret_cast<const uint4*>(values)[i];
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (i < left) out[first + i] = values[i];
  }
}

template <class Round, class Out>
cudaError_t decode(const Nf4& w, Out* out, cudaStream_t stream) {
  if (w.numel == 0) return cudaSuccess;
  const bool vectors = (reinterpret_cast<uintptr_t>(w.packed) | reinterpret_cast<uintptr_t>(out)) % 16 == 0;
  const int64_t groups = (w.numel + kGroup - 1) / kGroup;
  const auto blocks = static_cast<unsigned>((groups + kThreads - 1) / kThreads);
  decode_kernel<Round, Out><<<blocks, kThreads, 0, stream>>>(w, out, vectors);
  return cudaGetLastError();
}

}  // namespace fastadapt::cuda
