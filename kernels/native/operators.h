// The table of operators that one instruction set offers; the including file has chosen the set.
#include "collector.h"
#include "filter.h"
#include "scan.h"
#include "rank.h"
#include "search.h"
#include "value.h"
#include "bloom.h"

namespace silvershard {
const Operators& SILVERSHARD_TABLE() {
  static const Operators table{
      SILVERSHARD_ISA::ivf_scan,      SILVERSHARD_ISA::ivf_search,
      SILVERSHARD_ISA::eligibility,   SILVERSHARD_ISA::coarse_probe,
      SILVERSHARD_ISA::select_topk,   SILVERSHARD_ISA::refine,
      SILVERSHARD_ISA::gather_linear, SILVERSHARD_ISA::quantize_rows,
      SILVERSHARD_ISA::fixed_map,     SILVERSHARD_ISA::value_program,
      SILVERSHARD_ISA::bloom_build,
  };
  return table;
}
}  // namespace silvershard
