// Operators for AVX512. Only this file may use these instructions: everything from other headers is
// included before they are switched on, so that no shared function is compiled with them.
#include <vector>

#include "dispatch.h"
#include "support.h"

#ifdef SILVERSHARD_X86
#ifdef SILVERSHARD_EMULATED
// Tests without such a machine compile the same code against an emulation, with no target.
#include "emulated_avx512.h"
#else
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
#endif
#endif  // SILVERSHARD_EMULATED

#define SILVERSHARD_ISA avx512
#define SILVERSHARD_TABLE avx512_operators
#include "vectors_avx512.h"
#include "operators.h"

#ifndef SILVERSHARD_EMULATED
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#endif  // SILVERSHARD_X86
