import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.model import text_encoder
from silvershard.model.catalogue import Ragged
from silvershard.model.registry import build
from silvershard.model.text_config import TextTowerConfig
from silvershard.model.text_tower import TextTower

pytest.importorskip("transformers", reason="the extra `text` is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="the extra `text` is not installed")

WORDS = [
    "a",
    "the",
    "heist",
    "gone",
    "wrong",
    "two",
    "friends",
    "space",
    "crew",
    "lost",
    "far",
    "from",
    "home",
    "love",
    "song",
    "rain",
    "film",
    "genres",
    "tags",
    "crime",
    "drama",
    "query",
    ":",
    ".",
    ",",
]

TEXTS = [
    "a heist gone wrong",
    "two friends",
    "a space crew lost far from home , far from love",
    "rain",
    "the song : love , rain , home . a film . the crew . a heist gone wrong . lost in space " * 2,
    "nothing known here",
    "",
]


def tokenizer_json(words: list[str] = WORDS) -> bytes:
    vocabulary = {
        word: row for row, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])
    }
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # As published tokenizers often have it; neither must count.
    made.enable_padding(length=64)
    made.enable_truncation(4)
    return str(made.to_str()).encode()


BERT = {
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}


def make_tower(seed: int = 0, tokenizer: bytes | None = None, **settings: Any) -> TextTower:
    """A small encoder with random weights, as ``build`` and a snapshot make one."""
    tokenizer = tokenizer or tokenizer_json()
    config = {
        "encoder": BERT,
        "tokenizer_bytes": len(tokenizer),
        "item_text": ["{title}", "Genres: {genres}", "Tags: {tags}"],
        "max_tokens": 40,
        **settings,
    }
    tower = build("text_tower", config)
    assert isinstance(tower, TextTower)
    torch.manual_seed(seed)
    for parameter in tower.encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = tower.state_dict()
    state["tokenizer_json"] = torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)
    tower.load_state_dict(state)
    return tower


@pytest.fixture(scope="module")
def tower() -> TextTower:
    return make_tower()


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is as before after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def queries(*texts: str) -> list[dict[str, tuple[str, ...]]]:
    return [{"query": (text,)} for text in texts]


def films(*rows: tuple[str, list[str], list[str]]) -> dict[str, Ragged]:
    return {
        "title": Ragged.from_rows(
            [[title] if title else [] for title, _, _ in rows], dtype="string"
        ),
        "genres": Ragged.from_rows([genres for _, genres, _ in rows], dtype="string"),
        "tags": Ragged.from_rows([tags for _, _, tags in rows], dtype="string"),
    }


def alone(tower: TextTower) -> list[Tensor]:
    return [tower.encode(queries(text)).embedding[0] for text in TEXTS]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("dim", [None, 20])
def test_a_query_has_the_same_bits_alone_and_at_any_place_of_any_batch(
    threads: None, pooling: str, dim: int | None
) -> None:
    tower = make_tower(pooling=pooling, dim=dim)
    torch.set_num_threads(1)
    expected = alone(tower)
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        for batch in (1, 2, 7, 33):
            chosen = torch.randint(
                len(TEXTS), (batch,), generator=torch.Generator().manual_seed(batch)
            )
            got = tower.encode(queries(*(TEXTS[at] for at in chosen.tolist()))).embedding
            assert got.shape == (batch, 1, dim or 48)
            for row, at in enumerate(chosen.tolist()):
                assert torch.equal(got[row], expected[at]), (count, batch, row)


def test_an_embedding_is_that_of_the_encoder_pooled_and_scaled(tower: TextTower) -> None:
    text = "a heist gone wrong"
    ids = torch.tensor([[2, *(WORDS.index(word) + 4 for word in text.split()), 3]])
    with torch.no_grad():
        states = tower.encoder(input_ids=ids).last_hidden_state[0]
    for pooling, pooled in (("mean", states.mean(0)), ("cls", states[0])):
        other = make_tower(pooling=pooling)
        got = other.encode(queries(text)).embedding[0, 0]
        torch.testing.assert_close(got, torch.nn.functional.normalize(pooled, dim=0))
        raw = make_tower(pooling=pooling, normalize=False).encode(queries(text)).embedding[0, 0]
        torch.testing.assert_close(raw, pooled)


def test_a_projection_maps_the_pooled_states(tower: TextTower) -> None:
    projected = make_tower(dim=20)
    layer = projected.projection
    assert layer is not None
    with torch.no_grad():
        layer.bias.normal_()
    got = projected.encode(queries(*TEXTS[:3])).embedding[:, 0]
    pooled = make_tower(normalize=False).encode(queries(*TEXTS[:3])).embedding[:, 0]
    wanted = pooled @ layer.weight[:48, :20] + layer.bias
    torch.testing.assert_close(got, torch.nn.functional.normalize(wanted, dim=1))


def test_a_batch_may_be_empty(tower: TextTower) -> None:
    encoded = tower.encode([])
    assert encoded.embedding.shape == (0, 1, 48)
    assert encoded.user_state.shape == (0, 0)
    assert encoded.warnings == ()
    empty = {name: Ragged.from_rows([], dtype="string") for name in ("title", "genres", "tags")}
    assert tower.embed_items(empty).shape == (0, 48)


