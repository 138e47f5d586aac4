from silvershard.deploy.config_sections import ShardingSection
from silvershard.deploy.layout import Place
from silvershard.deploy.places import HerePlaces


def test_on_one_machine_every_start_has_a_name_of_its_own_and_nothing_moves() -> None:
    places = HerePlaces()
    names = [places.name(Place(2, 1, 0)) for _ in range(2)]
    # Another cut of the catalogue has processes of the same numbers.
    names += [places.name(Place(3, 1, 0)), places.name(Place(3, 2, 0))]
    assert names == ["shard-1-0", "shard-1-0-1", "shard-1-0-2", "shard-2-0"]
    assert places.where(Place(2, 1, 0)) == ""
    assert places.moves(ShardingSection(shards=2)) == ()
