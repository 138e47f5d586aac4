from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from silvershard.model import encoders
from silvershard.model.dense import PaddedLinear
from silvershard.model.encoder_config import (
    AttentionEncoderConfig,
    HSTUEncoderConfig,
    MeanEncoderConfig,
)
from silvershard.model.encoders import LayeredEncoder, SequenceEncoder, build_encoder

Config = MeanEncoderConfig | AttentionEncoderConfig | HSTUEncoderConfig

CONFIGS: dict[str, Config] = {
    "mean": MeanEncoderConfig(max_length=37),
    "attention": AttentionEncoderConfig(max_length=37, feed_forward=2),
    "attention by distance": AttentionEncoderConfig(
        max_length=37, layers=1, heads=4, absolute_positions=False, relative_bias=True
    ),
    "hstu": HSTUEncoderConfig(max_length=37),
    "hstu of items only": HSTUEncoderConfig(
        max_length=37, layers=3, heads=1, absolute_positions=False, relative_bias=False
    ),
}
LAYERED = [name for name in CONFIGS if name != "mean"]


def made(config: Config, dim: int) -> SequenceEncoder:
    """An encoder in evaluation mode, random in every parameter."""
    torch.manual_seed(dim)
    encoder = build_encoder(config, dim).requires_grad_(requires_grad=False)
    for name, parameter in encoder.named_parameters():
        if name.endswith(("scale", "shift", "bias", "positions")):
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return encoder.eval()


def sessions(count: int, length: int, dim: int) -> tuple[Tensor, Tensor]:
    """Sessions of every length from 0 to ``length``, with rubbish in the padding."""
    generator = torch.Generator().manual_seed(100 * count + length)
    x = torch.randn(count, length, dim, generator=generator)
    lengths = torch.randint(0, length + 1, (count,), generator=generator)
    lengths[-1] = length
    x[torch.arange(length) >= lengths[:, None]] = torch.nan
    return x, lengths


@pytest.fixture(params=CONFIGS)
def encoder(request: pytest.FixtureRequest) -> SequenceEncoder:
    return made(CONFIGS[request.param], 24)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dim", [16, 24, 64])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_session_has_the_same_bits_alone_and_in_any_batch(
    threads: int, name: str, dim: int
) -> None:
    encoder = made(CONFIGS[name], dim)
    x, lengths = sessions(33, 37, dim)
    together, last = encoder(x, lengths), encoder.forward_last(x, lengths)
    for size in (1, 2, 7):
        for start in range(0, 33, size):
            part = slice(start, start + size)
            assert torch.equal(encoder(x[part], lengths[part]), together[part]), (start, size)
            assert torch.equal(encoder.forward_last(x[part], lengths[part]), last[part])
    order = torch.randperm(33, generator=torch.Generator().manual_seed(1))
    assert torch.equal(encoder(x[order], lengths[order]), together[order])
    assert torch.equal(encoder.forward_last(x[order], lengths[order]), last[order])


def test_the_thread_count_does_not_change_a_bit(encoder: SequenceEncoder) -> None:
    x, lengths = sessions(150, 37, 24)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(encoder(x, lengths))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])


def test_a_session_has_the_same_bits_however_far_it_is_padded(encoder: SequenceEncoder) -> None:
    x, lengths = sessions(9, 5, 24)
    expected = encoder(x, lengths)
    last = encoder.forward_last(x, lengths)
    for length in (6, 15, 16, 17, 32, 37):
        wider = torch.full((9, length, 24), torch.inf)
        wider[:, :5] = x
        assert torch.equal(encoder(wider, lengths)[:, :5], expected), length
        assert torch.equal(encoder.forward_last(wider, lengths), last), length


@pytest.mark.parametrize("config", [AttentionEncoderConfig, HSTUEncoderConfig])
def test_long_sessions_have_the_same_bits_padded_and_in_any_batch(
    threads: int, config: Callable[..., Config]
) -> None:
    encoder = made(config(max_length=400, layers=1), 32)
    x, _ = sessions(5, 400, 32)
    x = x.nan_to_num(1.0)
    lengths = torch.tensor([400, 230, 300, 0, 17])
    together = encoder(x, lengths)
    for at, count in enumerate(lengths.tolist()):
        alone = encoder(x[at : at + 1, :count], lengths[at : at + 1])
        assert torch.equal(alone[0], together[at, :count]), count
    assert torch.equal(encoder.forward_last(x, lengths), encoder.last(together, lengths))


def test_many_short_sessions_have_the_same_bits_alone(encoder: SequenceEncoder) -> None:
    x, lengths = sessions(150, 3, 24)
    together = encoder(x, lengths)
    for at, count in enumerate(lengths.tolist()):
        part = slice(at, at + 1)
        assert torch.equal(encoder(x[part], lengths[part]), together[part])
        last = encoder.forward_last(x[part, :count], lengths[part])
        assert torch.equal(last[0], together[at, max(count, 1) - 1])


