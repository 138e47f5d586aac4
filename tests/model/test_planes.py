import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from silvershard.kernels import PAD_TERM, bloom_build, bloom_positions, unpack_bits
from silvershard.model import planes
from silvershard.model.catalogue import NULL_INT, Catalogue, Ragged
from silvershard.model.dtypes import INT64_MAX, INT64_MIN
from silvershard.model.planes import (
    ATTRIBUTE_SHIFT,
    MAX_CATEGORIES,
    PlaneDictionary,
    choose_planes,
    encode_items,
    float_key,
    float_keys,
    shortfall,
)
from silvershard.model.schema import Attribute, Schema, SchemaError

SCHEMA = Schema(
    attributes=(
        Attribute(name="genre", kind="category", dtype="string"),
        Attribute(name="year", kind="number", dtype="int"),
        Attribute(name="code", kind="category", dtype="int"),
        Attribute(name="rating", kind="number", dtype="float"),
    )
)


def catalogue_of(
    genres: list[list[str]],
    codes: list[list[int]] | None = None,
    years: list[int] | None = None,
    ratings: list[float] | None = None,
) -> Catalogue:
    count = len(genres)
    return Catalogue(
        item_ids=np.arange(count, dtype=np.int64) + 100,
        categories={
            "genre": Ragged.from_rows(genres, dtype="string"),
            "code": Ragged.from_rows(codes or [[]] * count, dtype="int"),
        },
        numbers={
            "year": np.array(years or [NULL_INT] * count, dtype=np.int64),
            "rating": np.array(ratings or [np.nan] * count, dtype=np.float64),
        },
        signals=np.zeros((count, 0), np.float32),
        fields={},
        features={},
    )


def zipf_catalogue(count: int, seed: int = 0) -> Catalogue:
    random = np.random.default_rng(seed)
    genres = [
        [f"g{value}" for value in random.zipf(1.3, size=random.integers(0, 6)) % 997]
        for _ in range(count)
    ]
    return catalogue_of(genres, random.integers(0, 5, size=(count, 1)).tolist())


def rare_terms(catalogue: Catalogue, dictionary: PlaneDictionary) -> np.ndarray[Any, Any]:
    return (encode_items(dictionary, SCHEMA, catalogue).terms != PAD_TERM).sum(1).numpy()


def test_frequent_values_get_exact_planes_and_the_rest_share_bloom_planes() -> None:
    genres = [["often"]] * 8 + [["often", "twice"], ["twice", "once"]]
    dictionary = choose_planes(
        SCHEMA, catalogue_of(genres, [[7]] * 10), min_exact_share=0.2, num_hashes=3
    )
    assert dictionary.exact_planes == {"code": {"7": 1}, "genre": {"often": 2, "twice": 3}}
    assert dictionary.first_bloom_plane == 4
    assert dictionary.num_bloom_planes > 0
    assert dictionary.terms_width == 4
    assert dictionary.columns == {"year": 0, "rating": 1}
    assert dictionary.exact_plane("genre", "often") == 2
    assert dictionary.exact_plane("code", 7) == 1
    assert dictionary.exact_plane("genre", "once") is None


def test_at_most_the_asked_number_of_values_get_exact_planes_most_frequent_first() -> None:
    genres = [["a", "b"], ["a", "b"], ["a"], ["c"]]
    dictionary = choose_planes(
        SCHEMA, catalogue_of(genres), max_exact_planes=1, target_false_positive_rate=0.1
    )
    assert dictionary.exact_planes["genre"] == {"a": 1}


def exact_only(catalogue: Catalogue, **changes: Any) -> PlaneDictionary:
    """A dictionary as earlier releases made it of a catalogue without rare values."""
    chosen = choose_planes(SCHEMA, catalogue, min_exact_share=0)
    return chosen.model_copy(update={"num_bloom_planes": 0, "terms_width": 0, **changes})


