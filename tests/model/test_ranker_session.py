import pytest
import torch

from silvershard.model.ranker_session import (
    pack_session,
    real_rows,
    session_width,
    unpack_session,
)


def test_a_session_comes_back_as_it_was_packed() -> None:
    embeddings = torch.randn(3, 5, 4)
    lengths = torch.tensor([0, 2, 5])
    packed = pack_session(embeddings, lengths)
    assert packed.shape == (3, session_width(5, 4))
    assert packed[:, -1].tolist() == [0.0, 2.0, 5.0]
    back, counts = unpack_session(packed, 4)
    assert counts.tolist() == [0, 2, 5]
    assert counts.dtype == torch.int64
    for request, length in enumerate(lengths.tolist()):
        assert torch.equal(back[request, :length], embeddings[request, :length])
        assert not back[request, length:].any()


def test_what_lies_beyond_a_length_is_not_packed() -> None:
    embeddings = torch.randn(2, 3, 4)
    spoilt = embeddings.clone()
    spoilt[0, 1:] = torch.nan
    spoilt[1, 2] = torch.inf
    lengths = torch.tensor([1, 2])
    assert torch.equal(pack_session(spoilt, lengths), pack_session(embeddings, lengths))


def test_a_batch_without_requests_packs_to_no_rows() -> None:
    packed = pack_session(torch.zeros(0, 3, 4), torch.zeros(0, dtype=torch.int64))
    assert packed.shape == (0, 13)
    assert unpack_session(packed, 4)[0].shape == (0, 3, 4)


def test_without_session_rows_a_session_has_no_width() -> None:
    assert session_width(0, 64) == 0
    assert session_width(1, 1) == 2
    assert unpack_session(torch.tensor([[3.0, 1.0]]), 1)[0].tolist() == [[[3.0]]]


def test_real_rows_are_the_first_ones() -> None:
    assert real_rows(torch.tensor([0, 2]), 3).tolist() == [[False] * 3, [True, True, False]]


def test_gradients_reach_the_real_embeddings_only() -> None:
    embeddings = torch.randn(1, 3, 2, requires_grad=True)
    pack_session(embeddings, torch.tensor([2])).sum().backward()
    assert embeddings.grad is not None
    assert embeddings.grad[0].sum(1).tolist() == [2.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("embeddings", "lengths"), [((2, 3), (2,)), ((2, 3, 4), (3,)), ((2, 3, 4), (2, 1))]
)
def test_sessions_of_other_shapes_are_refused(
    embeddings: tuple[int, ...], lengths: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"embeddings must be \(B, L, D\) with lengths \(B,\)"):
        pack_session(torch.zeros(embeddings), torch.zeros(lengths, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(2, 12), (13,), (2, 14)])
def test_packed_sessions_of_other_widths_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"packed must be \(B, L \* 4 \+ 1\)"):
        unpack_session(torch.zeros(shape), 4)
