from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from silvershard.model.semantic_config import SemanticConfig
from silvershard.model.semantic_ids import SemanticDecoder, encode_items, item_scores


def make_decoder(
    levels: int = 3, width: int = 11, *, blocks: int = 2, sharpness: float = 5.0
) -> SemanticDecoder:
    torch.manual_seed(2)
    config = SemanticConfig(levels=levels, width=width, hidden=20, blocks=blocks)
    decoder = SemanticDecoder(config, 13)
    with torch.no_grad():
        decoder.level.normal_()
        decoder.state_mean.normal_()
        decoder.state_scale.uniform_(0.5, 2.0)
        for out in decoder.out:
            out.weight.mul_(sharpness)
            out.bias.normal_()
    return decoder.eval()


def make_rows(count: int, levels: int = 3, width: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    states = torch.randn(count, 13, generator=generator)
    return states, torch.randint(width, (count, levels), generator=generator)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_the_probabilities_of_all_codes_sum_to_one(length: int) -> None:
    decoder, (states, codes) = make_decoder(), make_rows(40)
    with torch.no_grad():
        context = decoder.context(states)
        got = decoder.log_probs(context, codes[:, :length])
        want = torch.log_softmax(decoder.logits(context, codes[:, :length]).double(), 1)
    assert got.shape == (40, 11)
    assert bool((got <= 0).all())
    assert torch.allclose(got.double(), want, atol=2e-6, rtol=1e-6)
    assert torch.allclose(got.double().exp().sum(1), torch.ones(40).double(), atol=1e-6)


def test_training_sees_the_numbers_that_serving_does() -> None:
    decoder, (states, codes) = make_decoder(), make_rows(40)
    with_gradient = decoder(states, codes)
    assert with_gradient.requires_grad
    with torch.no_grad():
        assert torch.allclose(decoder(states, codes), with_gradient, atol=1e-5, rtol=1e-5)


def test_a_code_that_is_nearly_certain_has_no_positive_logarithm() -> None:
    decoder, (states, codes) = make_decoder(sharpness=1e4), make_rows(500)
    with torch.no_grad():
        found = decoder.log_probs(decoder.context(states), codes[:, :1])
    assert bool((found <= 0).all())
    assert int((found == 0).sum()) > 100
    assert bool(found.isfinite().all())


def test_a_position_reads_the_user_and_every_code_before_it_and_none_after() -> None:
    decoder, (states, codes) = make_decoder(), make_rows(40)
    with torch.no_grad():
        before = decoder(states, codes)
        for level in range(3):
            changed = codes.clone()
            changed[:, level] = (codes[:, level] + 1) % 11
            after = decoder(states, changed)
            assert torch.equal(after[:, :level], before[:, :level])
            assert not torch.isclose(after[:, level:], before[:, level:]).all(0).any()
        after = decoder(states + 1.0, codes)
    assert not torch.isclose(after, before).all(0).any()


def test_the_score_of_an_item_is_the_sum_from_the_first_code_on() -> None:
    decoder, (states, codes) = make_decoder(4, 5), make_rows(300, 4, 5)
    with torch.no_grad():
        terms = decoder(states, codes)
        scores = item_scores(decoder, states, codes)
    expected = ((terms[:, 0] + terms[:, 1]) + terms[:, 2]) + terms[:, 3]
    assert torch.equal(scores, expected)
    assert not torch.equal(scores, terms[:, 0] + (terms[:, 1] + (terms[:, 2] + terms[:, 3])))
    prefix = terms[:, 0]
    for level in range(1, 4):
        assert bool((prefix + terms[:, level] <= prefix).all())
        prefix = prefix + terms[:, level]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("width", "levels"), [(11, 3), (64, 2), (257, 3)])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(
    num_threads: int, width: int, levels: int
) -> None:
    decoder, (states, codes) = make_decoder(levels, width), make_rows(66, levels, width)
    with threads(num_threads), torch.no_grad():
        together = decoder(states, codes)
        for size in (1, 2, 7, 33):
            for rows in torch.randperm(66)[: 66 // size * size].view(-1, size):
                assert torch.equal(decoder(states[rows], codes[rows]), together[rows])
    with threads(3 - num_threads), torch.no_grad():
        assert torch.equal(decoder(states, codes), together)


def test_states_of_any_size_give_numbers() -> None:
    decoder, (states, codes) = make_decoder(), make_rows(4)
    with torch.no_grad():
        for scale in (0.0, 1e-38, 1e19, 1e37):
            assert bool(decoder(states * scale, codes).isfinite().all())
        assert bool(decoder(states.sign() * 3e38, codes).isfinite().all())


@pytest.mark.parametrize(
    ("states", "codes", "message"),
    [
        (torch.full((2, 13), torch.nan), torch.zeros(2, 3).long(), "user_state must be finite"),
        (torch.full((2, 13), torch.inf), torch.zeros(2, 3).long(), "user_state must be finite"),
        (torch.zeros(2, 12), torch.zeros(2, 3).long(), "user_state must have shape"),
        (torch.zeros(2, 13), torch.zeros(2, 2).long(), "codes must have shape"),
        (torch.zeros(2, 13), torch.zeros(3, 3).long(), "codes must have shape"),
        (torch.zeros(2, 13), torch.full((2, 3), 11), r"codes must be in \[0, 11\), got 11"),
        (torch.zeros(2, 13), torch.full((2, 3), -1), r"codes must be in \[0, 11\), got -1"),
        (torch.zeros(2, 13), torch.zeros(2, 3), "codes must be torch.int64"),
    ],
)
def test_rows_that_do_not_fit_are_refused(states: Tensor, codes: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_decoder()(states, codes)


def test_a_decoder_without_a_user_state_is_refused() -> None:
    with pytest.raises(ValueError, match="state_dim must be at least 1, got 0"):
        SemanticDecoder(SemanticConfig(), 0)


def test_codes_are_the_nearest_to_what_is_left_level_by_level() -> None:
    codebooks = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.25, 0.0], [0.0, -0.5]]])
    items = torch.tensor([[1.3, 0.1], [0.1, 0.4], [0.9, -0.4], [0.6, 0.5]])
    assert encode_items(items, codebooks).tolist() == [[0, 0], [1, 1], [0, 1], [0, 0]]
    assert encode_items(items, codebooks).dtype == torch.int16


