"""Every operator under ``opcheck``, ``torch.compile`` and ``torch.export``, native ones in use."""

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from silvershard import kernels
from silvershard.kernels import PAD_TERM, FilterOp, ValueOp

PoolOf = Callable[..., Any]


class Case(NamedTuple):
    """An operator: its public function on the arguments of the registered one, and some."""

    public: Callable[..., Any]
    arguments: tuple[Any, ...]


def build(
    planes: Tensor,
    slots: Tensor,
    terms: Tensor,
    first: int,
    planes_used: int,
    hashes: int,
    seed: int,
) -> Tensor:
    target = planes.clone()
    kernels.bloom_build(
        target,
        slots,
        terms,
        first_plane=first,
        num_planes=planes_used,
        num_hashes=hashes,
        seed=seed,
    )
    return target


def positions(keys: Tensor, planes_used: int, hashes: int, seed: int) -> Tensor:
    return kernels.bloom_positions(keys, num_planes=planes_used, num_hashes=hashes, seed=seed)


def cases_of(pool: Any) -> dict[str, Case]:
    generator = torch.Generator().manual_seed(0)
    floats = torch.randn((3, 8), generator=generator)
    centroids = torch.randn((40, 8), generator=generator)
    half = torch.randn((2, 64, 8), generator=generator).half()
    slots = torch.tensor([[1, -1, 100], [3, 0, 127], [5, 5, 5]])
    programs = torch.tensor([[[FilterOp.PLANE, 1, 0, 0]], [[FilterOp.COMPARE, 0, 1, 1]]])
    exact = torch.tensor([[[FilterOp.TERM, 0, 0, 1]], [[FilterOp.NOP, 0, 0, 0]]])
    queries = pool.everywhere(0, 2, exclusions=2)._replace(programs=programs, verify=exact)
    pages = torch.tensor([[0, 3, -1], [3, 2, 1]], dtype=torch.int32)
    values = [[[ValueOp.COLUMN, 0], [ValueOp.NOP, 0]], [[ValueOp.COLUMN, 1], [ValueOp.EXP, 0]]]
    terms = torch.tensor([[1, 2], [3, PAD_TERM]])
    coarse = (floats, *kernels.quantize_rows(floats))
    clusters = (centroids, *kernels.quantize_rows(centroids))
    item_ids = torch.arange(24).view(3, 8)
    weight, bias = torch.ones(3, 8, 5), torch.ones(3, 5)
    return {
        "bloom_build": Case(build, (pool.planes, torch.tensor([3, 70]), terms, 2, 4, 3, 11)),
        "bloom_positions": Case(positions, (terms, 24, 3, 11)),
        "coarse_probe": Case(kernels.coarse_probe, (*coarse, *clusters, 4)),
        "count_eligible": Case(kernels.count_eligible, (*pool.filters(), programs)),
        "eligibility": Case(
            kernels.eligibility, (*pool.filters(), programs, pages, queries.excluded)
        ),
        "fixed_dot": Case(kernels.fixed_dot, (floats, floats[:1])),
        "fixed_exp": Case(kernels.fixed_exp, (floats,)),
        "fixed_log": Case(kernels.fixed_log, (floats.abs(),)),
        "fixed_sigmoid": Case(kernels.fixed_sigmoid, (floats,)),
        "fixed_sqrt": Case(kernels.fixed_sqrt, (floats.abs(),)),
        "gather_linear": Case(kernels.gather_linear, (half, slots, weight, bias)),
        "ivf_scan": Case(kernels.ivf_scan, (*pool.arguments(queries), 7)),
        "merge_topk": Case(kernels.merge_topk, (floats[None], item_ids[None], 5)),
        "pack_bits": Case(kernels.pack_bits, (torch.ones(3, 64, dtype=torch.bool),)),
        "popcount": Case(kernels.popcount, (pool.planes,)),
        "quantize_rows": Case(kernels.quantize_rows, (floats,)),
        "refine": Case(kernels.refine, (floats[:, None], half, slots)),
        "select_topk": Case(kernels.select_topk, (floats, item_ids, 5)),
        "unpack_bits": Case(kernels.unpack_bits, (pool.planes,)),
        "value_program": Case(
            kernels.value_program,
            (
                floats,
                torch.tensor([0, 1, 1]),
                torch.tensor(values, dtype=torch.int32),
                torch.zeros(2, 2),
            ),
        ),
    }


