// What dispatch.cpp knows of the instruction sets.
#pragma once

#include "abi.h"

namespace silvershard {

struct Operators {
  int32_t (*ivf_scan)(const IvfScanArgs&);
  int32_t (*ivf_search)(const IvfSearchArgs&);
  int32_t (*eligibility)(const EligibilityArgs&);
  int32_t (*coarse_probe)(const CoarseProbeArgs&);
  int32_t (*select_topk)(const SelectTopkArgs&);
  int32_t (*refine)(const RefineArgs&);
  int32_t (*gather_linear)(const GatherLinearArgs&);
  int32_t (*quantize_rows)(const QuantizeRowsArgs&);
  int32_t (*fixed_map)(const FixedMapArgs&);
  int32_t (*value_program)(const ValueProgramArgs&);
  int32_t (*bloom_build)(const BloomBuildArgs&);
};

const Operators& scalar_operators();
#ifdef SILVERSHARD_X86
const Operators& avx2_operators();
const Operators& avx512_operators();
#endif

}  // namespace silvershard
