import csv
from pathlib import Path

import pytest

from silvershard.deploy.synthetic import generate
from silvershard.model.catalogue import NULL_INT


@pytest.fixture(scope="session")
def films_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MovieLens folder with 400 films and the ratings of 80 people with planted tastes."""
    films = generate(400, 80, 40, seed=3)
    folder = tmp_path_factory.mktemp("ml")
    with (folder / "movies.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("movieId", "title", "genres"))
        for row, movie in enumerate(films.movie_ids.tolist()):
            year = int(films.years[row])
            title = f"{films.titles[row]}{'' if year == NULL_INT else f' ({year})'}"
            genres = "|".join(films.genres.row(row)) or "(no genres listed)"
            writer.writerow((movie, title, genres))
    with (folder / "ratings.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("userId", "movieId", "rating", "timestamp"))
        columns = (films.user_ids, films.rated_movie_ids, films.ratings, films.timestamps)
        writer.writerows(zip(*(column.tolist() for column in columns), strict=True))
    return folder