def test_encoding_agrees_with_distances_in_double() -> None:
    torch.manual_seed(0)
    items, codebooks = torch.randn(500, 9), torch.randn(3, 21, 9)
    got = encode_items(items, codebooks).long()
    rest = items.double()
    for level in range(3):
        distances = torch.cdist(rest, codebooks[level].double())
        assert torch.equal(got[:, level], distances.argmin(1))
        rest = rest - codebooks[level].double()[got[:, level]]


def test_a_code_depends_on_its_item_only_and_ties_go_to_the_smaller() -> None:
    torch.manual_seed(0)
    items, codebooks = torch.randn(100, 9), torch.randn(3, 21, 9)
    codebooks[:, 10:20] = codebooks[:, :10]
    together = encode_items(items, codebooks)
    assert not bool(((together >= 10) & (together < 20)).any())
    for size in (1, 2, 7, 33):
        for rows in torch.randperm(100)[: 100 // size * size].view(-1, size):
            assert torch.equal(encode_items(items[rows], codebooks), together[rows])
    assert encode_items(items[:0], codebooks).shape == (0, 3)


def test_embeddings_that_do_not_fit_the_codebooks_are_refused() -> None:
    with pytest.raises(ValueError, match="items must have shape"):
        encode_items(torch.zeros(4, 8), torch.zeros(3, 5, 9))
    with pytest.raises(ValueError, match="items must be finite"):
        encode_items(torch.full((4, 9), torch.nan), torch.zeros(3, 5, 9))
    with pytest.raises(ValueError, match="at most 4096 codes, got 4097"):
        encode_items(torch.zeros(4, 1), torch.zeros(1, 4097, 1))
