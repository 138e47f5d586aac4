import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.update_log import NewRecord, open_log
from silvershard.deploy import snapshots
from silvershard.deploy.config import Config, load
from silvershard.deploy.control_store import wanted
from silvershard.deploy.errors import CommandError, ExitCode, NotPublished, Refused
from silvershard.deploy.log_pins import pin_generation, pin_generations
from silvershard.deploy.state import StateDir
from silvershard.deploy.state_log import log_url, made_log
from silvershard.shard.errors import SnapshotError
from silvershard.shard.generations import generation_dir, list_generations
from silvershard.shard.outline import read_outline
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
    store = state.control
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


def test_a_generation_goes_to_a_url_and_comes_back(
    state: StateDir, config: Config, tmp_path: Path
) -> None:
    url, heard = str(tmp_path / "copies"), list[str]()
    state.control.change(lambda now: now.pointed("live", 2))
    dry = snapshots.push(state, url, None, dry_run=True, report=heard.append)
    assert (dry["generation"], dry["present"], dry["done"]) == (2, False, False)
    assert "would be copied" in snapshots.render_copied(dry)
    pushed = snapshots.push(state, url, None, dry_run=False, report=heard.append)
    assert pushed["copied"] == pushed["files"] == len(heard)
    again = snapshots.push(state, url, 0, dry_run=False, report=heard.append)
    assert (again["generation"], again["copied"]) == (5, 0)
    other = StateDir(tmp_path / "other")
    dry = snapshots.restore(other, config, url, 0, dry_run=True, report=heard.append)
    assert (dry["generation"], dry["present"]) == (5, False)
    restored = snapshots.restore(other, config, url, 0, dry_run=False, report=heard.append)
    assert (restored["generation"], restored["copied"]) == (5, pushed["files"])
    assert list_generations(other.generations) == [5]
    open_snapshot(other.generations / "gen-000005").verify()
    assert snapshots.restore(other, config, url, 2, dry_run=False, report=print)["copied"] == 0
    shown = snapshots.render_copied(restored)
    assert f"{pushed['files']} of {pushed['files']} files had to be copied" in shown


def test_an_empty_url_and_a_busy_directory_are_said(
    state: StateDir, config: Config, tmp_path: Path
) -> None:
    with pytest.raises(CommandError, match="holds no generation: copy one with"):
        snapshots.restore(state, config, str(tmp_path / "empty"), 0, dry_run=False, report=print)
    url = str(tmp_path / "copies")
    snapshots.push(state, url, 1, dry_run=False, report=print)
    with pytest.raises(NotPublished, match=r"holds no generation 9; there is 1$"):
        snapshots.restore(state, config, url, 9, dry_run=False, report=print)
    with state.working("publish"), pytest.raises(Refused, match=r"restore on .* is refused"):
        snapshots.restore(state, config, url, 1, dry_run=False, report=print)


def test_only_old_generations_that_nobody_uses_are_removed(state: StateDir, config: Config) -> None:
    store = state.control
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
    pin_generations(log, state)
    state.control.change(lambda now: now.pointed("live", 4))
    assert snapshots.prune(state, config, 1, dry_run=False)["log_start"] == [0]
    state.control.change(lambda now: now.model_copy(update={"live": 5, "previous": 0}))
    done = snapshots.prune(state, config, 1, dry_run=False)
    assert (done["kept"], done["log_start"]) == ([5], [12])
    state_id = state.control.read().state_id
    assert (log.start(0), log.pins()) == (12, {f"{state_id}/gen-000005": (12,)})
    assert "the update log begins after 12" in snapshots.render_pruned(done)
    log.close()


def test_a_damaged_generation_is_not_pushed(state: StateDir, tmp_path: Path) -> None:
    (state.generations / "gen-000001" / "dense.safetensors").write_bytes(b"x")
    with pytest.raises(SnapshotError, match=r"dense\.safetensors is damaged"):
        snapshots.push(state, str(tmp_path / "copies"), 1, dry_run=False, report=print)


def sealed(path: Path, **changes: Any) -> None:
    """Write a manifest with other settings and the checksum that goes with them."""
    document = json.loads((path / "manifest.json").read_bytes()) | changes
    del document["checksum"]
    document["checksum"] = hashlib.sha256(canonical(document)).hexdigest()
    (path / "manifest.json").write_bytes(canonical(document))


def filled(state: StateDir, config: Config) -> Any:
    """Return the log of a state directory, with 30 records."""
    outline = read_outline(state.generations / "gen-000001")
    log = made_log(state, config, outline)
    epoch = log.acquire(0)
    log.append(0, epoch, [NewRecord(one, 1, False, False, 0, b"x") for one in range(30)], 1)
    return log


def test_what_is_restored_keeps_the_log_from_its_cut(
    state: StateDir, config: Config, tmp_path: Path
) -> None:
    log, url = filled(state, config), str(tmp_path / "copies")
    sealed(state.generations / "gen-000005", log_id=log.log_id, cut=[12])
    snapshots.push(state, url, 5, dry_run=False, report=print)
    other = StateDir(tmp_path / "other")
    same = load(None, environ={}, options={"updates.log": f"sqlite:///{state.updates_file}"})
    snapshots.restore(other, same, url, 5, dry_run=False, report=print)
    own = other.control.read()
    assert own.log_id == log.log_id
    assert log.pins() == {f"{own.state_id}/gen-000005": (12,)}
    assert log.trim(0, 30) == 12
    log.close()


