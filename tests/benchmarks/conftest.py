import csv
import sys
import types
from pathlib import Path

import pytest

from silvershard.deploy.synthetic import generate

# The folder is no package and the root stays off sys.path; `benchmarks/kernels.py` does the same.
if "benchmarks" not in sys.modules:
    _package = types.ModuleType("benchmarks")
    _package.__path__ = [str(Path(__file__).resolve().parents[2] / "benchmarks")]
    sys.modules["benchmarks"] = _package


@pytest.fixture(scope="session")
def films_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MovieLens folder with 300 films and the ratings of 30 people."""
    films = generate(300, 30, 20, seed=1)
    folder = tmp_path_factory.mktemp("films")
    columns = (films.user_ids, films.rated_movie_ids, films.ratings, films.timestamps)
    rows = {
        "movies": [("movieId", "title", "genres"), *((one, "A", "B") for one in films.movie_ids)],
        "ratings": [
            ("userId", "movieId", "rating", "timestamp"),
            *zip(*(column.tolist() for column in columns), strict=True),
        ],
    }
    for name, lines in rows.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(lines)
    return folder