def test_what_is_missing_or_cut_is_said(tower: TextTower) -> None:
    encoded = tower.encode([{}, *queries("rain " * 38), *queries("rain " * 39), {"query": ()}])
    assert encoded.warnings == (
        ("query: no text was given",),
        (),
        ("query: only the first 40 tokens count",),
        ("query: no text was given",),
    )
    assert torch.equal(encoded.embedding[1], encoded.embedding[2])
    assert torch.equal(encoded.embedding[0], encoded.embedding[3])
    assert bool(encoded.embedding.isfinite().all())


def test_texts_of_one_request_are_joined(tower: TextTower) -> None:
    joined = tower.encode([{"query": ("a heist", "gone wrong")}]).embedding
    assert torch.equal(joined, tower.encode(queries("a heist gone wrong")).embedding)


def test_the_padding_and_the_cut_that_a_tokenizer_brings_do_not_count(tower: TextTower) -> None:
    assert len(tower.tokenizer.encode("rain").ids) == 3
    assert len(tower.tokenizer.encode("rain " * 20).ids) == 22


def test_a_text_without_any_token_is_zero() -> None:
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tower = make_tower(tokenizer=str(bare.to_str()).encode())
    got = tower.embed_texts(["", "a"])
    assert not got.embedding[0].any()
    assert got.embedding[1].any()
    assert got.truncated == [False, False]


def test_an_item_reads_as_its_template_says(tower: TextTower) -> None:
    rows = films(
        ("Heat", ["Crime", "Drama"], ["heist"]), ("Up", [], []), ("", [], ["lost"]), ("", [], [])
    )
    assert tower.item_texts(rows) == [
        "Heat. Genres: Crime, Drama. Tags: heist",
        "Up",
        "Tags: lost",
        "",
    ]
    other = make_tower(
        item_prefix="passage: ",
        item_text=("<{tags}>", "{title}"),
        part_separator=" | ",
        value_separator="/",
    )
    rows["year"] = Ragged.from_rows([[1995]] * 4, dtype="int")
    assert other.item_texts(rows)[0] == "passage: <heist> | Heat"
    assert make_tower(item_text=("in {year}",)).item_texts(rows)[0] == "in 1995"


def test_values_with_braces_are_taken_as_they_are(tower: TextTower) -> None:
    assert tower.item_texts(films(("{tags} \\1", [], ["x"]))) == ["{tags} \\1. Tags: x"]


def test_an_item_has_the_same_bits_in_bulk_and_embedded_later(threads: None) -> None:
    tower = make_tower()
    rows = [
        (f"{text} film", ["crime"] * (at % 3), ["song", "rain"][: at % 2])
        for at, text in enumerate(TEXTS * 20)
    ]
    torch.set_num_threads(2)
    bulk = tower.embed_items(films(*rows))
    torch.set_num_threads(1)
    assert torch.equal(tower.embed_items(films(*rows)), bulk)
    again = build("text_tower", tower.config.model_dump(mode="json"))
    again.load_state_dict(tower.state_dict())
    assert isinstance(again, TextTower)
    for at in (0, 4, 63, 64, 139):
        assert torch.equal(again.embed_items(films(rows[at]))[0], bulk[at])


def test_queries_and_items_have_prefixes_of_their_own() -> None:
    plain = make_tower()
    prefixed = make_tower(query_prefix="query : ", item_prefix="film : ")
    wanted = plain.encode(queries("query : rain", "film : rain")).embedding[:, 0]
    assert torch.equal(prefixed.encode(queries("rain")).embedding[0, 0], wanted[0])
    assert torch.equal(prefixed.embed_items(films(("rain", [], [])))[0], wanted[1])


def test_the_threads_of_the_process_stay_as_they_were(threads: None, tower: TextTower) -> None:
    torch.set_num_threads(3)
    tower.embed_texts(TEXTS)
    assert torch.get_num_threads() == 3
    seen: list[int] = []
    asking = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    asking.start()
    asking.join()
    assert seen == [3]


