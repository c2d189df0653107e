// SPDX-License-Identifier: Apache-2.0
// Which instructions this CPU has, asked once. One build serves every CPU: a function for AVX2 carries its own target
// attribute and is called only where has_avx2() says so. Other CPUs and architectures take the plain C++ path.
#pragma once

#if defined(__x86_64__) && !defined(FASTADAPT_PLAIN)
#define FASTADAPT_X86 1
#include <cpuid.h>
#include <immintrin.h>
#define FASTADAPT_AVX2 __attribute__((target("avx2,f16c")))
#endif

// Inlined into functions of either target, so that the compiler vectorises one body for both.
#define FASTADAPT_INLINE inline __attribute__((always_inline))

namespace fastadapt {

inline bool has_avx2() {
#ifdef FASTADAPT_X86
  // f16c by cpuid: not every compiler knows its name in __builtin_cpu_supports
  static const bool found = [] {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) && __builtin_cpu_supports("avx2");
  }();
  return found;
#else
  return false;
#endif
}

}  // namespace fastadapt
