from importlib import import_module

import pytest
import torch
from torch import Tensor

from silvershard.kernels import QuantizedRows, coarse_probe, fixed_dot, quantize_rows

pytestmark = pytest.mark.usefixtures("implementation")

# The package re-exports the function under the name of its module.
MODULE = import_module("silvershard.kernels.coarse_probe")


def probe(query: Tensor, centroids: Tensor, probes: int) -> Tensor:
    queries = quantize_rows(query)
    clusters = quantize_rows(centroids)
    return coarse_probe(query, *queries, centroids, *clusters, probes)


def slow(query: Tensor, centroids: Tensor, probes: int) -> list[list[int]]:
    codes, scales = quantize_rows(centroids)
    answer = []
    for row in query:
        row_codes, row_scale = (part[0] for part in quantize_rows(row[None]))
        coarse = [
            (-float(torch.tensor(float(dot)) * scale * row_scale), cluster)
            for cluster, (dot, scale) in enumerate(
                zip((codes.long() @ row_codes.long()).tolist(), scales, strict=True)
            )
        ]
        likely = [cluster for _, cluster in sorted(coarse)[: probes + max(16, probes // 4)]]
        exact = [(-float(fixed_dot(row, centroids[cluster])), cluster) for cluster in likely]
        answer.append([cluster for _, cluster in sorted(exact)[:probes]])
    return answer


def test_hand_computed_case_breaks_ties_by_the_smaller_cluster() -> None:
    centroids = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [1.0, 0.0], [-1.0, 0.0]])
    assert probe(torch.tensor([[2.0, 0.0]]), centroids, 5).tolist() == [[1, 3, 2, 0, 4]]
    assert probe(torch.tensor([[0.0, 0.0]]), centroids, 3).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("num_queries", "num_clusters", "dim", "probes"),
    [(1, 1, 16, 1), (3, 40, 33, 4), (5, 200, 16, 80), (2, 100, 1024, 3), (7, 130, 1, 20)],
)
@pytest.mark.parametrize("levels", [2, 1000])
def test_probes_equal_a_slow_sort(
    num_queries: int, num_clusters: int, dim: int, probes: int, levels: int
) -> None:
    generator = torch.Generator().manual_seed(num_clusters + levels)

    def random(rows: int) -> Tensor:
        return torch.randint(-levels, levels + 1, (rows, dim), generator=generator).float() / 7

    query, centroids = random(num_queries), random(num_clusters)
    got = probe(query, centroids, probes)
    assert got.dtype == torch.int32
    assert got.tolist() == slow(query, centroids, probes)


def test_codes_alone_decide_who_is_scored_again() -> None:
    # The codes say that cluster 0 is far away, so its exact score is never looked at.
    query = torch.ones(1, 4)
    centroids = torch.ones(40, 4)
    centroids[0] = 100.0
    codes, scales = quantize_rows(centroids)
    codes[0] = -127
    got = coarse_probe(query, *quantize_rows(query), centroids, codes, scales, 2)
    assert got.tolist() == [[1, 2]]


def test_a_quarter_of_many_probes_is_scored_again() -> None:
    # By the codes cluster 99 has rank 100: within 80 + 80 / 4, beyond 80 + 16.
    query = torch.ones(1, 1)
    centroids = torch.full((130, 1), 0.5)
    centroids[99] = 5.0
    codes = torch.full((130, 1), 127, dtype=torch.int8)
    scales = torch.linspace(2.0, 1.0, 130)
    got = coarse_probe(query, *quantize_rows(query), centroids, codes, scales, 80)
    assert got[0, 0].item() == 99
    scales[99] = scales[100] - 1e-3
    got = coarse_probe(query, *quantize_rows(query), centroids, codes, scales, 80)
    assert 99 not in got[0].tolist()


def test_coarse_scores_below_every_float_leave_the_others() -> None:
    query = torch.ones(1, 4)
    centroids = -torch.ones(40, 4)
    centroids[:6] = 1.0
    codes, scales = quantize_rows(centroids)
    scales[6:] = 3e38
    assert probe_with(query, centroids, codes, scales, 4).tolist() == [[0, 1, 2, 3]]
    # Their exact scores would be the best, but they are padding of the shortlist.
    centroids[6:] = 9.0
    assert probe_with(query, centroids, codes, scales, 4).tolist() == [[0, 1, 2, 3]]


def probe_with(
    query: Tensor, centroids: Tensor, codes: Tensor, scales: Tensor, probes: int
) -> Tensor:
    return coarse_probe(query, *quantize_rows(query), centroids, codes, scales, probes)


def test_a_batch_equals_its_rows_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn((64, 48), generator=generator)
    centroids = torch.randn((128, 48), generator=generator)
    whole = probe(query, centroids, 9)
    for row in range(64):
        assert torch.equal(probe(query[row : row + 1], centroids, 9)[0], whole[row])


@pytest.mark.parametrize("implementation", ["reference"], indirect=True)
def test_passes_over_few_queries_equal_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn((64, 48), generator=generator)
    centroids = torch.randn((128, 48), generator=generator)
    whole = probe(query, centroids, 9)
    monkeypatch.setattr(MODULE, "_CHUNK_ELEMENTS", 10_000)
    assert torch.equal(probe(query, centroids, 9), whole)


def test_no_query_gives_no_rows() -> None:
    assert probe(torch.empty(0, 4), torch.ones(3, 4), 2).shape == (0, 2)


def test_bad_input_is_refused() -> None:
    query, centroids = torch.ones(2, 4), torch.ones(5, 4)
    queries, clusters = quantize_rows(query), quantize_rows(centroids)

    def refuses(
        message: str,
        *,
        query: Tensor = query,
        queries: QuantizedRows = queries,
        centroids: Tensor = centroids,
        clusters: QuantizedRows = clusters,
        probes: int = 2,
    ) -> None:
        with pytest.raises(ValueError, match=message):
            coarse_probe(query, *queries, centroids, *clusters, probes)

    refuses("query must be torch.float32", query=query.double())
    refuses(r"query must have shape \(Q, D\)", query=query[0])
    refuses(r"query must have D in \[1, 1024\], got 1025", query=torch.ones(2, 1025))
    refuses(r"query must have D in \[1, 1024\], got 0", query=torch.ones(2, 0))
    refuses("query must be finite", query=query * torch.nan)
    refuses("query_codes must be torch.int8", queries=queries._replace(codes=query))
    refuses("query_codes must have shape", queries=queries._replace(codes=queries.codes[:1]))
    refuses("query_scales must have shape", queries=queries._replace(scales=queries.scales[:1]))
    refuses("query_scales must be finite", queries=queries._replace(scales=query[:, 0] / 0))
    refuses(r"centroids must have shape \(C, 4\)", centroids=torch.ones(5, 3))
    refuses("centroids must be finite", centroids=centroids / 0)
    refuses("centroids must be on the device", centroids=centroids.to("meta"))
    refuses("centroid_codes must be torch.int8", clusters=clusters._replace(codes=centroids))
    refuses("centroid_scales must have", clusters=clusters._replace(scales=clusters.scales[:4]))
    refuses(
        "centroid_scales must be finite", clusters=clusters._replace(scales=centroids[:, 0] / 0)
    )
    refuses(r"probes must be in \[1, 5\], got 0", probes=0)
    refuses(r"probes must be in \[1, 5\], got 6", probes=6)
    refuses("finite in float32, got an overflow", query=query * 3e38, centroids=-centroids * 3e38)
