import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.update_log import NewRecord, open_log
from silvershard.deploy import snapshots
from silvershard.deploy.config import Config, load
from silvershard.deploy.control_store import ControlStore, wanted
from silvershard.deploy.errors import CommandError, ExitCode, Refused
from silvershard.deploy.log_pins import log_url, pin_generations
from silvershard.deploy.state import StateDir
from silvershard.shard.errors import SnapshotError
from silvershard.shard.generations import generation_dir, list_generations
from silvershard.shard.snapshot import canonical, open_snapshot


@pytest.fixture
def config() -> Config:
    return load(None, environ={})


def renumbered(source: Path, repository: Path, generation: int) -> Path:
    """Copy a generation under another number, as if it had been published again."""
    path = Path(shutil.copytree(source, generation_dir(repository, generation)))
    document = json.loads((path / "manifest.json").read_bytes())
    del document["checksum"]
    document["spec"]["generation"] = generation
    document["checksum"] = hashlib.sha256(canonical(document)).hexdigest()
    (path / "manifest.json").write_bytes(canonical(document))
    return path


@pytest.fixture
def state(tmp_path: Path, generation: Any) -> StateDir:
    made = StateDir(tmp_path / "s")
    made.create()
    for number in (1, 2, 3, 4, 5):
        renumbered(generation.path, made.generations, number)
    return made


def test_the_list_says_what_every_generation_is(state: StateDir) -> None:
    store = ControlStore(state.control_file)
    store.change(lambda now: now.pointed("live", 2).pointed("live", 3).pointed("canary", 5))
    store.change(lambda now: now.with_operation(wanted("activate", 4, "live")))
    document = snapshots.listing(state)
    found = {one["generation"]: one for one in document["snapshots"]}
    assert {number: one["state"] for number, one in found.items()} == {
        **{1: "", 2: "previous", 3: "live"},
        **{4: "staged", 5: "canary"},
    }
    assert (found[3]["documents"], found[3]["cut"], found[3]["log_id"]) == (600, [], 0)
    manifest = open_snapshot(state.generations / "gen-000003").manifest
    assert found[3]["content_hash"] == manifest.content_hash
    files = (state.generations / "gen-000003").rglob("*")
    assert found[3]["bytes"] == sum(one.stat().st_size for one in files if one.is_file())
    assert found[3]["age_s"] >= 0
    (state.generations / "gen-000001" / "manifest.json").write_text("{")
    shown = snapshots.render_listing(snapshots.listing(state))
    assert "manifest.json is damaged" in shown
    assert manifest.content_hash[:12] in shown
    assert snapshots.render_listing(snapshots.listing(StateDir(state.root / "no"))).endswith(
        "no generation is published"
    )


def test_a_generation_goes_to_a_url_and_comes_back(state: StateDir, tmp_path: Path) -> None:
    url, heard = str(tmp_path / "copies"), list[str]()
    ControlStore(state.control_file).change(lambda now: now.pointed("live", 2))
    dry = snapshots.push(state, url, None, dry_run=True, report=heard.append)
    assert (dry["generation"], dry["present"], dry["done"]) == (2, False, False)
    assert "would be copied" in snapshots.render_copied(dry)
    pushed = snapshots.push(state, url, None, dry_run=False, report=heard.append)
    assert pushed["copied"] == pushed["files"] == len(heard)
    again = snapshots.push(state, url, 0, dry_run=False, report=heard.append)
    assert (again["generation"], again["copied"]) == (5, 0)
    other = StateDir(tmp_path / "other")
    dry = snapshots.restore(other, url, 0, dry_run=True, report=heard.append)
    assert (dry["generation"], dry["present"]) == (5, False)
    restored = snapshots.restore(other, url, 0, dry_run=False, report=heard.append)
    assert (restored["generation"], restored["copied"]) == (5, pushed["files"])
    assert list_generations(other.generations) == [5]
    open_snapshot(other.generations / "gen-000005").verify()
    assert snapshots.restore(other, url, 2, dry_run=False, report=print)["copied"] == 0
    shown = snapshots.render_copied(restored)
    assert f"{pushed['files']} of {pushed['files']} files had to be copied" in shown


def test_an_empty_url_and_a_busy_directory_are_said(state: StateDir, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="holds no generation: copy one with"):
        snapshots.restore(state, str(tmp_path / "empty"), 0, dry_run=False, report=print)
    url = str(tmp_path / "copies")
    snapshots.push(state, url, 1, dry_run=False, report=print)
    with state.working("publish"), pytest.raises(Refused, match=r"restore on .* is refused"):
        snapshots.restore(state, url, 1, dry_run=False, report=print)


def test_only_old_generations_that_nobody_uses_are_removed(state: StateDir, config: Config) -> None:
    store = ControlStore(state.control_file)
    store.change(lambda now: now.pointed("live", 1).pointed("live", 2))
    dry = snapshots.prune(state, config, 1, dry_run=True)
    assert (dry["removed"], dry["kept"], dry["done"]) == ([3, 4], [1, 2, 5], False)
    assert list_generations(state.generations) == [1, 2, 3, 4, 5]
    assert snapshots.render_pruned(dry) == "would remove 3, 4, kept 1, 2, 5"
    store.change(lambda now: now.with_operation(wanted("activate", 3, "live")))
    done = snapshots.prune(state, config, 1, dry_run=False)
    assert (done["removed"], done["kept"]) == ([4], [1, 2, 3, 5])
    assert list_generations(state.generations) == [1, 2, 3, 5]
    assert sorted(one.name for one in state.generations.iterdir()) == [
        f"gen-{number:06d}" for number in (1, 2, 3, 5)
    ]
    with pytest.raises(CommandError, match="at least 1 generation must be kept, got 0") as refused:
        snapshots.prune(state, config, 0, dry_run=False)
    assert refused.value.exit_code == ExitCode.USAGE


def test_the_log_forgets_what_no_kept_generation_needs(
    state: StateDir, config: Config, tmp_path: Path
) -> None:
    log = open_log(log_url(state, config))
    epoch = log.acquire(0)
    log.append(0, epoch, [NewRecord(one, 1, False, False, 0, b"x") for one in range(30)], 1)
    path = state.generations / "gen-000005" / "manifest.json"
    document = json.loads(path.read_bytes())
    path.write_text(json.dumps({**document, "log_id": log.log_id, "cut": [12]}))
    pin_generations(log, state.generations)
    ControlStore(state.control_file).change(lambda now: now.pointed("live", 4))
    assert snapshots.prune(state, config, 1, dry_run=False)["log_start"] == [0]
    ControlStore(state.control_file).change(
        lambda now: now.model_copy(update={"live": 5, "previous": 0})
    )
    done = snapshots.prune(state, config, 1, dry_run=False)
    assert (done["kept"], done["log_start"]) == ([5], [12])
    assert (log.start(0), log.pins()) == (12, {"gen-000005": (12,)})
    assert "the update log begins after 12" in snapshots.render_pruned(done)
    log.close()


def test_a_damaged_generation_is_not_pushed(state: StateDir, tmp_path: Path) -> None:
    (state.generations / "gen-000001" / "dense.safetensors").write_bytes(b"x")
    with pytest.raises(SnapshotError, match=r"dense\.safetensors is damaged"):
        snapshots.push(state, str(tmp_path / "copies"), 1, dry_run=False, report=print)
