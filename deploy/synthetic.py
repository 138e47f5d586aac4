"""Generated films and ratings with planted tastes, for machines that have no MovieLens at hand.

Every user has two to four tastes, each a genre, an era and a theme (a tag). The user stays with
one taste for a dozen films or so, then drifts to another; now and then the next film is a companion
of the last one. So what comes next follows from what came before, beyond what is popular.
"""

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from silvershard.deploy.dataset import MovieLens, Tagging, from_ratings
from silvershard.model.catalogue import NULL_INT, Ragged, as_column

TAGS: dict[str, tuple[str, ...]] = {
    "Drama": ("family secrets", "small town", "courtroom", "coming of age"),
    "Comedy": ("screwball", "satire", "road trip", "mistaken identity"),
    "Thriller": ("conspiracy", "cat and mouse", "hostage", "double agent"),
    "Action": ("heist", "car chase", "revenge", "martial arts"),
    "Romance": ("second chance", "long distance", "wedding", "star-crossed"),
    "Adventure": ("treasure hunt", "expedition", "survival", "pirates"),
    "Sci-Fi": ("time travel", "robots", "first contact", "dystopia"),
    "Crime": ("organized crime", "police", "undercover", "prison"),
    "Horror": ("haunted house", "vampires", "slasher", "possession"),
    "Fantasy": ("dragons", "witchcraft", "fairy tale", "quest"),
    "Children": ("talking animals", "toys", "school", "holiday"),
    "Animation": ("hand-drawn", "stop motion", "anime", "computer animation"),
    "Mystery": ("detective", "whodunit", "missing person", "amnesia"),
    "War": ("submarine", "resistance", "homecoming", "trench"),
    "Musical": ("stage", "dance", "jazz", "opera"),
    "Documentary": ("nature", "politics", "music scene", "sport"),
    "Western": ("gunslinger", "frontier", "outlaw", "railroad"),
    "Film-Noir": ("femme fatale", "private eye", "blackmail", "nightclub"),
}
"""Tags of each genre, the more frequent genres first. Tastes distinguish the first two, themes."""

ERAS = ((1940, 1979), (1980, 1999), (2000, 2023))
"""First and last year of the eras that tastes distinguish."""


def _words(text: str) -> list[str]:
    return text.split()


_ADJECTIVES = _words(
    "Silent Crimson Broken Golden Hidden Burning Distant Electric Frozen Gentle Hollow Iron Last "
    "Lonely Midnight Paper Quiet Restless Scarlet Secret Stolen Velvet Wandering Winter"
)
_NOUNS = _words(
    "Harbor Orchard Lantern Compass Garden Engine River Station Mirror Signal Bridge Island Letter "
    "Archive Carnival Meadow Tower Violin Border Canyon Clock Colony Ferry Horizon"
)
_NAMES = _words(
    "Adele Bruno Clara Dmitri Elena Felix Greta Hugo Imani Jonas Keiko Leila Marco Nadia Oscar "
    "Priya Quentin Rosa Stefan Tomas Ursula Viktor Wanda Yusuf"
)
_PLACES = _words(
    "Lisbon Trieste Oslo Dakar Kyoto Havana Tbilisi Cork Bergen Salta Quito Turin Galway Hanoi "
    "Malmo Perth Nairobi Tampere Graz Leeds Izmir Cusco Riga Bremen"
)

_COMPANIONS = 3
_NUM_THEMES = 2
_STAY = 0.92
_FOLLOW_COMPANION = 0.35
_WANDER = 0.1
_TRIES = 8
_TAGGED = 0.1
_NO_GENRES, _NO_YEAR = 0.004, 0.002
_FIRST_START, _LAST_START = 946_684_800, 1_546_300_800


