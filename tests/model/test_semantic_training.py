from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from silvershard.kernels import pack_bits
from silvershard.model.semantic_ids import SemanticConfig, encode_items
from silvershard.model.semantic_search import CodeTrie, generate
from silvershard.model.semantic_training import (
    SemanticTrainingConfig,
    fit_codebooks,
    train_decoder,
)

TINY = SemanticTrainingConfig(steps=12, batch=16)


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


def examples(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(5, (count, 3), generator=generator)
    states = torch.randn(count, 9, generator=generator)
    states[:, 0] += codes[:, 0]
    return states, codes


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


def test_a_trained_decoder_beats_popularity_on_users_who_keep_to_a_subtree() -> None:
    """Users of ten groups take four of five items below a first code of their own."""
    generator = torch.Generator().manual_seed(7)
    items = make_items(1500)
    config = SemanticConfig(levels=3, width=10, hidden=32)
    codes = encode_items(items, fit_codebooks(items, config, seed=0))
    by_first = [torch.nonzero(codes[:, 0] == first)[:, 0] for first in range(10)]
    tastes = torch.randn(10, 8, generator=generator)
    # The first items of each subtree are taken more often than the last.
    popularity = torch.arange(1, 1501).double() ** -0.5

    def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
        group = torch.randint(10, (count,), generator=generator)
        states = tastes[group] + 0.3 * torch.randn(count, 8, generator=generator)
        chosen = torch.multinomial(popularity, count, replacement=True, generator=generator)
        for first, members in enumerate(by_first):
            mine = torch.nonzero(group == first)[:, 0]
            mine = mine[torch.rand(len(mine), generator=generator) < 0.8]
            odds = torch.arange(1, len(members) + 1).double() ** -0.5
            at = torch.multinomial(odds, len(mine), replacement=True, generator=generator)
            chosen[mine] = members[at]
        return group, states, chosen

    _, states, chosen = draw(8000)
    training = SemanticTrainingConfig(steps=250, batch=256)
    trained = train_decoder(config, states, codes[chosen].long(), training, progress=False)
    assert trained.losses[-1] < 0.8 * trained.losses[0]

    _, states, wanted = draw(800)
    most_popular = torch.bincount(chosen, minlength=1500).argsort(descending=True)[:20]
    baseline = float((wanted[:, None] == most_popular).any(1).double().mean())
    slots = torch.full((24 * 64,), -1)
    slots[:1500] = torch.arange(1500)
    slot_codes = torch.zeros(24 * 64, 3, dtype=torch.int16)
    slot_codes[:1500] = codes
    trie = CodeTrie(slot_codes.view(24, 64, 3), slots.view(24, 64), config.width)
    everything = pack_bits(torch.ones(800, 24, 64, dtype=torch.bool))
    found = generate(trained.decoder, states, trie, everything, 20)
    assert bool(found.exact.all())
    recall = float((found.item_ids == wanted[:, None]).any(1).double().mean())
    assert recall > 1.3 * baseline
    strangers = torch.roll(states, 1, 0)
    found = generate(trained.decoder, strangers, trie, everything, 20)
    assert float((found.item_ids == wanted[:, None]).any(1).double().mean()) < 0.7 * recall


def test_training_depends_on_the_seed_only() -> None:
    states, codes = examples(200)
    config = SemanticConfig(levels=3, width=5, hidden=8)
    torch.manual_seed(11)
    first = train_decoder(config, states, codes, TINY, seed=3, progress=False)
    torch.manual_seed(12)
    drawn = torch.rand(1)
    torch.manual_seed(12)
    again = train_decoder(config, states, codes, TINY, seed=3, progress=False)
    assert torch.equal(torch.rand(1), drawn)
    other = train_decoder(config, states, codes, TINY, seed=4, progress=False)
    state, repeated = first.decoder.state_dict(), again.decoder.state_dict()
    assert all(torch.equal(value, repeated[name]) for name, value in state.items())
    assert first.losses == again.losses
    assert first.losses != other.losses
    assert not torch.equal(state["codes"], other.decoder.state_dict()["codes"])


def test_a_trained_decoder_is_ready_to_serve() -> None:
    states, codes = examples(200)
    states[:, 4] = 7.0
    before = torch.get_num_threads()
    config = SemanticConfig(levels=3, width=5, hidden=8)
    trained = train_decoder(config, states, codes, TINY, progress=False)
    decoder = trained.decoder
    assert torch.get_num_threads() == before
    assert not decoder.training
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    assert len(trained.losses) == 10
    assert trained.seconds > 0
    assert torch.allclose(decoder.state_mean, states.mean(0), atol=1e-5)
    # A column that never changes says nothing about a user, whatever it is later.
    assert decoder.state_scale[4] == 0
    scaled = (states - decoder.state_mean) * decoder.state_scale
    assert torch.allclose(scaled[:, :4].std(0, correction=0), torch.ones(4), atol=1e-4)
    for name, weight in decoder.state_dict().items():
        if name.endswith("user.weight"):
            assert not weight[9:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_states": torch.zeros(0, 9), "codes": torch.zeros(0, 3).long()}, "at least one"),
        ({"user_states": torch.full((20, 9), torch.nan)}, "user_states must be finite"),
        ({"codes": torch.full((20, 3), 5)}, r"codes must be in \[0, 5\), got 5"),
        ({"codes": torch.zeros(20, 2).long()}, "codes must have shape"),
        ({"codes": torch.zeros(20, 3)}, "codes must be torch.int64"),
    ],
)
def test_examples_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    states, codes = examples(20)
    config = SemanticConfig(levels=3, width=5, hidden=8)
    given = {"user_states": states, "codes": codes, **change}
    with pytest.raises(ValueError, match=message):
        train_decoder(config, training=TINY, progress=False, **given)


def test_settings_out_of_range_are_refused() -> None:
    for field, value in (("steps", 0), ("batch", 0), ("learning_rate", 0), ("dropout", 1.0)):
        with pytest.raises(ValidationError, match=field):
            SemanticTrainingConfig(**{field: value})