def test_without_rare_values_there_is_room_for_some_that_come_later() -> None:
    dictionary = choose_planes(SCHEMA, catalogue_of([["a"], ["b"], []]), min_exact_share=0)
    assert (dictionary.num_exact_planes, dictionary.terms_width) == (2, 4)
    # No item errs today; one with a rare value would meet the target.
    assert dictionary.report().false_positive_rate == 0
    wanted = choose_planes(SCHEMA, catalogue_of([["c"]]), max_exact_planes=0)
    assert dictionary.num_bloom_planes == wanted.num_bloom_planes == 19
    terms = encode_items(dictionary, SCHEMA, catalogue_of([["new", "newer"]], [[5]])).terms
    assert (terms != PAD_TERM).sum() == 3


def test_an_empty_catalogue_has_a_dictionary() -> None:
    dictionary = choose_planes(SCHEMA, catalogue_of([]))
    assert dictionary.num_exact_planes == 0
    assert (dictionary.num_bloom_planes, dictionary.terms_width) == (19, 4)
    assert dictionary.false_positive_rate == 0
    assert encode_items(dictionary, SCHEMA, catalogue_of([])).columns.shape == (0, 2)


def test_the_choice_depends_on_the_items_and_not_on_their_order() -> None:
    catalogue = zipf_catalogue(500)
    dictionary = choose_planes(SCHEMA, catalogue, min_exact_share=0.01, seed=3)
    assert 0 < dictionary.num_exact_planes < 256
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(500)
        assert dictionary == choose_planes(
            SCHEMA, catalogue.take(order), min_exact_share=0.01, seed=3
        )


def test_a_dictionary_survives_the_way_through_json() -> None:
    dictionary = choose_planes(SCHEMA, zipf_catalogue(300), seed=INT64_MAX)
    text = json.dumps(dictionary.model_dump(mode="json"))
    assert PlaneDictionary.model_validate(json.loads(text)) == dictionary


@pytest.mark.parametrize("target", [0.2, 0.01, 0.001])
@pytest.mark.parametrize("num_hashes", [1, 2, 5])
def test_the_measured_rate_of_wrong_passes_is_the_expected_one(
    target: float, num_hashes: int
) -> None:
    catalogue = zipf_catalogue(3000)
    try:
        dictionary = choose_planes(
            SCHEMA,
            catalogue,
            target_false_positive_rate=target,
            num_hashes=num_hashes,
            max_exact_planes=4,
            seed=1,
        )
    except ValueError:
        assert (target, num_hashes) == (0.001, 1)
        return
    bits = encode_items(dictionary, SCHEMA, catalogue)
    table = torch.zeros((dictionary.num_planes, 47, 1), dtype=torch.int64)
    first, width = dictionary.first_bloom_plane, dictionary.num_bloom_planes
    bloom_build(
        table,
        torch.arange(3000),
        bits.terms,
        first_plane=first,
        num_planes=width,
        num_hashes=num_hashes,
        seed=1,
    )
    signatures = unpack_bits(table[first:]).flatten(1)[:, :3000]  # (planes, items)
    keys = torch.tensor([dictionary.term_key("genre", f"absent {n}") for n in range(600)])
    positions = planes_of(keys, dictionary)
    passed = torch.stack([signatures[own].all(0).sum() for own in positions]).sum()
    measured = float(passed) / (600 * 3000)
    assert dictionary.false_positive_rate <= target
    assert measured == pytest.approx(dictionary.false_positive_rate, rel=0.25, abs=2e-5)


def planes_of(keys: torch.Tensor, dictionary: PlaneDictionary) -> torch.Tensor:
    return bloom_positions(
        keys,
        num_planes=dictionary.num_bloom_planes,
        num_hashes=dictionary.num_hashes,
        seed=dictionary.seed,
    )


