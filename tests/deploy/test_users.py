from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from silvershard.deploy.errors import CommandError
from silvershard.deploy.users import user_history, write_users


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


def test_the_file_holds_int64(users_file: Path) -> None:
    tensors = safetensors.numpy.load_file(users_file)
    assert {one.dtype for one in tensors.values()} == {np.dtype(np.int64)}


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
