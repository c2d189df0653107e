// SPDX-License-Identifier: Apache-2.0
// The adapted linear layer as raw pointers: what low_rank.cpp checks and the kernels of one instruction set run.
//   u = drop(x) A^T    y = x W^T + s u B^T + bias
//   du = s g B    dx = g W + drop'(du A)    da = du^T drop(x)    db = s g^T u
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "nf4.h"

namespace fastadapt {

// The frozen weight, (n, k), as it is stored: or its transpose, (k, n), where `transposed` says so.
struct Weight {
  enum Kind { kNone, kNf4, kDense, kInt8 } kind = kNone;
  Nf4 nf4{};              // blocksize a power of two of at least 64 that divides a row
  const void* dense = nullptr;  // rows of the kernel's own dtype
  const int8_t* int8 = nullptr;
  const float* row_scale = nullptr;  // int8: w = int8 * row_scale[row] / 127, rounded to the kernel's dtype
  int64_t rows = 0, columns = 0, stride = 0;
  bool transposed = false;
};

// What the kernels ask of a 4-bit weight's blocks: nested_blocksize is 0 where there are no nested ones.
inline bool whole_blocks(int64_t blocksize, int64_t nested_blocksize, int64_t k) {
  return blocksize >= 64 && (blocksize & (blocksize - 1)) == 0 && k % blocksize == 0 && nested_blocksize >= 0 &&
         (nested_blocksize & (nested_blocksize - 1)) == 0;
}

struct Dropout16 {
  bool on = false;
  uint64_t seed = 0;
  uint32_t threshold = 0;
  float scale = 1;
};

struct Forward {
  int64_t m, n, k, r;
  const void* x;      // (m, k)
  const float* bias;  // (n,) or null
  const float *a, *b;  // (r, k), (n, r)
  float scale;
  Dropout16 drop;
  Weight w;
  void* y;  // (m, n)
  void* u;  // (m, r)
  bool add;  // y += instead of y =
};

struct Backward {
  int64_t m, n, k, r;
  const void *g, *x, *u;  // (m, n), (m, k), (m, r)
  const float *a, *b;
  float scale;
  Dropout16 drop;
  Weight w;
  void* dx;          // (m, k) or null
  float *da, *db;    // (r, k), (n, r) or null
  bool add;          // dx +=
};

void forward_bf16(const Forward& f);
void forward_f32(const Forward& f);
void backward_bf16(const Backward& f);
void backward_f32(const Backward& f);

// Memory of this thread that grows and stays: a fresh block costs more in page faults than its use. One slot, one user.
enum Slot { kPanel, kSums, kMasked, kExtra, kShared, kShared2, kShared3, kShared4, kShared5, kSlots };

inline void* scratch(Slot slot, size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  struct Block {
    std::unique_ptr<void, Free> data;
    size_t bytes = 0;
  };
  thread_local Block blocks[kSlots];
  Block& block = blocks[slot];
  if (block.bytes < bytes) {
    block.data.reset();
    block.bytes = (bytes + 4095) / 4096 * 4096;
    block.data.reset(std::aligned_alloc(64, block.bytes));
    if (!block.data) {
      block.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return block.data.get();
}

}  // namespace fastadapt