def test_the_last_state_has_the_bits_that_it_has_among_all(encoder: SequenceEncoder) -> None:
    for count, length in ((1, 1), (1, 37), (3, 16), (20, 33)):
        x, lengths = sessions(count, length, 24)
        states = encoder(x, lengths)
        found = encoder.forward_last(x, lengths)
        assert torch.equal(found, encoder.last(states, lengths))
        for row, number in enumerate(lengths.tolist()):
            expected = states[row, number - 1] if number else torch.zeros(24)
            assert torch.equal(found[row], expected)


def test_batches_beyond_one_chunk_have_the_same_bits(
    encoder: SequenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, lengths = sessions(20, 30, 24)
    whole, last = encoder(x, lengths), encoder.forward_last(x, lengths)
    for chunk in (1, 6000):
        monkeypatch.setattr(encoders, "_CHUNK_SCORES", chunk)
        assert torch.equal(encoder(x, lengths), whole)
        assert torch.equal(encoder.forward_last(x, lengths), last)


def test_a_state_depends_on_no_later_item(encoder: SequenceEncoder) -> None:
    x, lengths = sessions(1, 37, 24)
    before = encoder(x, lengths)
    for changed in (0, 1, 15, 16, 36):
        other = x.clone()
        other[0, changed, ::3] += 1.0
        after = encoder(other, lengths)
        assert torch.equal(after[:, :changed], before[:, :changed])
        differs = (after[0] != before[0]).any(1)
        assert differs[changed:].all(), changed


def test_a_state_is_that_of_the_session_up_to_it(encoder: SequenceEncoder) -> None:
    x, lengths = sessions(1, 20, 24)
    states = encoder(x, lengths)[0]
    for count in range(1, 21):
        part = encoder.forward_last(x[:, :count], torch.tensor([count]))
        assert torch.equal(part[0], states[count - 1])


@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf, -torch.inf, 1e38])
def test_what_lies_in_the_padding_changes_nothing(encoder: SequenceEncoder, rubbish: float) -> None:
    x, lengths = sessions(6, 12, 24)
    padding = torch.arange(12) >= lengths[:, None]
    clean = x.masked_fill(padding[..., None], 0.0)
    dirty = x.masked_fill(padding[..., None], rubbish)
    states = encoder(dirty, lengths)
    assert torch.equal(states, encoder(clean, lengths))
    assert torch.equal(states[padding], torch.zeros(int(padding.sum()), 24))
    last = encoder.forward_last(dirty, lengths)
    assert torch.equal(last, encoder.forward_last(clean, lengths))


def test_the_order_of_items_matters_to_layers_and_not_to_the_mean() -> None:
    x, lengths = sessions(1, 10, 24)
    swapped = x[:, [1, 0, *range(2, 10)]]
    for name, config in CONFIGS.items():
        encoder = made(config, 24)
        same = torch.allclose(encoder(x, lengths)[0, -1], encoder(swapped, lengths)[0, -1], 1e-4)
        assert same == (name == "mean"), name


def test_empty_sessions_and_batches_give_zeros_or_nothing(encoder: SequenceEncoder) -> None:
    x, lengths = torch.randn(3, 4, 24), torch.tensor([0, 4, 0])
    assert not encoder(x, lengths)[[0, 2]].any()
    assert not encoder.forward_last(x, lengths)[[0, 2]].any()
    assert encoder.forward_last(x, lengths)[1].all()
    for count, length in ((0, 5), (3, 0), (0, 0)):
        x, lengths = torch.zeros(count, length, 24), torch.zeros(count, dtype=torch.int64)
        states = encoder(x, lengths)
        assert states.shape == (count, length, 24)
        for last in (encoder.forward_last(x, lengths), encoder.last(states, lengths)):
            assert torch.equal(last, torch.zeros(count, 24))


def test_states_are_finite_for_items_of_any_size(encoder: SequenceEncoder) -> None:
    x, lengths = sessions(4, 37, 24)
    for scale in (0.0, 1e-30, 1e4, 1e12):
        assert encoder(x * scale, lengths).isfinite().all(), scale


def test_a_bias_that_hides_most_items_leaves_finite_states() -> None:
    encoder = made(CONFIGS["attention by distance"], 24)
    assert isinstance(encoder, LayeredEncoder)
    bias = encoder.get_parameter("layers.0.attention.bias")
    bias[:] = -1e30
    bias[:, 3] = 0.0
    x, lengths = sessions(2, 37, 24)
    states = encoder(x, lengths)
    assert states.isfinite().all()
    # Only the item three places before counts, beside the item itself.
    other = x.clone()
    other[1, 20, ::3] += 1.0
    differs = (encoder(other, lengths)[1] != states[1]).any(1)
    assert differs.nonzero().flatten().tolist() == [20, 23]