def test_a_target_out_of_reach_is_refused_with_the_best_that_can_be_had() -> None:
    catalogue = zipf_catalogue(800)
    with pytest.raises(ValueError, match="cannot be reached") as refused:
        choose_planes(
            SCHEMA, catalogue, target_false_positive_rate=1e-6, max_bloom_planes=40, num_hashes=9
        )
    said = str(refused.value)
    for name in ("target_false_positive_rate", "max_bloom_planes=40", "max_exact_planes"):
        assert name in said
    found = re.search(r"give (\S+) with .* num_hashes=9, and at best (\S+) with .*=(\d+);", said)
    assert found is not None
    given, best, num_hashes = float(found[1]), float(found[2]), int(found[3])
    assert 1e-6 < best < given
    reached = choose_planes(
        SCHEMA,
        catalogue,
        target_false_positive_rate=best * 1.01,
        max_bloom_planes=40,
        num_hashes=num_hashes,
    )
    assert reached.num_bloom_planes <= 40
    assert reached.false_positive_rate == pytest.approx(best, rel=0.01)


def test_every_item_may_have_a_value_of_its_own() -> None:
    # A step over all items per value would be 2.5e9 of them here and outlast the time limit at 1e6.
    count = 50_000
    catalogue = catalogue_of([[]] * count, [[value] for value in range(count)])
    dictionary = choose_planes(SCHEMA, catalogue, num_hashes=2, target_false_positive_rate=0.01)
    terms = encode_items(dictionary, SCHEMA, catalogue).terms
    assert terms.shape == (count, 4)
    assert len(torch.unique(terms[:, 0])) == count
    assert int(terms[49_999, 0]) == dictionary.term_key("code", 49_999)


def test_one_plane_fewer_would_miss_the_target() -> None:
    catalogue = zipf_catalogue(800)
    dictionary = choose_planes(SCHEMA, catalogue, target_false_positive_rate=0.005)
    with pytest.raises(ValueError, match=r"rate of 0.005 cannot be reached: \d+ rare values"):
        choose_planes(
            SCHEMA,
            catalogue,
            target_false_positive_rate=0.005,
            max_bloom_planes=dictionary.num_bloom_planes - 1,
        )
    exactly = choose_planes(
        SCHEMA,
        catalogue,
        target_false_positive_rate=0.005,
        max_bloom_planes=dictionary.num_bloom_planes,
    )
    assert exactly == dictionary


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("target_false_positive_rate", 0.0),
        ("target_false_positive_rate", 1.0),
        ("min_exact_share", 1.5),
        ("num_hashes", 0),
        ("num_hashes", 17),
        ("max_exact_planes", -1),
        ("max_bloom_planes", 0),
        ("seed", -1),
    ],
)
def test_a_setting_out_of_range_is_named(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=setting):
        choose_planes(SCHEMA, catalogue_of([["a"]]), **{setting: value})  # type: ignore[arg-type]


def test_keys_are_stable_and_separate_attributes_types_and_seeds() -> None:
    dictionary = choose_planes(SCHEMA, catalogue_of([["5"]], [[5]]), seed=17)
    key = dictionary.term_key("genre", "Comedy")
    assert key == 124865783398799687
    assert 0 <= key < PAD_TERM
    assert dictionary.term_key("genre", "5") != dictionary.term_key("code", 5)
    twin = Schema(
        attributes=(
            Attribute(name="genre", kind="category", dtype="int"),
            Attribute(name="code", kind="category", dtype="string"),
        )
    )
    swapped = dictionary.model_copy(
        update={"dtypes": {item.name: item.dtype for item in twin.attributes}}
    )
    assert swapped.term_key("genre", 5) != dictionary.term_key("genre", "5")
    reseeded = dictionary.model_copy(update={"seed": 18})
    assert reseeded.term_key("genre", "Comedy") != key


def test_a_key_carries_the_number_of_its_attribute_whatever_the_order_of_a_manifest() -> None:
    dictionary = choose_planes(SCHEMA, catalogue_of([["5"]], [[5]]))
    assert dictionary.categories == ["code", "genre"]
    assert dictionary.term_key("code", 5) >> ATTRIBUTE_SHIFT == 0
    assert dictionary.term_key("genre", "5") >> ATTRIBUTE_SHIFT == 1
    document = json.loads(json.dumps(dictionary.model_dump(mode="json"), sort_keys=True))
    document["dtypes"] = dict(reversed(document["dtypes"].items()))
    again = PlaneDictionary.model_validate(document)
    assert again.term_key("genre", "5") == dictionary.term_key("genre", "5")


