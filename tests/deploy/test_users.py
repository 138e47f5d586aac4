from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from silvershard.deploy.errors import CommandError
from silvershard.deploy.users import read_user, read_user_ids, user_history, write_users
from silvershard.model.request import FeatureValues, WeightedIds


@pytest.fixture
def users_file(tmp_path: Path) -> Path:
    path = tmp_path / "users.safetensors"
    write_users(path, np.array([2, 2, 2, 5, 9, 9]), np.array([30, 10, 20, 7, 1, 2]))
    return path


def test_a_history_is_that_of_the_user_in_the_order_it_was_written(users_file: Path) -> None:
    assert user_history(users_file, 2) == [30, 10, 20]
    assert user_history(users_file, 5) == [7]
    assert user_history(users_file, 9) == [1, 2]


def test_an_unknown_user_has_no_history(users_file: Path) -> None:
    for user in (0, 3, 10, 1 << 40):
        assert user_history(users_file, user) is None


def test_the_file_holds_int64_and_text(users_file: Path) -> None:
    tensors = safetensors.numpy.load_file(users_file)
    assert tensors.pop("features").tobytes() == b"{}{}{}"
    assert {one.dtype for one in tensors.values()} == {np.dtype(np.int64)}


def test_features_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "users.safetensors"
    features: list[dict[str, FeatureValues]] = [
        {"tags": WeightedIds(("ü", "noir"), (2.0, 0.5)), "activity": (3.5, 1.0)},
        {},
    ]
    write_users(path, np.array([2, 2, 5]), np.array([30, 10, 7]), features)
    assert read_user(path, 2) == ([30, 10], features[0])
    assert read_user(path, 5) == ([7], {})
    assert read_user(path, 3) is None


def test_a_file_of_an_older_version_has_no_features(users_file: Path) -> None:
    tensors = safetensors.numpy.load_file(users_file)
    older = {name: one for name, one in tensors.items() if "feature" not in name}
    safetensors.numpy.save_file(older, users_file)
    assert read_user(users_file, 9) == ([1, 2], {})


def test_a_missing_file_names_the_options_that_help(tmp_path: Path) -> None:
    missing = tmp_path / "users.safetensors"
    with pytest.raises(
        CommandError, match=f"--user needs .* {missing} is missing: .*--state.*--hi"
    ):
        user_history(missing, 1)


def test_a_damaged_file_says_what_to_do(users_file: Path) -> None:
    users_file.write_bytes(b"no tensors")
    with pytest.raises(CommandError, match="run `silvershard publish` again, or use --history"):
        user_history(users_file, 1)


def test_all_users_are_listed(users_file: Path, tmp_path: Path) -> None:
    assert read_user_ids(users_file) == [2, 5, 9]
    assert read_user_ids(tmp_path / "none") == []
    users_file.write_bytes(b"x")
    with pytest.raises(CommandError, match=f"{users_file} cannot be read"):
        read_user_ids(users_file)
