// SPDX-License-Identifier: Apache-2.0
// Which instructions this CPU has, asked once. One build serves every CPU: a function for AVX2 carries its own target
// attribute and is called only where has_avx2() says so. Other CPUs and architectures take the plain C++ path.
// FASTADAPT_ISA=plain|avx2|avx512|avx512_bf16 in the environment allows no more than that, for tests.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && !defined(FASTADAPT_PLAIN)
#define FASTADAPT_X86 1
#include <cpuid.h>
#include <immintrin.h>
#define FASTADAPT_AVX2 __attribute__((target("avx2,f16c")))
#endif

// Inlined into functions of either target, so that the compiler vectorises one body for both.
#define FASTADAPT_INLINE inline __attribute__((always_inline))

namespace fastadapt {

enum Isa { kPlain, kAvx2, kAvx512, kAvx512Bf16 };

inline Isa isa_of_cpu() {
#ifdef FASTADAPT_X86
  // f16c and bf16 by cpuid: not every compiler knows their names in __builtin_cpu_supports
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C) || !__builtin_cpu_supports("avx2")) return kPlain;
  for (bool has : {bool(__builtin_cpu_supports("fma")), bool(__builtin_cpu_supports("bmi2")),
                   bool(__builtin_cpu_supports("avx512f")), bool(__builtin_cpu_supports("avx512bw")),
                   bool(__builtin_cpu_supports("avx512vl")), bool(__builtin_cpu_supports("avx512dq"))})
    if (!has) return kAvx2;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5)) ? kAvx512Bf16 : kAvx512;
#else
  return kPlain;
#endif
}

inline Isa isa() {
  static const Isa found = [] {
    const Isa has = isa_of_cpu();
    const char* most = std::getenv("FASTADAPT_ISA");
    const char* names[] = {"plain", "avx2", "avx512", "avx512_bf16"};
    for (int i = 0; most && i < has; ++i)
      if (std::strcmp(most, names[i]) == 0) return static_cast<Isa>(i);
    return has;
  }();
  return found;
}

inline bool has_avx2() { return isa() >= kAvx2; }
inline bool has_avx512() { return isa() >= kAvx512; }
inline bool has_avx512_bf16() { return isa() >= kAvx512Bf16; }

}  // namespace fastadapt