def test_a_generation_holds_as_many_categories_as_their_numbers_have_room_for() -> None:
    def chosen(count: int) -> PlaneDictionary:
        names = [f"tag_{at:03d}" for at in range(count)]
        schema = Schema(
            attributes=tuple(Attribute(name=one, kind="category", dtype="int") for one in names)
        )
        catalogue = Catalogue(
            item_ids=np.array([3], dtype=np.int64),
            categories={one: Ragged.from_rows([[1]]) for one in names},
            numbers={},
            signals=np.zeros((1, 0), dtype=np.float32),
            fields={},
            features={},
        )
        return choose_planes(schema, catalogue, max_exact_planes=0)

    last = chosen(MAX_CATEGORIES)
    assert last.term_key("tag_126", 1) >> ATTRIBUTE_SHIFT == 126
    assert PAD_TERM >> ATTRIBUTE_SHIFT == 127
    with pytest.raises(ValueError, match="attributes must hold at most 127 categories, got 128"):
        chosen(MAX_CATEGORIES + 1)
    document = last.model_dump()
    document["dtypes"]["one_more"] = "int"
    with pytest.raises(ValueError, match="at most 127 category attributes, got 128"):
        PlaneDictionary.model_validate(document)


@pytest.mark.parametrize(
    ("attribute", "value"), [("genre", 5), ("code", "5"), ("year", 1990), ("nothing", "x")]
)
def test_a_term_of_the_wrong_kind_or_type_is_refused(attribute: str, value: Any) -> None:
    dictionary = choose_planes(SCHEMA, catalogue_of([["5"]], [[5]]))
    with pytest.raises(ValueError, match=attribute):
        dictionary.term_key(attribute, value)
    with pytest.raises(ValueError, match=attribute):
        dictionary.exact_plane(attribute, value)


def test_colliding_keys_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "_term_key", lambda seed, number, name, value: len(str(value)))
    with pytest.raises(ValueError, match="genre:'ab' and genre:'cd' share the term key 2"):
        choose_planes(SCHEMA, catalogue_of([["ab"], ["cd"], ["efg"]]))


def test_items_are_encoded_as_exact_bits_sorted_terms_and_order_keys() -> None:
    catalogue = catalogue_of(
        [["often", "often"], ["often", "rare", "x", "y", "rare"], []],
        [[-5], [7], [7]],
        [1990, NULL_INT, -3],
        [2.5, np.nan, -0.0],
    )
    dictionary = choose_planes(SCHEMA, catalogue, min_exact_share=0.5)
    bits = encode_items(dictionary, SCHEMA, catalogue)
    assert dictionary.exact_planes == {"code": {"7": 1}, "genre": {"often": 2}}
    assert bits.exact.tolist() == [[False, True], [True, True], [True, False]]
    rare = sorted(dictionary.term_key("genre", value) for value in ("rare", "x", "y"))
    pad = PAD_TERM
    code = dictionary.term_key("code", -5)
    assert bits.terms.tolist() == [[code, pad, pad, pad], [*rare, pad], [pad] * 4]
    assert bits.columns.tolist() == [
        [1990, float_key(2.5)],
        [NULL_INT, NULL_INT],
        [-3, float_key(0.0)],
    ]


def test_items_encode_the_same_alone_and_together() -> None:
    catalogue = zipf_catalogue(400)
    dictionary = choose_planes(SCHEMA, catalogue)
    whole = encode_items(dictionary, SCHEMA, catalogue)
    chosen = np.array([399, 0, 17])
    part = encode_items(dictionary, SCHEMA, catalogue.take(chosen))
    for together, alone in zip(whole, part, strict=True):
        assert torch.equal(together[torch.from_numpy(chosen)], alone)


