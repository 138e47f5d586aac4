"""The histories and features of the users of a data set, for ``query --user``.

Shapes: R ratings, U users.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from silvershard.deploy.errors import CommandError
from silvershard.deploy.feature_json import from_json, to_json
from silvershard.deploy.state import write_atomic
from silvershard.model.request import FeatureValues


def write_users(
    path: Path,
    user_ids: NDArray[np.int64],
    item_ids: NDArray[np.int64],
    features: Sequence[Mapping[str, FeatureValues]] = (),
) -> None:
    """Write the items of each user, and the further features.

    Args:
        path: of the file.
        user_ids: ``(R,)`` int64, ascending.
        item_ids: ``(R,)`` int64, those of each user oldest first.
        features: of each of the U users, in the order of their ids; none: nobody has any.
    """
    users, starts = np.unique(user_ids, return_index=True)
    texts = [
        json.dumps({name: to_json(values) for name, values in one.items()}).encode()
        for one in features or [{}] * len(users)
    ]
    ends = np.cumsum(np.array([0, *map(len, texts)], dtype=np.int64))
    content = safetensors.numpy.save(
        {
            "user_ids": users.astype(np.int64),
            "offsets": np.append(starts, len(user_ids)).astype(np.int64),
            "movie_ids": np.ascontiguousarray(item_ids),
            "features": np.frombuffer(b"".join(texts), dtype=np.uint8),
            "feature_offsets": ends,
        }
    )
    write_atomic(path, content)


def user_history(path: Path, user: int) -> list[int] | None:
    """Return the items of a user, oldest first, or None if nobody has that id.

    Raises:
        CommandError: as ``read_user``.
    """
    found = read_user(path, user)
    return None if found is None else found.history


def read_user_ids(path: Path) -> list[int]:
    """Return the ids of all users in the file, ascending; none where there is no file.

    Raises:
        CommandError: if it is damaged.
    """
    if not path.is_file():
        return []
    try:
        with safetensors.safe_open(path, framework="np") as file:
            ids: list[int] = file.get_tensor("user_ids").tolist()
            return ids
    except (OSError, safetensors.SafetensorError) as error:
        raise CommandError(
            f"{path} cannot be read: {error}; run `silvershard publish` again"
        ) from None


class StoredUser(NamedTuple):
    """What the file knows of a user."""

    history: list[int]
    """Items, oldest first."""
    features: dict[str, FeatureValues]


def read_user(path: Path, user: int) -> StoredUser | None:
    """Return what is known of a user, or None if nobody has that id.

    Raises:
        CommandError: if the file is missing or damaged.
    """
    if not path.is_file():
        raise CommandError(
            f"--user needs the histories that `silvershard publish` writes, and {path} is missing: "
            "name that state directory with --state, or give the history itself with --history"
        )
    try:
        with safetensors.safe_open(path, framework="np") as file:
            users = file.get_tensor("user_ids")
            at = int(np.searchsorted(users, user))
            if at == len(users) or users[at] != user:
                return None
            low, high = file.get_slice("offsets")[at : at + 2].tolist()
            history: list[int] = file.get_slice("movie_ids")[low:high].tolist()
            features: dict[str, Any] = {}
            if "features" in file.keys():  # noqa: SIM118, a file is no mapping
                low, high = file.get_slice("feature_offsets")[at : at + 2].tolist()
                features = json.loads(file.get_slice("features")[low:high].tobytes())
            return StoredUser(
                history, {name: from_json(values) for name, values in features.items()}
            )
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CommandError(
            f"{path} cannot be read: {error}; run `silvershard publish` again, or use --history"
        ) from None