@pytest.mark.parametrize("name", CONFIGS)
def test_training_without_dropout_agrees_with_evaluation(name: str) -> None:
    config = CONFIGS[name]
    if not isinstance(config, MeanEncoderConfig):
        config = config.model_copy(update={"dropout": 0.0})
    encoder = made(config, 24)
    x, lengths = sessions(5, 37, 24)
    evaluated, last = encoder(x, lengths), encoder.forward_last(x, lengths)
    encoder.train()
    assert torch.allclose(encoder(x, lengths), evaluated, rtol=1e-5, atol=1e-5)
    assert torch.allclose(encoder.forward_last(x, lengths), last, rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    for name in LAYERED:
        encoder = made(CONFIGS[name], 24)
        x, lengths = sessions(3, 9, 24)
        assert torch.equal(encoder(x, lengths), encoder(x, lengths))
        encoder.train()
        assert not torch.equal(encoder(x, lengths), encoder(x, lengths))


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_reach_every_parameter_and_every_item(name: str) -> None:
    encoder = made(CONFIGS[name], 24).train().requires_grad_()
    x, lengths = sessions(6, 37, 24)
    x.requires_grad_()
    torch.manual_seed(0)
    (encoder(x, lengths) * torch.randn(6, 37, 24)).sum().backward()
    assert x.grad is not None
    real = torch.arange(37) < lengths[:, None]
    assert x.grad.isfinite().all()
    assert x.grad[real].any(1).all()
    assert not x.grad[~real].any()
    for parameter_name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


def test_gradients_are_those_of_finite_differences() -> None:
    for name in LAYERED:
        encoder = made(CONFIGS[name].model_copy(update={"dropout": 0.0}), 16).train().double()
        x = torch.randn(1, 4, 16, dtype=torch.float64)

        def states(given: Tensor, encoder: SequenceEncoder = encoder) -> Tensor:
            return encoder._encode(given, None)

        assert torch.autograd.gradcheck(states, (x.requires_grad_(),)), name


@pytest.mark.parametrize("name", LAYERED)
def test_an_encoder_learns_to_find_what_it_saw_before(name: str) -> None:
    torch.manual_seed(3)
    encoder = build_encoder(CONFIGS[name].model_copy(update={"dropout": 0.0}), 16).train()
    table = torch.randn(6, 16)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        items = torch.randint(6, (32, 12))
        target = items.roll(1, 1)[:, 1:]
        states = encoder(table[items], torch.full((32,), 12))[:, 1:]
        loss = nn.functional.cross_entropy((states @ table.T).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if name != "hstu of items only":
        assert losses[-1] < 0.6 * losses[0]
    for layer in encoder.modules():
        if isinstance(layer, PaddedLinear):
            assert not layer.weight[layer.in_features :].any()
            assert not layer.weight[:, layer.out_features :].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_an_exported_encoder_serves_batches_of_any_size(name: str) -> None:
    encoder = made(CONFIGS[name], 32)
    x, lengths = sessions(3, 20, 32)
    batch = torch.export.Dim("batch", min=2, max=1024)
    program = torch.export.export(
        encoder, (x, lengths), dynamic_shapes={"x": {0: batch}, "lengths": {0: batch}}
    )
    for count in (3, 8, 40):
        x, lengths = sessions(count, 20, 32)
        assert torch.equal(program.module()(x, lengths), encoder(x, lengths))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("attention", "aot_eager"),
        # Inductor loads what torch itself calls deprecated.
        pytest.param(
            "hstu", "inductor", marks=pytest.mark.filterwarnings("ignore::DeprecationWarning")
        ),
    ],
)
def test_a_compiled_encoder_agrees(name: str, backend: str) -> None:
    encoder = made(CONFIGS[name], 32)
    torch.compiler.reset()
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True, backend=backend)
    for count in (3, 8):
        x, lengths = sessions(count, 20, 32)
        assert torch.allclose(compiled(x, lengths), encoder(x, lengths), rtol=1e-5, atol=1e-5)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="heads must divide dim=64, got 3"):
        build_encoder(HSTUEncoderConfig(heads=3), 64)
    with pytest.raises(ValueError, match="heads must divide dim=2, got 4"):
        build_encoder(AttentionEncoderConfig(heads=4), 2)
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        build_encoder(MeanEncoderConfig(), 0)


def test_sessions_of_another_shape_are_refused(encoder: SequenceEncoder) -> None:
    x, lengths = torch.zeros(2, 5, 24), torch.tensor([5, 0])
    for bad, number, message in (
        (torch.zeros(2, 5, 23), lengths, r"x must have shape \(B, L, 24\), got \(2, 5, 23\)"),
        (torch.zeros(2, 38, 24), lengths, "x must have L at most max_length=37, got 38"),
        (x.double(), lengths, "x must be torch.float32, got torch.float64"),
        (x, lengths[:1], r"lengths must have shape \(2\), got \(1,\)"),
        (x, lengths.int(), "lengths must be torch.int64, got torch.int32"),
        (x, torch.tensor([5, 6]), r"lengths must be in \[0, 6\), got 6"),
        (x, torch.tensor([-1, 5]), r"lengths must be in \[0, 6\), got -1"),
    ):
        for call in (encoder.forward, encoder.forward_last):
            with pytest.raises(ValueError, match=message):
                call(bad, number)
    with pytest.raises(ValueError, match=r"lengths must be in \[0, 6\), got 6"):
        encoder.last(x, torch.tensor([6, 0]))
