"""Operators on tensors: validated public functions over shipped PyTorch references."""

from silvershard.kernels.bits import pack_bits, popcount, unpack_bits
from silvershard.kernels.bloom_build import bloom_build, bloom_positions
from silvershard.kernels.coarse_probe import MAX_CODE_DIM, coarse_probe
from silvershard.kernels.eligibility import LIVE_PLANE, PAGE_SIZES, count_eligible, eligibility
from silvershard.kernels.filter_ops import MAX_STACK, NULL_KEY, PAD_TERM, FilterOp, Relation
from silvershard.kernels.fixed_math import (
    fixed_dot,
    fixed_exp,
    fixed_log,
    fixed_sigmoid,
    fixed_sqrt,
)
from silvershard.kernels.gather_linear import gather_linear
from silvershard.kernels.ivf_scan import ScanResult, ivf_scan
from silvershard.kernels.ivf_search import IvfIndex
from silvershard.kernels.merge_topk import merge_topk
from silvershard.kernels.quantize import MAX_CODE, QuantizedRows, quantize_rows
from silvershard.kernels.refine import refine
from silvershard.kernels.select_topk import TopK, select_topk
from silvershard.kernels.value_program import MAX_VALUE_STACK, ValueOp, value_program

__all__ = [
    "LIVE_PLANE",
    "MAX_CODE",
    "MAX_CODE_DIM",
    "MAX_STACK",
    "MAX_VALUE_STACK",
    "NULL_KEY",
    "PAD_TERM",
    "PAGE_SIZES",
    "FilterOp",
    "IvfIndex",
    "QuantizedRows",
    "Relation",
    "ScanResult",
    "TopK",
    "ValueOp",
    "bloom_build",
    "bloom_positions",
    "coarse_probe",
    "count_eligible",
    "eligibility",
    "fixed_dot",
    "fixed_exp",
    "fixed_log",
    "fixed_sigmoid",
    "fixed_sqrt",
    "gather_linear",
    "ivf_scan",
    "merge_topk",
    "pack_bits",
    "popcount",
    "quantize_rows",
    "refine",
    "select_topk",
    "unpack_bits",
    "value_program",
]
