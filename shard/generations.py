"""A repository of generations: a directory with one snapshot per published generation."""

import json
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
    numbers = [number_of(entry.name) for entry in repository.iterdir()]
    return sorted(number for number in numbers if number is not None)


def number_of(name: str) -> int | None:
    """Return the generation whose directory has this name; None if it is no such name."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def stored_files(repository: Path) -> dict[str, Path]:
    """Return a file for every content that the generations of a repository hold, by SHA-256.

    The manifests are taken at their word, and one that cannot be read holds nothing: whoever uses a
    file compares it with the hash.
    """
    found: dict[str, Path] = {}
    for generation in list_generations(repository):
        directory = generation_dir(repository, generation)
        try:
            files = json.loads((directory / "manifest.json").read_bytes())["files"]
            found |= {entry["sha256"]: directory / name for name, entry in files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found
