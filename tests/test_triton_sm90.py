"""Compiles every Triton kernel for Hopper on a machine without a GPU and reads its machine code.

Run as a script, in a process where Triton does not interpret, it launches every operator on meta
tensors of real size with a launcher that compiles instead, and prints what it found. So what is
read here is what is launched there, with the same constants and alignments.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

# The compilations take a minute of processor time; the first test waits for all of them.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Case = dict[str, Any]


def described(tensor: torch.Tensor) -> tuple[str, bool]:
    names = {"float32": "fp32", "float16": "fp16", "bool": "i1"}
    name = str(tensor.dtype).removeprefix("torch.").replace("int", "i")
    aligned = tensor.storage_offset() * tensor.element_size() % 16 == 0
    return "*" + names.get(name, name), aligned


def compiled(kernel: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Case:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {
        name: value for name, value in given.items() if name in names
    }
    options = {name: value for name, value in given.items() if name not in names}
    signature, constants, attributes = {}, {}, {}
    for place, (name, parameter) in enumerate(zip(names, kernel.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], aligned = described(value)
        else:
            aligned = value % 16 == 0
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(code.asm["cubin"])

    def tool(name: str, option: str) -> str:
        done = subprocess.run(
            [tools / name, option, cubin], capture_output=True, text=True, check=True
        )
        return done.stdout + done.stderr

    listing = tool("nvdisasm", "-c")
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+ )?([A-Z][A-Z0-9_.]+)", listing)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage"))
    assert usage is not None
    return {
        "kernel": kernel.fn.__name__,
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "constants": {name: value for name, value in constants.items() if name.isupper()},
        "num_warps": options.get("num_warps", 4),
        "fused_in_ptx": len(re.findall(r"\bfma\.", code.asm["ptx"])),
        "opcodes": Counter(opcodes),
    }


def launch_all(dim: int, num_queries: int, page_size: int) -> None:
    """Call every launcher on meta tensors of the size of ten million items in 4,096 clusters."""
    from silvershard.kernels.bloom_build_triton import bloom_build_triton
    from silvershard.kernels.coarse_probe_triton import coarse_probe_triton
    from silvershard.kernels.eligibility_triton import count_eligible_triton, eligibility_triton
    from silvershard.kernels.gather_linear_triton import gather_linear_triton
    from silvershard.kernels.ivf_scan_triton import ivf_scan_triton
    from silvershard.kernels.quantize_triton import quantize_rows_triton
    from silvershard.kernels.refine_triton import refine_triton
    from silvershard.kernels.select_topk_triton import select_topk_triton
    from silvershard.kernels.value_program_triton import value_program_triton

    def of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    half, single, byte = torch.float16, torch.float32, torch.int8
    int32, int64 = torch.int32, torch.int64
    num_pages, words = 10_240_000 // page_size, page_size // 64
    filters = (
        of(int64, 200, num_pages, words),
        of(int64, 2, num_pages, page_size),
        of(int64, num_pages, page_size, 8),
    )
    pool = (
        of(byte, num_pages, page_size, dim),
        of(single, num_pages, page_size),
        of(int64, num_pages, page_size),
    )
    queries = (of(byte, num_queries, dim), of(single, num_queries))
    clusters = (of(int32, num_queries, 64), of(int32, 4096, 80))
    for length, verify_length in ((0, 0), (40, 3)):
        programs = of(int64, num_queries, length, 4)
        verify = of(int64, num_queries, verify_length, 4)
        excluded = of(int64, num_queries, 100)
        ivf_scan_triton(*queries, *clusters, *pool, *filters, programs, verify, excluded, 2048)
        eligibility_triton(*filters, programs, of(int32, num_queries, 500), excluded)
        count_eligible_triton(*filters, programs)
    for num_candidates in (4096, 160_000):
        scores = of(single, num_queries, num_candidates)
        select_topk_triton(scores, of(int64, num_queries, num_candidates), 2048)
    centroids = (of(single, 4096, dim), of(byte, 4096, dim), of(single, 4096))
    coarse_probe_triton(of(single, num_queries, dim), *queries, *centroids, 64)
    slots = of(int64, num_queries, 3000)
    refine_triton(of(single, num_queries, 2, dim), pool[0].to(half), slots)
    weight, bias = of(single, num_queries, dim, 256), of(single, num_queries, 256)
    gather_linear_triton(pool[0].to(half), slots, weight, bias)
    quantize_rows_triton(of(single, 10_000, dim))
    request = of(int64, 100_000)
    program, constants = of(int32, num_queries, 30, 2), of(single, num_queries, 30)
    value_program_triton(of(single, 100_000, 8), request, program, constants)
    bloom_build_triton(filters[0], of(int64, 5000), of(int64, 5000, 8), 10, 180, 5, 7)


def report() -> list[Case]:
    from triton.runtime.jit import JITFunction

    cases: dict[str, Case] = {}

    def compile_instead(kernel: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        shown = [
            (value.dtype, described(value)[1])
            if isinstance(value, torch.Tensor)
            else (value == 1, value % 16 == 0)
            for value in args
        ]
        name = str((kernel.fn.__name__, shown, sorted(given.items())))
        if name not in cases:
            cases[name] = compiled(kernel, args, given)

    JITFunction.run = compile_instead
    for dim, num_queries, page_size in ((64, 1, 128), (128, 1024, 64)):
        launch_all(dim, num_queries, page_size)
    return list(cases.values())


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    environment = {name: one for name, one in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-P", __file__],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[Case] = json.loads(done.stdout)
    return found


def of_kernel(cases: list[Case], name: str) -> list[Case]:
    found = [case for case in cases if case["kernel"] == name]
    assert found, f"{name} was never launched"
    return found


def count(case: Case, prefix: str) -> int:
    return sum(number for name, number in case["opcodes"].items() if name.startswith(prefix))


def kernels_in_source() -> set[str]:
    folder = Path(__file__).resolve().parent.parent / "kernels"
    return {
        name
        for path in folder.glob("*_triton.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), flags=re.MULTILINE)
    }


def test_every_kernel_is_compiled(cases: list[Case]) -> None:
    assert {case["kernel"] for case in cases} == kernels_in_source()


def test_no_kernel_spills_registers(cases: list[Case]) -> None:
    # ptxas may park up to four scalars of a query; the selection holds a whole row in registers.
    spilling = [
        (case["kernel"], case["constants"], case["stack"])
        for case in cases
        if case["stack"] > (48 if case["kernel"] == "_select_row_kernel" else 16)
    ]
    assert spilling == []


def test_kernels_on_the_hot_path_leave_room_for_many_warps(cases: list[Case]) -> None:
    limits = {
        "_scan_kernel": 96,
        "_sample_kernel": 96,
        "_cluster_scan_kernel": 200,
        "_filter_lists_kernel": 208,
        "_refine_kernel": 128,
        "_compact_kernel": 96,
        "_merge_runs_kernel": 64,
        "_sort_tiles_kernel": 128,
    }
    excess = [
        (case["kernel"], case["constants"], case["registers"])
        for case in cases
        if case["registers"] > limits.get(case["kernel"], 255)
    ]
    assert excess == []


def test_rows_are_scored_with_dp4a_on_words_loaded_sixteen_bytes_at_a_time(
    cases: list[Case],
) -> None:
    for case in of_kernel(cases, "_scan_kernel") + of_kernel(cases, "_sample_kernel"):
        constants = case["constants"]
        threads = 32 * case["num_warps"]
        # A thread takes four codes per dp4a and four words per load.
        padded = constants["CHUNK"] * constants["ROWS"] // threads
        assert count(case, "IDP.4A.S8.S8") >= padded
        assert count(case, "LDG.E.128") >= padded // 4


def test_shared_clusters_are_scored_on_tensor_cores(cases: list[Case]) -> None:
    for case in of_kernel(cases, "_cluster_scan_kernel"):
        assert count(case, "IGMMA") > 0
        assert count(case, "LDG.E.128") + count(case, "LDGSTS") > 0
    wide = [
        case
        for case in of_kernel(cases, "_coarse_scores_kernel")
        if case["constants"]["BLOCK_Q"] == 64
    ]
    assert wide
    assert all(count(case, "IGMMA") > 0 for case in wide)


def test_a_score_costs_few_instructions(cases: list[Case]) -> None:
    # Static instructions per thread over scores per thread: an upper bound, with both branches of
    # the scan and all prologues.
    for case in of_kernel(cases, "_cluster_scan_kernel"):
        constants = case["constants"]
        scores = constants["ITEMS"] * constants["BLOCK_Q"] / (32 * case["num_warps"])
        assert sum(case["opcodes"].values()) / scores <= {16: 80, 32: 44}[constants["BLOCK_Q"]]
    for case in of_kernel(cases, "_scan_kernel"):
        if not case["constants"]["VERIFY"]:
            rows = case["constants"]["ROWS"] / (32 * case["num_warps"])
            assert sum(case["opcodes"].values()) / rows <= 720


def test_nothing_is_fused_where_each_operation_must_round(cases: list[Case]) -> None:
    # FFMA and DFMA do occur in the expansions of precise divisions and roots, so PTX is read.
    assert [case["kernel"] for case in cases if case["fused_in_ptx"]] == []
    for case in of_kernel(cases, "_refine_kernel") + of_kernel(cases, "_rescore_kernel"):
        assert count(case, "FFMA") == 0
        assert count(case, "FMUL") > 0
        assert count(case, "FADD") > 0


def test_cached_rows_are_read_sixteen_bytes_at_a_time(cases: list[Case]) -> None:
    for case in of_kernel(cases, "_refine_kernel"):
        assert count(case, "LDG.E.128") >= case["constants"]["DIM"] // 8
        assert count(case, "LDG.E.U16") == 0


if __name__ == "__main__":
    sys.stdout.write(json.dumps(report()))
