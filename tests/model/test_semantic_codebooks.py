import pytest
import torch
from torch import Tensor

from silvershard.model.semantic_codebooks import fit_codebooks
from silvershard.model.semantic_config import SemanticConfig
from silvershard.model.semantic_ids import encode_items


def make_items(count: int = 900, dim: int = 12) -> Tensor:
    """Unit vectors around the sums of a few directions, so that codes have something to find."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(6, dim, generator=generator)
    fine = 0.6 * torch.randn(7, dim, generator=generator)
    which = torch.randint(42, (count,), generator=generator)
    noise = 0.15 * torch.randn(count, dim, generator=generator)
    return torch.nn.functional.normalize(coarse[which % 6] + fine[which // 6] + noise, dim=1)


def left_over(items: Tensor, codebooks: Tensor) -> list[float]:
    """The mean squared length of what each level leaves."""
    codes = encode_items(items, codebooks).long()
    rest, found = items, []
    for level, codebook in enumerate(codebooks):
        rest = rest - codebook[codes[:, level]]
        found.append(float((rest * rest).sum(1).mean()))
    return found


def test_every_level_leaves_less_and_random_codes_leave_more() -> None:
    items = make_items()
    codebooks = fit_codebooks(items, SemanticConfig(levels=3, width=8), seed=0)
    assert codebooks.shape == (3, 8, 12)
    left = left_over(items, codebooks)
    assert left[0] > 1.5 * left[1] > 1.5 * left[2]
    generator = torch.Generator().manual_seed(1)
    drawn = items[torch.randperm(900, generator=generator)[:8]]
    assert left[0] < 0.8 * left_over(items, drawn[None])[0]


def test_lloyds_steps_improve_on_the_directions_they_start_from() -> None:
    items = make_items() * torch.rand(900, 1, generator=torch.Generator().manual_seed(3))
    config = SemanticConfig(levels=2, width=8)
    left = [
        left_over(items, fit_codebooks(items, config, seed=0, iterations=count))[-1]
        for count in (0, 20)
    ]
    assert left[1] < 0.97 * left[0]


def test_every_code_is_the_mean_of_its_items_in_the_end() -> None:
    items = make_items()
    codebook = fit_codebooks(items, SemanticConfig(levels=1, width=8), seed=0, iterations=60)[0]
    codes = encode_items(items, codebook[None])[:, 0].long()
    for code in range(8):
        members = items[codes == code]
        assert len(members)
        assert torch.allclose(codebook[code], members.mean(0), atol=1e-6)


def test_items_in_one_direction_are_told_apart_by_length() -> None:
    """All begin below one code; the others find items that are far from theirs."""
    items = torch.linspace(1.0, 2.0, 200)[:, None] * torch.tensor([3.0, 4.0])
    codebooks = fit_codebooks(items, SemanticConfig(levels=1, width=8), seed=0)
    assert len(encode_items(items, codebooks).unique()) == 8
    assert left_over(items, codebooks)[0] < 0.05


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_codebooks_have_the_scale_of_the_embeddings(scale: float) -> None:
    items = make_items()
    config = SemanticConfig(levels=2, width=8)
    plain = encode_items(items, fit_codebooks(items, config, seed=0))
    exact = 2.0 ** round(torch.tensor(scale).log2().item())
    scaled = encode_items(items * exact, fit_codebooks(items * exact, config, seed=0))
    assert torch.equal(plain, scaled)


def test_codebooks_depend_on_the_seed_and_not_on_threads() -> None:
    items, config = make_items(), SemanticConfig(levels=2, width=16)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(fit_codebooks(items, config, seed=4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], fit_codebooks(items, config, seed=5))


def test_few_or_equal_items_get_codes_too() -> None:
    config = SemanticConfig(levels=3, width=8)
    few = make_items(3)
    codes = encode_items(few, fit_codebooks(few, config, seed=0))
    assert len(codes[:, 0].unique()) == 3
    for same in (torch.ones(50, 4), torch.zeros(50, 4)):
        codebooks = fit_codebooks(same, config, seed=0)
        assert bool(codebooks.isfinite().all())
        assert len(encode_items(same, codebooks).unique(dim=0)) == 1


def test_items_without_codes_are_refused() -> None:
    config = SemanticConfig(levels=2, width=8)
    with pytest.raises(ValueError, match="items must be finite"):
        fit_codebooks(torch.full((5, 4), torch.inf), config, seed=0)
    with pytest.raises(ValueError, match="at least one embedding"):
        fit_codebooks(torch.zeros(0, 4), config, seed=0)
    with pytest.raises(ValueError, match="items must have shape"):
        fit_codebooks(torch.zeros(4), config, seed=0)
    with pytest.raises(ValueError, match="iterations must be at least 0"):
        fit_codebooks(torch.zeros(4, 4), config, seed=0, iterations=-1)
