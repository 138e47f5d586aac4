from silvershard.deploy.ray_shard import innermost

REMOTE = """\
The actor died because of an error raised in its creation task, ray::ShardActor.__init__()
  File "/x/cluster/shard_actor.py", line 50, in __init__
    executor = load_executor(Path(snapshot), shard, num_shards, devices=devices)
  File "/x/shard/snapshot.py", line 300, in _verified
    raise SnapshotError(str(self.path), f"{name} is missing")
silvershard.shard.errors.SnapshotError: snapshot /g: tables/movie.safetensors is missing
"""


def test_the_reason_of_a_remote_error_is_its_last_line() -> None:
    assert innermost(REMOTE) == "snapshot /g: tables/movie.safetensors is missing"
    assert innermost(REMOTE + "\nmore words: here\n") == (
        "snapshot /g: tables/movie.safetensors is missing"
    )


def test_without_an_error_of_ours_the_last_line_is_given() -> None:
    assert innermost("a\n  b: c \n\n") == "b: c"
    assert innermost("") == "no reason was given"