def test_a_copy_whose_updates_the_log_has_forgotten_is_refused_before_it_is_copied(
    state: StateDir, config: Config, tmp_path: Path
) -> None:
    log, url, heard = filled(state, config), str(tmp_path / "copies"), list[str]()
    sealed(state.generations / "gen-000005", log_id=log.log_id, cut=[12])
    snapshots.push(state, url, 5, dry_run=False, report=print)
    # Copies at a URL hold no pin.
    assert log.trim(0, 20) == 20
    log.close()
    other = StateDir(tmp_path / "other")
    same = load(None, environ={}, options={"updates.log": f"sqlite:///{state.updates_file}"})
    for dry_run in (True, False):
        with pytest.raises(Refused, match=r"beyond position 12 of .* trimmed up to 20") as refused:
            snapshots.restore(other, same, url, 5, dry_run=dry_run, report=heard.append)
        assert refused.value.exit_code == ExitCode.REFUSED
    assert list_generations(other.generations) == []
    assert heard == []


def test_a_copy_of_another_log_is_refused_until_that_log_is_left(
    state: StateDir, config: Config, tmp_path: Path
) -> None:
    url, heard = str(tmp_path / "copies"), list[str]()
    sealed(state.generations / "gen-000005", log_id=4711, cut=[12])
    snapshots.push(state, url, 5, dry_run=False, report=print)
    fresh = StateDir(tmp_path / "fresh")
    snapshots.restore(fresh, config, url, 5, dry_run=False, report=heard.append)
    assert heard[0] == (
        "generation 5 holds updates of log 4711, which is not here: name it with updates.log "
        "before the next `silvershard up`"
    )
    shutil.rmtree(state.generations / "gen-000005")
    log = filled(state, config)
    snapshots.restore(state, config, url, 5, dry_run=True, new_log=True, report=print)
    with pytest.raises(Refused, match=rf"holds updates of log 4711, .* is log {log.log_id}"):
        snapshots.restore(state, config, url, 5, dry_run=False, report=print)
    assert 5 not in list_generations(state.generations)
    lock = state.lock()
    with pytest.raises(Refused, match="a cluster runs on"):
        snapshots.restore(state, config, url, 5, dry_run=False, new_log=True, report=print)
    os.close(lock)
    heard.clear()
    snapshots.restore(state, config, url, 5, dry_run=False, new_log=True, report=heard.append)
    assert heard[-1].startswith("generation 5 goes on without what update log 4711 holds beyond 12")
    assert open_snapshot(state.generations / "gen-000005").manifest.log_id == 0
    # Once more is as good: what was cut off here is what shall come of it.
    snapshots.restore(state, config, url, 5, dry_run=False, new_log=True, report=print)
    assert open_snapshot(state.generations / "gen-000005").manifest.log_id == 0
    with pytest.raises(SnapshotError, match="must go on in log 4711 from 12 like that of"):
        snapshots.restore(state, config, url, 5, dry_run=False, report=print)
    # All that its new log holds will be replayed into it.
    state_id = state.control.read().state_id
    assert log.pins() == {f"{state_id}/gen-000005": (0,)}
    log.close()


def test_nothing_is_removed_while_the_log_is_gone(state: StateDir, config: Config) -> None:
    log = filled(state, config)
    pin_generations(log, state)
    log.close()
    state.updates_file.unlink()
    with pytest.raises(Refused, match=f"update log {log.log_id} of .* is gone"):
        snapshots.prune(state, config, 1, dry_run=False)
    assert list_generations(state.generations) == [1, 2, 3, 4, 5]


def test_what_a_lost_state_directory_kept_of_the_log_is_released(
    state: StateDir, config: Config, tmp_path: Path
) -> None:
    log = filled(state, config)
    lost = StateDir(tmp_path / "lost")
    lost.create()
    pin_generation(log, lost, 3, (7,))
    name = lost.control.read().state_id
    done = snapshots.prune(state, config, 5, dry_run=False)
    assert done["other_pins"] == {name: {3: (7,)}}
    shown = snapshots.render_pruned(done)
    assert f"state directory {name} keeps it for its generations 3" in shown
    released = snapshots.unpin(state, config, name)
    assert released == {"state_id": name, "released": 1, "done": True}
    assert f"released 1 pins of state directory {name}" in snapshots.render_unpinned(released)
    with pytest.raises(CommandError, match=f"has no pins of a state directory {name}"):
        snapshots.unpin(state, config, name)
    assert snapshots.prune(state, config, 5, dry_run=False)["other_pins"] == {}
    log.close()
    none = StateDir(tmp_path / "none")
    none.create()
    with pytest.raises(CommandError, match="there is no update log in"):
        snapshots.unpin(none, config, name)