def registered() -> list[str]:
    """The names of all operators of this package."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.split("::")[1] for name in names if name.startswith("silvershard::"))


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


class Module(torch.nn.Module):
    """A public function whose non-tensor arguments are fixed."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self._case = case

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        left = iter(tensors)
        arguments = (next(left) if torch.is_tensor(one) else one for one in self._case.arguments)
        return tensors_of(self._case.public(*arguments))

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(one for one in self._case.arguments if torch.is_tensor(one))


def test_no_operator_is_missing_from_the_table(pool_of: PoolOf) -> None:
    assert sorted(cases_of(pool_of(0))) == registered()
    assert "ivf_scan" in registered()


@pytest.mark.parametrize("name", registered())
def test_opcheck_finds_nothing(name: str, pool_of: PoolOf) -> None:
    operator = getattr(torch.ops.silvershard, name).default
    torch.library.opcheck(operator, cases_of(pool_of(0))[name].arguments)


@pytest.mark.parametrize("name", registered())
def test_a_compiled_operator_equals_the_eager_one(name: str, pool_of: PoolOf) -> None:
    module = Module(cases_of(pool_of(0))[name])
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = module(*module.tensors())
    for mine, other in zip(compiled(*module.tensors()), expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", registered())
def test_an_exported_operator_survives_saving(name: str, pool_of: PoolOf) -> None:
    module = Module(cases_of(pool_of(0))[name])
    program = torch.export.export(module, module.tensors())
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(target.startswith(f"silvershard.{name}") for target in called)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    expected = module(*module.tensors())
    for mine, other in zip(loaded(*module.tensors()), expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.slow
def test_a_compiled_chain_of_operators_takes_batches_of_any_size(pool_of: PoolOf) -> None:
    pool = pool_of(15)

    def search(queries: Any) -> tuple[Tensor, ...]:
        result = pool.scan(queries, 9)
        merged = kernels.merge_topk(result.scores[None], result.item_ids[None], 5)
        return merged.scores, merged.item_ids, result.eligible

    torch._dynamo.reset()
    compiled = torch.compile(search, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_queries in (3, 1, 9):
        queries = pool.queries(15, num_queries, exclusions=4)
        for mine, other in zip(compiled(queries), search(queries), strict=True):
            assert torch.equal(mine, other)


def test_fake_tensor_mode_reaches_the_registered_operator() -> None:
    scores, ids = torch.randn(2, 9), torch.arange(18).view(2, 9)
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = kernels.select_topk(scores, ids, 3)
    assert isinstance(found.scores, FakeTensor)
    assert found.scores.shape == (2, 3)


def test_a_fake_tensor_that_left_its_mode_reaches_the_registered_operator() -> None:
    mode = FakeTensorMode()
    scores, ids = mode.from_tensor(torch.randn(2, 9)), mode.from_tensor(torch.arange(18).view(2, 9))
    found = kernels.select_topk(scores, ids, 3)
    assert isinstance(found.scores, FakeTensor)
    assert found.scores.shape == (2, 3)


def test_a_tracer_sees_the_operators() -> None:
    cache, slots = torch.ones(1, 64, 8).half(), torch.zeros(2, 3, dtype=torch.int64)
    graph = make_fx(lambda query: kernels.refine(query, cache, slots))(torch.ones(2, 1, 8))
    assert "silvershard.refine" in graph.code
    query = torch.randn(2, 1, 8)
    assert torch.equal(graph(query), kernels.refine(query, cache, slots))


@pytest.mark.parametrize("operator", ["refine", "gather_linear", "value_program", "fixed_exp"])
def test_a_gradient_is_refused_rather_than_lost(operator: str) -> None:
    half, slots = torch.ones(1, 64, 4).half(), torch.zeros(1, 3, dtype=torch.int64)
    trained = torch.ones(1, 4, 5, requires_grad=True)
    column = [[[ValueOp.COLUMN, 0]]]
    found = {
        "refine": lambda: kernels.refine(trained[:, :, :4], half, slots),
        "gather_linear": lambda: kernels.gather_linear(half, slots, trained, torch.ones(1, 5)),
        "value_program": lambda: kernels.value_program(
            trained[0],
            torch.zeros(4, dtype=torch.int64),
            torch.tensor(column, dtype=torch.int32),
            torch.zeros(1, 1),
        ),
        "fixed_exp": lambda: kernels.fixed_exp(trained),
    }[operator]()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"autograd|backward|grad"):
        found.sum().backward()


def test_strided_keys_have_the_positions_of_their_copies() -> None:
    keys = torch.tensor([[1, 2], [3, 4]]).T
    found = positions(keys, 24, 3, 11)
    assert torch.equal(found, positions(keys.contiguous(), 24, 3, 11))
    torch.library.opcheck(torch.ops.silvershard.bloom_positions.default, (keys, 24, 3, 11))
