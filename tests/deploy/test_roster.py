from silvershard.deploy.roster import Roster


def test_so_many_copies_are_named_as_are_wanted() -> None:
    roster = Roster(2)
    assert roster.named == frozenset()
    roster.fill([[(0, 2), (0, 1), (0, 0), (1, 1)]])
    assert roster.named == {(0, 0), (0, 1), (1, 1)}


def test_a_warm_copy_takes_a_place_and_keeps_it() -> None:
    roster = Roster(1)
    both = [(0, 0), (0, 1)]
    roster.fill([both])
    assert roster.named == {(0, 0)}
    roster.fill([[(0, 1)]])
    assert roster.named == {(0, 1)}
    roster.fill([both])
    assert roster.named == {(0, 1)}
    roster.fill([[]])
    assert roster.named == frozenset()


def test_copies_of_two_generations_are_named_side_by_side() -> None:
    roster = Roster(1)
    roster.fill([[(0, 1)]])
    # The other copy has changed to the generation that comes.
    roster.fill([[(0, 1)], [(0, 0)]])
    assert roster.named == {(0, 0), (0, 1)}
    roster.fill([[(0, 0)]])
    assert roster.named == {(0, 0)}


def test_one_copy_that_serves_both_generations_is_enough() -> None:
    roster = Roster(1)
    roster.fill([[(0, 1)]])
    roster.fill([[(0, 1)], [(0, 0), (0, 1)]])
    assert roster.named == {(0, 1)}


def test_a_copy_that_rests_is_not_named_and_another_one_takes_its_place() -> None:
    roster = Roster(1)
    both = [(0, 0), (0, 1)]
    roster.fill([both])
    roster.resting = frozenset({(0, 0)})
    roster.fill([both])
    assert roster.named == {(0, 1)}
    roster.fill([[(0, 0)]])
    assert roster.named == frozenset()
    roster.resting = frozenset()
    roster.fill([both])
    assert roster.named == {(0, 0)}


def test_more_or_fewer_copies_are_named_from_the_next_filling_on() -> None:
    roster = Roster(1)
    three = [(0, 0), (0, 1), (0, 2)]
    roster.fill([three])
    roster.resize(2)
    assert roster.named == {(0, 0)}
    roster.fill([three])
    assert roster.named == {(0, 0), (0, 1)}
    roster.resize(1)
    roster.fill([three])
    assert roster.named == {(0, 0)}
