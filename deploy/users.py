"""The histories of the users of a data set, for ``query --user``.

Shapes: R ratings.
"""

from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from silvershard.deploy.errors import CommandError
from silvershard.deploy.state import write_atomic


def write_users(path: Path, user_ids: NDArray[np.int64], item_ids: NDArray[np.int64]) -> None:
    """Write the items of each user.

    Args:
        path: of the file.
        user_ids: ``(R,)`` int64, ascending.
        item_ids: ``(R,)`` int64, those of each user oldest first.
    """
    users, starts = np.unique(user_ids, return_index=True)
    content = safetensors.numpy.save(
        {
            "user_ids": users.astype(np.int64),
            "offsets": np.append(starts, len(user_ids)).astype(np.int64),
            "movie_ids": np.ascontiguousarray(item_ids),
        }
    )
    write_atomic(path, content)


def user_history(path: Path, user: int) -> list[int] | None:
    """Return the items of a user, oldest first, or None if nobody has that id.

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
            return history
    except (OSError, safetensors.SafetensorError) as error:
        raise CommandError(
            f"{path} cannot be read: {error}; run `silvershard publish` again, or use --history"
        ) from None
