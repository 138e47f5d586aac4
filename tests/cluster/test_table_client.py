import numpy as np

from silvershard.cluster import table_client


def test_distinct_positions_are_those_of_numpy() -> None:
    generator = np.random.default_rng(0)
    for size, most in ((0, 5), (1, 5), (100, 3), (1000, 1 << 31), (1000, 900)):
        positions = generator.integers(0, most, size)
        found, back = table_client._distinct(positions)
        expected, expected_back = np.unique(positions, return_inverse=True)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(back, expected_back)
