import numpy as np

from benchmarks.planted import LIKED_TOPICS, STYLES, TOPICS, planted_world


def test_a_few_dimensions_express_a_part_of_the_preferences_only() -> None:
    world = planted_world(400, 300, 10, seed=0)
    kinds = TOPICS * STYLES
    assert np.linalg.matrix_rank(world.preferences) == kinds
    shares = [world.explained(dim) for dim in (1, 8, 16, kinds)]
    assert shares == sorted(shares)
    assert shares[1] < 0.65
    assert shares[3] == 1.0


def test_users_take_different_items_of_the_kinds_they_prefer() -> None:
    world = planted_world(200, 600, 20, seed=1)
    assert all(len(set(row.tolist())) == 20 for row in world.taken)
    wanted = np.take_along_axis(world.preferences, world.kinds[world.taken], 1)
    everything = world.preferences[:, world.kinds]
    # One kind in sixteen is of the wanted style of a liked topic, and most of what is taken.
    share = LIKED_TOPICS / (TOPICS * STYLES)
    assert abs((everything == everything.max()).mean() - share) < 0.03
    assert (wanted == everything.max()).mean() > 6 * share
    assert not any(np.array_equal(np.sort(row), row) for row in world.taken)


def test_a_world_depends_on_its_seed_alone() -> None:
    first, again, other = (planted_world(20, 90, 5, seed=seed) for seed in (3, 3, 4))
    for name in ("topics", "kinds", "popularity", "preferences", "taken"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))


def test_the_truth_finds_more_than_the_nearest_inner_product_of_few_dimensions() -> None:
    world = planted_world(500, 800, 12, seed=2)
    last = world.taken[:, -1:]
    truth, few = world.truth(50), world.best_inner_product(8, 50)
    assert (truth == last).any(1).mean() > 1.5 * (few == last).any(1).mean()
    assert not any(np.isin(world.taken[user, :-1], truth[user]).any() for user in range(500))
    # With a dimension for every kind the nearest inner product is the truth.
    every = world.best_inner_product(TOPICS * STYLES, 50)
    assert (every == truth).mean() > 0.99
    user = 7
    scores = world.relevance(user)
    scores[world.taken[user, :-1]] = -np.inf
    assert np.array_equal(truth[user], np.argsort(-scores, kind="stable")[:50])