def test_texts_are_encoded_on_one_core_each(
    threads: None, tower: TextTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    states = TextTower._states

    def spying(self: TextTower, token_ids: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return states(self, token_ids)

    monkeypatch.setattr(TextTower, "_states", spying)
    torch.set_num_threads(2)
    tower.embed_texts(TEXTS)
    assert seen == [1] * len(TEXTS)


def test_a_tower_is_made_from_its_config_and_its_tensors_alone(tower: TextTower) -> None:
    config = json.loads(json.dumps(tower.config.model_dump(mode="json")))
    again = build("text_tower", config)
    again.load_state_dict({name: tensor.clone() for name, tensor in tower.state_dict().items()})
    assert isinstance(again, TextTower)
    assert again.config == tower.config
    for one, other in zip(alone(again), alone(tower), strict=True):
        assert torch.equal(one, other)


def test_a_tokenizer_that_is_loaded_later_replaces_the_first() -> None:
    tower = make_tower()
    before = tower.encode(queries("rain")).embedding
    swapped = list(WORDS)
    rain, song = swapped.index("rain"), swapped.index("song")
    swapped[rain], swapped[song] = "song", "rain"
    state = tower.state_dict()
    state["tokenizer_json"] = torch.frombuffer(
        bytearray(tokenizer_json(swapped)), dtype=torch.uint8
    )
    tower.load_state_dict(state)
    assert torch.equal(tower.encode(queries("song")).embedding, before)
    assert not torch.equal(tower.encode(queries("rain")).embedding, before)


@pytest.mark.parametrize(
    "encoder",
    [
        {
            "model_type": "t5",
            "vocab_size": 40,
            "d_model": 32,
            "d_ff": 48,
            "d_kv": 8,
            "num_layers": 1,
            "num_heads": 4,
        },
        {**BERT, "model_type": "roberta", "max_position_embeddings": 42, "pad_token_id": 1},
        {**BERT, "model_type": "mpnet", "max_position_embeddings": 42, "pad_token_id": 1},
        {"model_type": "distilbert", "vocab_size": 40, "dim": 32, "n_layers": 1, "n_heads": 4}
        | {"hidden_dim": 48, "max_position_embeddings": 40},
    ],
    ids=lambda encoder: encoder["model_type"],
)
def test_other_families_of_encoders_work_and_share_no_memory(encoder: dict[str, Any]) -> None:
    tower = make_tower(encoder=encoder)
    state = tower.state_dict()
    places = [tensor.data_ptr() for tensor in state.values() if tensor.numel()]
    assert len(set(places)) == len(places)
    assert not [name for name in state if "pooler" in name]
    again = build("text_tower", tower.config.model_dump(mode="json"))
    again.load_state_dict(state)
    assert isinstance(again, TextTower)
    expected = alone(tower)
    assert all(bool(row.isfinite().all()) for row in expected)
    got = again.encode(queries(*TEXTS)).embedding
    assert all(torch.equal(row, wanted) for row, wanted in zip(got, expected, strict=True))


def test_there_are_no_task_logits(tower: TextTower) -> None:
    slots = torch.tensor([[3, -1, 5], [0, 1, -1]])
    logits = tower.rank_slots(
        torch.zeros(2, 1, 48),
        torch.zeros(2, 0),
        torch.zeros(2, 4, 48).half(),
        slots,
        torch.zeros(2, 3, 1),
        torch.zeros(2, 3, 4),
    )
    assert logits.shape == (2, 3, 0)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({}, "encoder.model_type must be one that transformers .* knows, got None"),
        ({"model_type": "mine"}, "knows, got 'mine'"),
        ({"model_type": ["bert"]}, r"knows, got \['bert'\]"),
        (
            {"model_type": "bart", "d_model": 16, "vocab_size": 9},
            "encodes text alone, got .*'bart'",
        ),
        (
            {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1}
            | {"num_attention_heads": 2, "intermediate_size": 32},
            "encoder of model_type 'vit' cannot encode max_tokens=40 tokens of text",
        ),
        ({**BERT, "max_position_embeddings": 39}, "cannot encode max_tokens=40 tokens of text"),
        (
            {**BERT, "model_type": "roberta", "max_position_embeddings": 41, "pad_token_id": 1},
            "cannot encode max_tokens=40 tokens of text",
        ),
        ({**BERT, "hidden_size": 1040}, "at most 1024, the encoder has 1040: set dim"),
    ],
)
def test_an_encoder_that_cannot_serve_is_refused_when_it_is_built(
    encoder: dict[str, Any], message: str
) -> None:
    config = TextTowerConfig(encoder=encoder, tokenizer_bytes=9, max_tokens=40)
    with pytest.raises(ValueError, match=message):
        TextTower(config)


def test_a_missing_package_is_named_with_the_extra_that_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(text_encoder.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"needs the package transformers: .*silvershard\[text\]"):
        build("text_tower", {"encoder": BERT, "tokenizer_bytes": 9})


@pytest.mark.parametrize("content", [b"\x00\x01\x02", b"{}", b"[1, 2", b"\xff\xfe\xfd"])
def test_a_damaged_tokenizer_is_refused(content: bytes) -> None:
    tower = make_tower(tokenizer=content)
    with pytest.raises(ValueError, match=r"tokenizer_json must be a tokenizer\.json: "):
        tower.encode(queries("rain"))


def test_a_text_of_broken_unicode_is_refused(tower: TextTower) -> None:
    with pytest.raises(ValueError, match=r"a text must be valid Unicode, got 'rain\\ud83d'"):
        tower.embed_texts(["rain\ud83d"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tags": None}, "feature tags is part of item_text, given are genres, title"),
        ({"tags": Ragged.from_rows([["x"]] * 3)}, "feature tags must have 2 rows, got 3"),
    ],
)
def test_a_feature_that_does_not_fit_is_named(
    tower: TextTower, change: dict[str, Ragged | None], message: str
) -> None:
    rows = films(("Heat", ["Crime"], []), ("Up", [], []))
    given = {name: column for name, column in {**rows, **change}.items() if column is not None}
    with pytest.raises(ValueError, match=message):
        tower.embed_items(given)
