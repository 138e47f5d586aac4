"""A repository of generations: a directory with one snapshot per published generation."""

import re
from pathlib import Path

_NAME = re.compile(r"gen-(\d{6,})")


def generation_dir(repository: Path, generation: int) -> Path:
    """Return the directory of a generation, whether it is published or not."""
    return repository / f"gen-{generation:06d}"


def list_generations(repository: Path) -> list[int]:
    """Return the generations published in a repository, ascending; unfinished ones do not count."""
    if not repository.is_dir():
        return []
    names = [_NAME.fullmatch(entry.name) for entry in repository.iterdir()]
    return sorted(int(name[1]) for name in names if name)
