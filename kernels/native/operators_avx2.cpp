// Operators for AVX2. Only this file may use these instructions: everything from other headers is
// included before they are switched on, so that no shared function is compiled with them.
#include <vector>

#include "dispatch.h"
#include "support.h"

#ifdef SILVERSHARD_X86
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
#endif

#define SILVERSHARD_ISA avx2
#define SILVERSHARD_TABLE avx2_operators
#include "vectors_avx2.h"
#include "operators.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // SILVERSHARD_X86
