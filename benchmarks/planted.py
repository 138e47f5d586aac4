"""Generated users and items whose relevance no inner product of a few dimensions expresses.

An item has a topic and one of the styles that its topic comes in; together they are its kind. A
user likes some topics, and in each of them one style, drawn anew for every user and topic. Which of
the user's preferences counts depends on the item: relevance is a mixture of one inner product of
S dimensions per topic, gated by the topic of the item. The users' preferences are independent, so
the matrix of users and kinds has rank T * S, and an inner product of fewer dimensions must mix
kinds up that the user does not.

Shapes: U users, N items, T topics, S styles, L interactions of a user, D embedding dimension.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOPICS = 12
STYLES = 4
LIKED_TOPICS = 3
INTEREST = 2.5
"""What an item of a liked topic has more than others, in log odds."""
TASTE = 4.0
"""What it has more than that in the user's style of the topic."""
POPULARITY = 1.2
"""Standard deviation of what an item has for everybody."""


@dataclass(frozen=True, eq=False)
class PlantedWorld:
    """Users, items and what each user took, in order.

    Attributes:
        topics: ``(N,)`` int64 in [0, T).
        kinds: ``(N,)`` int64 in [0, T * S), topic times S plus style.
        popularity: ``(N,)`` float64 log odds.
        preferences: ``(U, T * S)`` float64 log odds of each kind.
        taken: ``(U, L)`` int64 items, oldest first, all different.
    """

    topics: NDArray[np.int64]
    kinds: NDArray[np.int64]
    popularity: NDArray[np.float64]
    preferences: NDArray[np.float64]
    taken: NDArray[np.int64]

    def relevance(self, user: int) -> NDArray[np.float64]:
        """The log odds with which a user takes each item, ``(N,)``."""
        odds: NDArray[np.float64] = self.preferences[user][self.kinds] + self.popularity
        return odds

    def truth(self, k: int) -> NDArray[np.int64]:
        """The items that each user is most likely to take last, ``(U, k)``: nothing beats this."""
        return self._ranked(self.preferences, k)

    def best_inner_product(self, dim: int, k: int) -> NDArray[np.int64]:
        """The order by the inner product of ``dim`` dimensions that is nearest to the truth.

        Nearest in least squares over users and kinds. It is told the preferences and the popularity
        of every item, which no training is.

        Source: Eckart and Young, "The approximation of one matrix by another of lower rank",
        Psychometrika 1936.
        """
        left, strength, right = np.linalg.svd(self.preferences, full_matrices=False)
        return self._ranked((left[:, :dim] * strength[:dim]) @ right[:dim], k)

    def explained(self, dim: int) -> float:
        """The share of the variance of preferences that ``dim`` dimensions can express."""
        centred = self.preferences - self.preferences.mean(0)
        strength = np.linalg.svd(centred, compute_uv=False) ** 2
        return float(strength[:dim].sum() / strength.sum())

    def _ranked(self, preferences: NDArray[np.float64], k: int) -> NDArray[np.int64]:
        ranked = np.empty((len(self.taken), k), dtype=np.int64)
        for user, row in enumerate(preferences):
            scores = row[self.kinds] + self.popularity
            scores[self.taken[user, :-1]] = -np.inf
            ranked[user] = np.argsort(-scores, kind="stable")[:k]
        return ranked


def planted_world(num_users: int, num_items: int, length: int, seed: int) -> PlantedWorld:
    """Return users who take ``length`` different items each, by odds of their relevance.

    Args:
        num_users: U.
        num_items: N, at least ``length``.
        length: L.
        seed: of everything that is drawn.
    """
    generator = np.random.default_rng(seed)
    topics = generator.integers(0, TOPICS, num_items)
    kinds = topics * STYLES + generator.integers(0, STYLES, num_items)
    popularity = POPULARITY * generator.normal(size=num_items)
    liked = generator.random((num_users, TOPICS)).argsort(1) < LIKED_TOPICS
    style = generator.integers(0, STYLES, (num_users, TOPICS))
    wanted = style[:, :, None] == np.arange(STYLES)
    preferences = (liked[:, :, None] * (INTEREST + TASTE * wanted)).reshape(num_users, -1)
    taken = np.empty((num_users, length), dtype=np.int64)
    for user in range(num_users):
        # The largest of odds plus Gumbel noise are a draw without replacement, in its order.
        drawn = preferences[user][kinds] + popularity + generator.gumbel(size=num_items)
        best = np.argpartition(-drawn, length - 1)[:length]
        taken[user] = generator.permutation(best)
    return PlantedWorld(topics, kinds, popularity, preferences, taken)