def test_values_never_seen_before_become_rare_terms() -> None:
    dictionary = choose_planes(SCHEMA, catalogue_of([["a"], ["a"], ["b"]]), min_exact_share=0.5)
    bits = encode_items(dictionary, SCHEMA, catalogue_of([["new"]]))
    assert bits.terms.tolist() == [[dictionary.term_key("genre", "new"), *[PAD_TERM] * 3]]


def test_values_that_the_generation_cannot_hold_are_refused() -> None:
    with pytest.raises(SchemaError, match="genre: value 'new' of item 100 has no plane"):
        encode_items(exact_only(catalogue_of([["a"]])), SCHEMA, catalogue_of([["new"]]))
    narrow = choose_planes(SCHEMA, catalogue_of([["a"], ["b"]]), max_exact_planes=0)
    crowded = catalogue_of([["a"], ["1", "2", "3", "4", "5"]])
    with pytest.raises(SchemaError, match=r"item 101 has 5 rare values, this generation holds 4"):
        encode_items(narrow, SCHEMA, crowded)


def test_a_slot_has_room_for_a_quarter_more_rare_values_than_the_widest_item_has() -> None:
    for count, width in ((0, 4), (1, 4), (3, 4), (4, 8), (6, 8), (7, 12), (16, 20)):
        values = [str(value) for value in range(count)]
        dictionary = choose_planes(SCHEMA, catalogue_of([values, []]), max_exact_planes=0)
        assert dictionary.terms_width == width


def drawn_catalogue(random: np.random.Generator, count: int, first: int) -> Catalogue:
    """Items whose frequent values are those from ``first`` on, and now and then a wide one."""
    widths = random.integers(0, 4, size=count) + 9 * (random.random(count) < 0.02)
    genres = [[f"g{first + random.geometric(0.2)}" for _ in range(width)] for width in widths]
    codes = (first + random.geometric(0.4, size=(count, 1))).tolist()
    return catalogue_of(genres, codes)


def test_what_one_dictionary_holds_every_later_one_holds_too() -> None:
    random = np.random.default_rng(4)
    chain: list[PlaneDictionary] = []
    for first in range(0, 60, 6):
        catalogue = drawn_catalogue(random, 200, first)
        chosen = choose_planes(
            SCHEMA, catalogue, max_exact_planes=12, min_exact_share=0.05, previous=chain
        )
        for before in chain:
            assert shortfall(before, chosen) == ""
            width = before.terms_width
            # All values with a plane, and as many others as fit: the widest item that it takes.
            genres = [*before.exact_planes["genre"], *(f"new{at}" for at in range(width))]
            widest = catalogue_of([genres], [[*map(int, before.exact_planes["code"])]])
            encode_items(before, SCHEMA, widest)
            encode_items(chosen, SCHEMA, widest)
        chain.append(chosen)
    assert max(one.num_exact_planes for one in chain) == 12


def test_values_keep_their_planes_and_others_get_what_is_left() -> None:
    before = choose_planes(SCHEMA, catalogue_of([["a"], ["b"]], [[5], [5]]))
    assert before.exact_planes == {"code": {"5": 1}, "genre": {"a": 2, "b": 3}}
    today = catalogue_of([["c"], ["c"], ["d"]], [[6], [6], [6]])
    after = choose_planes(SCHEMA, today, max_exact_planes=4, previous=[before])
    assert after.exact_planes == {"code": {"5": 1, "6": 2}, "genre": {"a": 3, "b": 4}}
    full = choose_planes(SCHEMA, today, max_exact_planes=2, previous=[before])
    assert full.exact_planes == before.exact_planes
    assert encode_items(full, SCHEMA, today).terms.shape == (3, 4)
    # An attribute with values of another type begins anew.
    other = before.model_copy(update={"dtypes": {**before.dtypes, "code": "string"}})
    mixed = choose_planes(SCHEMA, today, max_exact_planes=3, previous=[other])
    assert mixed.exact_planes == {"code": {"6": 1}, "genre": {"a": 2, "b": 3}}