def generate(
    num_movies: int = 2000, num_users: int = 600, ratings_per_user: int = 60, *, seed: int = 0
) -> MovieLens:
    """Films and ratings that depend on the arguments alone, in the shape of ``load``'s answer.

    Popularity is long-tailed; about half of the ratings are 4 or higher, more of those of films to
    the user's taste. A few films have no genre or no year, as in MovieLens.

    Args:
        num_movies: films, at least 100.
        num_users: users, at least 1.
        ratings_per_user: mean number of films that a user rates, from 20 to ``num_movies / 5``;
            nobody rates fewer than 20, or more than a quarter of the films.
        seed: start of the random sequence, 0 or more.

    Raises:
        ValueError: if an argument is out of range.
    """
    if num_movies < 100:
        raise ValueError(f"num_movies must be at least 100, got {num_movies}")
    if num_users < 1:
        raise ValueError(f"num_users must be at least 1, got {num_users}")
    if not 20 <= ratings_per_user <= num_movies / 5:
        raise ValueError(
            f"ratings_per_user must be from 20 to num_movies / 5 = {num_movies / 5:g}, "
            f"got {ratings_per_user}"
        )
    rng = np.random.default_rng(seed)
    films = _Films(rng, num_movies)
    spread = 0.6
    lengths = np.clip(
        rng.lognormal(np.log(ratings_per_user) - spread**2 / 2, spread, num_users),
        20,
        num_movies / 4,
    ).astype(np.int64)
    watched: list[NDArray[np.int64]] = []
    liking: list[NDArray[np.float64]] = []
    for length in lengths:
        tastes = films.draw_tastes(rng)
        rows = _watch(rng, films, tastes, int(length))
        match = np.stack([films.match(taste) for taste in tastes]).max(axis=0)[rows]
        watched.append(rows)
        liking.append(films.quality[rows] + 1.2 * match + rng.normal(0, 0.3))
    rows = np.concatenate(watched)
    users = np.repeat(np.arange(1, num_users + 1, dtype=np.int64), lengths)
    scores = np.concatenate(liking) + rng.normal(0, 0.5, len(rows))
    times = _timestamps(rng, lengths)
    return from_ratings(
        source="generated films with planted tastes",
        generated=True,
        movie_ids=films.movie_ids,
        titles=films.titles,
        years=films.listed_years,
        genres=films.listed_genres,
        tags=films.tags,
        user_ids=users,
        rated_movie_ids=films.movie_ids[rows],
        ratings=np.clip(np.round(2 * scores) / 2, 0.5, 5.0).astype(np.float32),
        timestamps=times,
        tagging=_tag(np.random.default_rng([seed, 1]), films, users, rows, times),
    )


class _Films:
    """The films, and what choosing among them needs; a taste is (genre, era, theme)."""

    def __init__(self, rng: np.random.Generator, num_movies: int) -> None:
        genres = list(TAGS)
        frequency = 1.0 / np.arange(2, len(genres) + 2)
        frequency /= frequency.sum()
        self.movie_ids = np.cumsum(rng.integers(1, 4, num_movies, dtype=np.int64))
        self._main = rng.choice(len(genres), num_movies, p=frequency)
        self._theme = rng.integers(0, _NUM_THEMES, num_movies)
        self._era = rng.choice(len(ERAS), num_movies, p=(0.15, 0.35, 0.5))
        first, last = np.array(ERAS).T
        years = rng.integers(first[self._era], last[self._era] + 1)
        more = rng.choice(len(genres), (num_movies, 2), p=frequency)
        more[rng.random((num_movies, 2)) < (0.4, 0.7)] = -1
        self._has_genre = np.zeros((num_movies, len(genres)), dtype=np.bool_)
        for column in (self._main, more[:, 0], more[:, 1]):
            rows = np.flatnonzero(column >= 0)
            self._has_genre[rows, column[rows]] = True
        self.quality = rng.normal(2.9, 0.4, num_movies)
        self._popularity = 1.0 / (rng.permutation(num_movies) + 20.0)
        self.popular = np.cumsum(self._popularity) / self._popularity.sum()
        self.companions = self._next_in_cell(years)
        self._matches: dict[tuple[int, int, int], NDArray[np.float64]] = {}
        self._chances: dict[tuple[int, int, int], NDArray[np.float64]] = {}

        unlisted = rng.random(num_movies) < _NO_GENRES
        self.listed_years = np.where(rng.random(num_movies) < _NO_YEAR, NULL_INT, years)
        self.listed_genres = Ragged.from_rows(
            [
                [] if hidden else [genres[index] for index in np.flatnonzero(row)]
                for hidden, row in zip(unlisted, self._has_genre, strict=True)
            ],
            dtype="string",
        )
        self.tags = Ragged.from_rows(
            [
                self._tags(rng, genres[main], int(theme))
                for main, theme in zip(self._main, self._theme, strict=True)
            ],
            dtype="string",
        )
        self.titles = as_column(_titles(rng, num_movies), "string")

    def draw_tastes(self, rng: np.random.Generator) -> list[tuple[int, int, int]]:
        """Two to four tastes, each that of some popular film, so that none is without films."""
        rows = np.searchsorted(self.popular, rng.random(rng.integers(2, 5)))
        tastes = [(int(self._main[r]), int(self._era[r]), int(self._theme[r])) for r in rows]
        return list(dict.fromkeys(tastes))

    def match(self, taste: tuple[int, int, int]) -> NDArray[np.float64]:
        """How well each film fits the taste, ``(N,)`` in [0, 1]."""
        if taste not in self._matches:
            genre, era, theme = taste
            self._matches[taste] = (
                0.5 * self._has_genre[:, genre]
                + 0.2 * (self._era == era)
                + 0.3 * ((self._main == genre) & (self._theme == theme))
            )
        return self._matches[taste]

    def chances(self, taste: tuple[int, int, int]) -> NDArray[np.float64]:
        """Cumulated probability of each film for someone in the mood of the taste, ``(N,)``."""
        if taste not in self._chances:
            weights = self._popularity * np.exp(7.0 * self.match(taste))
            self._chances[taste] = np.cumsum(weights) / weights.sum()
        return self._chances[taste]

    def _next_in_cell(self, years: NDArray[np.int64]) -> NDArray[np.int64]:
        """The films that follow each one by year among those of its genre and theme, in a ring."""
        order = np.lexsort((years, self._theme, self._main))
        cells = self._main[order] * _NUM_THEMES + self._theme[order]
        starts = np.searchsorted(cells, cells, side="left")
        sizes = np.searchsorted(cells, cells, side="right") - starts
        places = np.arange(len(order)) - starts
        companions = np.empty((len(order), _COMPANIONS), dtype=np.int64)
        for step in range(_COMPANIONS):
            companions[order, step] = order[starts + (places + step + 1) % sizes]
        return companions

    def _tags(self, rng: np.random.Generator, genre: str, theme: int) -> list[str]:
        """The theme, and sometimes another tag of the genre; one film in ten has none."""
        if rng.random() < 0.1:
            return []
        tags = [TAGS[genre][theme]]
        if rng.random() < 0.3:
            tags.append(TAGS[genre][int(rng.integers(_NUM_THEMES, len(TAGS[genre])))])
        return tags


