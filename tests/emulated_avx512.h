// AVX-512 in plain C++ for machines without it: SIMDe, and what its release 0.7 lacks.
//
// Only tests compile this; see native_builds.py.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cstdint>

namespace emulated {

inline simde__m512 cvtepi32_ps(simde__m512i x) {
  int32_t from[16];
  float to[16];
  simde_mm512_storeu_si512(from, x);
  for (int i = 0; i < 16; ++i) to[i] = static_cast<float>(from[i]);
  return simde_mm512_loadu_ps(to);
}

inline simde__m512i srai_epi32(simde__m512i x, unsigned count) {
  int32_t lanes[16];
  simde_mm512_storeu_si512(lanes, x);
  for (int32_t& lane : lanes) lane >>= count < 31 ? count : 31;
  return simde_mm512_loadu_si512(lanes);
}

// Elements whose bit is not set are not touched, as the instructions promise.
template <class Element>
inline simde__m512i maskz_loadu(uint64_t mask, const void* from) {
  Element lanes[64 / sizeof(Element)] = {};
  for (unsigned i = 0; i < 64 / sizeof(Element); ++i)
    if (mask >> i & 1) lanes[i] = static_cast<const Element*>(from)[i];
  return simde_mm512_loadu_si512(lanes);
}

}  // namespace emulated

#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps(x) emulated::cvtepi32_ps(x)
#undef _mm512_srai_epi32
#define _mm512_srai_epi32(x, count) emulated::srai_epi32(x, count)
#undef _mm512_maskz_loadu_epi8
#define _mm512_maskz_loadu_epi8(mask, from) emulated::maskz_loadu<int8_t>(mask, from)
#undef _mm512_maskz_loadu_epi64
#define _mm512_maskz_loadu_epi64(mask, from) emulated::maskz_loadu<int64_t>(mask, from)
#undef _mm512_cmplt_epi64_mask
#define _mm512_cmplt_epi64_mask(a, b) simde_mm512_cmpgt_epi64_mask(b, a)
// The release names this macro with a fourth parameter.
#undef _mm512_mask_cmple_epu32_mask
#define _mm512_mask_cmple_epu32_mask(mask, a, b) simde_mm512_mask_cmple_epu32_mask(mask, a, b)