def test_what_a_narrower_dictionary_lacks_is_told_with_numbers() -> None:
    wide = choose_planes(SCHEMA, catalogue_of([["a", "b", "c", "d", "e"]]), max_exact_planes=0)
    exact = choose_planes(SCHEMA, catalogue_of([["a"], ["b"]], [[5], []]))
    assert (wide.terms_width, exact.terms_width) == (8, 4)
    assert shortfall(wide, wide) == shortfall(exact, exact) == ""
    assert shortfall(wide, exact) == (
        "terms_width must be at least 8, for 8 rare values and 0 that lose their planes, got 4"
    )
    # The three values that lose their planes may be on one item beside four rare ones.
    assert shortfall(exact, wide) == ""
    narrow = choose_planes(SCHEMA, catalogue_of([["x"]]), max_exact_planes=0)
    assert shortfall(exact, narrow) == (
        "terms_width must be at least 7, for 4 rare values and 3 that lose their planes, got 4"
    )
    # That an attribute is gone or of another type is for others to say.
    gone = narrow.model_copy(update={"exact_planes": {"code": {}}})
    assert "at least 5" in shortfall(exact, gone)
    other = gone.model_copy(update={"dtypes": {**narrow.dtypes, "code": "string"}})
    assert shortfall(exact, other) == ""


def test_float_keys_order_as_the_floats_do() -> None:
    tiny, huge = np.finfo(np.float64).smallest_subnormal, np.finfo(np.float64).max
    ascending = np.array(
        [-np.inf, -huge, -2.0, -1.0, -tiny, 0.0, tiny, 1.0, np.nextafter(1, 2), huge, np.inf]
    )
    keys = float_keys(ascending)
    assert (np.diff(keys.astype(object)) > 0).all()
    assert keys.min() > INT64_MIN
    assert float_key(-0.0) == float_key(0.0)
    assert float_key(float("nan")) == NULL_INT


def test_number_keys_follow_the_type_of_the_column() -> None:
    dictionary = choose_planes(SCHEMA, catalogue_of([["a"]]))
    assert dictionary.number_key("year", -7) == -7
    assert dictionary.number_key("rating", 3) == float_key(3.0)
    for attribute, value in (
        ("year", 1.5),
        ("year", 2**63),
        ("year", INT64_MIN),
        ("rating", float("nan")),
        ("genre", 1),
    ):
        with pytest.raises(ValueError, match=attribute):
            dictionary.number_key(attribute, value)


def test_the_report_adds_up() -> None:
    catalogue = zipf_catalogue(500)
    dictionary = choose_planes(SCHEMA, catalogue)
    report = dictionary.report()
    assert report.num_planes == 1 + report.num_exact_planes + report.num_bloom_planes
    assert report.plane_bits_per_item == report.num_planes
    assert report.verify_bits_per_item == 64 * (report.terms_width + 2)
    assert 0 < report.false_positive_rate <= 0.001
    assert rare_terms(catalogue, dictionary).max() <= report.terms_width
    json.dumps(report._asdict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exact_planes": {"genre": {"a": 2}}}, "exact planes must be"),
        ({"exact_planes": {"genre": {"a": 1, "b": 1}}}, "exact planes must be"),
        ({"columns": {"year": 1}}, "columns must be"),
        ({"columns": {"other": 0}}, "'other' has planes or a column but no dtype"),
        ({"terms_width": 4}, "must both be 0 or both be positive"),
        ({"terms_width": 3}, "multiple of 4"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_a_contradictory_dictionary_is_refused(change: dict[str, Any], message: str) -> None:
    good = exact_only(catalogue_of([["a"]])).model_dump()
    assert PlaneDictionary.model_validate(good).num_planes == 2
    with pytest.raises(ValidationError, match=message):
        PlaneDictionary.model_validate({**good, **change})