def _watch(
    rng: np.random.Generator, films: _Films, tastes: list[tuple[int, int, int]], length: int
) -> NDArray[np.int64]:
    """The rows of the films that one user rates, in order, none of them twice."""
    seen: dict[int, None] = {}
    mood, last = tastes[0], -1
    for drift, how in rng.random((length, 2)):
        if drift > _STAY:
            mood = tastes[int(rng.integers(len(tastes)))]
        chances = films.popular if how < _WANDER else films.chances(mood)
        options = np.searchsorted(chances, rng.random(_TRIES)).tolist()
        if last >= 0 and how > 1 - _FOLLOW_COMPANION:
            options = [*rng.permutation(films.companions[last]).tolist(), *options]
        last = next((row for row in options if row not in seen), -1)
        while last < 0 or last in seen:
            last = int(rng.integers(len(films.popular)))
        seen[last] = None
    return np.fromiter(seen, dtype=np.int64, count=length)


def _tag(
    rng: np.random.Generator,
    films: _Films,
    users: NDArray[np.int64],
    rows: NDArray[np.int64],
    times: NDArray[np.int64],
) -> Tagging:
    """One rating in ten is followed by a tag of the film, a minute later."""
    tagged = np.flatnonzero((rng.random(len(rows)) < _TAGGED) & (films.tags.lengths[rows] > 0))
    picks = (rng.random(len(tagged)) * films.tags.lengths[rows[tagged]]).astype(np.int64)
    return Tagging(
        users[tagged],
        films.movie_ids[rows[tagged]],
        films.tags.values[films.tags.offsets[rows[tagged]] + picks],
        times[tagged] + 60,
    )


def _timestamps(rng: np.random.Generator, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Seconds that rise within each user, from a start of the user's own."""
    starts = rng.integers(_FIRST_START, _LAST_START, len(lengths))
    gaps = np.ceil(rng.exponential(86_400.0, int(lengths.sum()))).astype(np.int64)
    gaps = np.maximum(gaps, 1)
    elapsed = np.cumsum(gaps)
    first = np.cumsum(lengths) - lengths
    shifts: NDArray[np.int64] = np.repeat(starts - elapsed[first], lengths)
    return elapsed + shifts


def _titles(rng: np.random.Generator, count: int) -> list[str]:
    """Made-up titles; one that comes again is numbered as a sequel."""
    used: Counter[str] = Counter()
    titles: list[str] = []
    for kind, *words in rng.integers(0, (6, 24, 24, 24, 24), (count, 5)).tolist():
        adjective, noun = _ADJECTIVES[words[0]], _NOUNS[words[1]]
        name, place = _NAMES[words[2]], _PLACES[words[3]]
        title = (
            f"The {adjective} {noun}",
            f"{name} and the {adjective} {noun}",
            f"{adjective} {place}",
            f"The {noun} of {place}",
            f"{name}'s {noun}",
            f"{name} in {place}",
        )[kind]
        used[title] += 1
        titles.append(title if used[title] == 1 else f"{title} {used[title]}")
    return titles
