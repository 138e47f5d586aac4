from silvershard.deploy.layout import Layout, Place, copy_of, number_of
from silvershard.deploy.placement import Copy


def test_no_name_is_given_twice() -> None:
    first = Layout().added({Place(2, 0, 0): "a", Place(2, 1, 0): "b"})
    assert [one.actor for one in first.copies] == ["shard-0-0-1", "shard-1-0-2"]
    again = first.without("shard-1-0-2").added({Place(2, 1, 0): "c"})
    assert [(one.actor, one.host) for one in again.copies] == [
        ("shard-0-0-1", "a"),
        ("shard-1-0-3", "c"),
    ]
    assert again.of("shard-1-0-3").place == Place(2, 1, 0)
    # Another cut of the catalogue has places of its own.
    assert again.at(Place(3, 1, 0)) is None


def test_who_comes_takes_the_place_and_who_leaves_has_none() -> None:
    place, other = Place(2, 0, 1), Place(2, 1, 1)
    layout = Layout().added({place: "a", other: "a"}).added({place: "b"}, "coming")
    taken = layout.at(place)
    assert taken is not None
    assert (taken.host, taken.role) == ("b", "coming")
    done = layout.relieved()
    assert [(one.host, one.role) for one in done.copies] == [
        ("a", "leaving"),
        ("a", "serving"),
        ("b", "serving"),
    ]
    # It is done once.
    assert done.relieved() == done
    left = done.left({"shard-0-1-3"})
    assert left.at(place) is None
    assert left.at(other) == done.copies[1]


def test_standbys_are_numbered_after_the_replicas() -> None:
    for copy, number in ((Copy(3, 1), 1), (Copy(3, 0, standby=True), 2)):
        assert number_of(copy, 2) == number
        assert copy_of(Place(4, 3, number), 2) == copy
