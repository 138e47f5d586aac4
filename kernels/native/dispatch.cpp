// Entry points of the library: they pick the instruction set and let no exception out.
#include "dispatch.h"

#include <new>

namespace silvershard {
namespace {

const Operators& operators_of(int32_t isa) {
#ifdef SILVERSHARD_X86
  if (isa == ISA_AVX512) return avx512_operators();
  if (isa == ISA_AVX2) return avx2_operators();
#endif
  (void)isa;
  return scalar_operators();
}

#if defined(SILVERSHARD_X86) && !defined(SILVERSHARD_EMULATED)
// What both vector sets are compiled with beside their vectors; a hypervisor may hide any of it.
bool has_common_extensions() {
  return __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("lzcnt");
}
#endif

template <class Args>
int32_t call(int32_t (*Operators::*operation)(const Args&), int32_t isa, const Args* args) {
  try {
    return (operators_of(isa).*operation)(*args);
  } catch (const std::bad_alloc&) {
    return STATUS_OUT_OF_MEMORY;
  }
}

}  // namespace
}  // namespace silvershard

using silvershard::Operators;
using silvershard::call;
#if defined(SILVERSHARD_X86) && !defined(SILVERSHARD_EMULATED)
using silvershard::has_common_extensions;
#endif

extern "C" {

int32_t silvershard_abi_version() { return 3; }

int32_t silvershard_best_isa() {
#ifdef SILVERSHARD_X86
#ifdef SILVERSHARD_EMULATED
  return ISA_AVX512;
#else
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
      has_common_extensions())
    return ISA_AVX512;
  if (__builtin_cpu_supports("avx2") && has_common_extensions()) return ISA_AVX2;
#endif
#endif
  return ISA_SCALAR;
}

int32_t silvershard_ivf_scan(int32_t isa, const IvfScanArgs* args) {
  return call(&Operators::ivf_scan, isa, args);
}
int32_t silvershard_ivf_search(int32_t isa, const IvfSearchArgs* args) {
  return call(&Operators::ivf_search, isa, args);
}
int32_t silvershard_eligibility(int32_t isa, const EligibilityArgs* args) {
  return call(&Operators::eligibility, isa, args);
}
int32_t silvershard_coarse_probe(int32_t isa, const CoarseProbeArgs* args) {
  return call(&Operators::coarse_probe, isa, args);
}
int32_t silvershard_select_topk(int32_t isa, const SelectTopkArgs* args) {
  return call(&Operators::select_topk, isa, args);
}
int32_t silvershard_refine(int32_t isa, const RefineArgs* args) {
  return call(&Operators::refine, isa, args);
}
int32_t silvershard_gather_linear(int32_t isa, const GatherLinearArgs* args) {
  return call(&Operators::gather_linear, isa, args);
}
int32_t silvershard_quantize_rows(int32_t isa, const QuantizeRowsArgs* args) {
  return call(&Operators::quantize_rows, isa, args);
}
int32_t silvershard_fixed_map(int32_t isa, const FixedMapArgs* args) {
  return call(&Operators::fixed_map, isa, args);
}
int32_t silvershard_value_program(int32_t isa, const ValueProgramArgs* args) {
  return call(&Operators::value_program, isa, args);
}
int32_t silvershard_bloom_build(int32_t isa, const BloomBuildArgs* args) {
  return call(&Operators::bloom_build, isa, args);
}

}  // extern "C"
