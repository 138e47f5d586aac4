"""Releases of silvershard as the hosts of the tests have them installed: copies of this tree."""

import shutil
from pathlib import Path

import silvershard.deploy

_PARTS = ("cluster", "deploy", "kernels", "model", "shard")

# Fields before which the next release has one more, in documents and in settings.
_FIRST = {
    "cluster/shard_map.py": "    shard: int = Field(",
    "cluster/config.py": "    map_path: str = Field(",
    "deploy/cluster_store.py": "    beat: int = Field(",
    "deploy/control_store.py": "    live: int = Field(",
    "deploy/state.py": "    guard: Process = Field(",
}
_FIELD = '    added: str = Field(default="by the next release", description="for the test")\n'


class Installed:
    """A folder for ``PYTHONPATH``, in which one release takes the place of another."""

    def __init__(self, root: Path, release: str) -> None:
        """Install this tree as a release."""
        self.path = root / "installed"
        self._root = root
        (self.path / "silvershard-0.dist-info").mkdir(parents=True)
        self.install(release)

    def install(self, release: str, *, is_next: bool = False) -> None:
        """Install this tree, or what a later release could be."""
        folder = self._root / "releases" / release
        tree = Path(next(iter(silvershard.deploy.__path__))).resolve().parent
        for part in _PARTS:
            shutil.copytree(tree / part, folder / part)
        for name, field in _FIRST.items() if is_next else ():
            text = (folder / name).read_text()
            assert text.count(field) == 1
            (folder / name).write_text(text.replace(field, _FIELD + field))
        (self.path / "coming").symlink_to(folder)
        (self.path / "coming").rename(self.path / "silvershard")
        metadata = f"Metadata-Version: 2.4\nName: silvershard\nVersion: {release}\n"
        (self.path / "silvershard-0.dist-info" / "METADATA").write_text(metadata)
