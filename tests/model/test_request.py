from silvershard.model.request import WeightedIds


def test_weighted_ids_are_a_sequence_of_the_ids() -> None:
    weighted = WeightedIds((5, 7), (1.0, -2.0))
    assert list(weighted) == [5, 7]
    assert len(weighted) == 2
    assert weighted[-1] == 7
    assert weighted[:1] == (5,)
    assert 7 in weighted
    assert weighted == WeightedIds((5, 7), (1.0, -2.0))
    assert weighted != WeightedIds((5, 7), (1.0, 2.0))
