import argparse
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from silvershard.deploy import recluster, verbs
from silvershard.deploy.cluster_size import ClusterSize, Scaled
from silvershard.deploy.config import Config
from silvershard.deploy.errors import CommandError, ExitCode, TimedOut
from silvershard.deploy.state import StateDir
from silvershard.model.request import WeightedIds
from silvershard.shard.errors import DeadlineExceeded, RemoteError, SnapshotError
from silvershard.shard.generations import generation_dir


class Run(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Run]


@pytest.fixture(autouse=True)
def _own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("SILVERSHARD"):
            monkeypatch.delenv(name)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process."""

    def run(*arguments: str) -> Run:
        try:
            code = verbs.run(arguments)
        except SystemExit as error:
            code = int(error.code or 0)
        return Run(code, *capsys.readouterr())

    return run


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def failed(run: Run, code: int) -> str:
    """Return the one line of a failure."""
    assert run.code == code, run
    assert run.out == ""
    assert run.err.startswith("silvershard: ")
    assert run.err.count("\n") == 1
    assert "Traceback" not in run.err
    return run.err


def test_a_port_in_use_is_named(command: Command, taken_port: int) -> None:
    said = failed(command("up", "--listen", f"127.0.0.1:{taken_port}"), 1)
    assert f"cannot listen on 127.0.0.1:{taken_port}: address already in use" in said
    assert "choose another with --listen" in said


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "[::]", "example.org"])
def test_an_address_that_others_can_reach_is_refused(command: Command, host: str) -> None:
    said = failed(command("up", "--listen", f"{host}:8001"), 4)
    assert "listen.host must be a loopback address without security.tls" in said
    assert "--insecure" in said


def test_insecure_allows_the_address(command: Command) -> None:
    said = failed(command("up", "--listen", "0.0.0.0:0", "--insecure"), 1)
    assert "no generation is published" in said


def test_a_second_up_is_refused_naming_the_first(command: Command, tmp_path: Path) -> None:
    state = StateDir(tmp_path / "s")
    state.create()
    generation_dir(state.generations, 1).mkdir(parents=True)
    lock = state.lock()
    said = failed(command("up", "--state", str(tmp_path / "s"), "--listen", "127.0.0.1:0"), 4)
    assert f"a cluster runs on {tmp_path / 's'} already" in said
    os.close(lock)


def test_nothing_published_says_what_to_run(command: Command) -> None:
    said = failed(command("up", "--listen", "127.0.0.1:0"), 1)
    assert "run `silvershard train` and then `silvershard publish`" in said


def test_an_unknown_generation_is_named(command: Command, tmp_path: Path) -> None:
    state = StateDir(tmp_path / ".silvershard")
    for generation in (1, 2):
        generation_dir(state.generations, generation).mkdir(parents=True)
    said = failed(command("up", "--listen", "127.0.0.1:0", "--generation", "7"), 1)
    assert "generation 7 is not published" in said
    assert "there are 1, 2" in said


def test_an_unknown_key_is_named_with_its_line(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("query:\n  max_batch: 5\n  min_coverag: 1\n")
    said = failed(command("config", "show", "--config", str(path)), 2)
    assert f"{path}, line 3: query.min_coverag: unknown key; did you mean min_coverage?" in said


def test_the_file_in_the_state_directory_is_read(command: Command, tmp_path: Path) -> None:
    (tmp_path / ".silvershard").mkdir()
    (tmp_path / ".silvershard" / "config.yaml").write_text("sharding: {shards: 5}\n")
    assert "  shards: 5\n" in command("config", "show").out


def test_a_bad_data_path_is_named(command: Command, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    said = failed(command("train", "--data", str(missing)), 1)
    assert f"{missing}: does not exist; required is a MovieLens folder or zip" in said


def test_data_without_ratings_are_named(command: Command, tmp_path: Path) -> None:
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n1,Heat (1995),Action\n")
    said = failed(command("demo", "--data", str(tmp_path), "--listen", "127.0.0.1:0"), 1)
    assert f"{tmp_path / 'ratings.csv'}: is missing" in said


def test_publish_plans_for_as_many_shards_as_the_cluster_was_scaled_to(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = StateDir(tmp_path / ".silvershard")
    state.create()
    before = ClusterSize(shards=2, replicas=1)
    scaled = Scaled(size=ClusterSize(shards=100, replicas=1), instead_of=before)
    state.control.change(lambda now: now.model_copy(update={"scaled": scaled}))

    def republish(state: StateDir, config: Config, *_: object, **__: object) -> None:
        raise CommandError(f"for {config.sharding.shards} shards")

    monkeypatch.setattr(recluster, "republish", republish)
    assert "for 100 shards" in failed(command("publish", "--recluster"), 1)


def test_publish_without_a_model_says_what_to_run(command: Command) -> None:
    assert "run `silvershard train`" in failed(command("publish"), 1)


def test_query_without_a_cluster_says_what_to_run(command: Command) -> None:
    assert "start one with `silvershard up`" in failed(command("query", "--user", "1"), 1)


def test_query_without_a_router_at_the_address_fails_clearly(
    command: Command, taken_port: int
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    said = failed(command("query", "--history", "1", "--address", address, "--timeout", "2"), 1)
    assert "UNAVAILABLE" in said


def test_a_user_without_histories_is_told_which_options_help(command: Command) -> None:
    said = failed(command("query", "--user", "1", "--address", "127.0.0.1:1"), 1)
    assert "--user needs the histories" in said
    assert "--state" in said
    assert "--history" in said


def test_down_without_a_cluster_is_no_error(command: Command, tmp_path: Path) -> None:
    for _ in range(2):
        run = command("down")
        assert (run.code, run.err) == (0, "")
        assert run.out == f"nothing is running on {tmp_path / '.silvershard'}\n"


def test_status_without_a_cluster_fails(command: Command, tmp_path: Path) -> None:
    run = command("status", "--output", "json")
    assert run.code == 1
    assert json.loads(run.out) == {"state": "down", "state_dir": str(tmp_path / ".silvershard")}
    assert command("status").out == f"{tmp_path / '.silvershard'}: nothing is running\n"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("fly",),
        ("up", "--generation", "0"),
        ("up", "--generation", "x"),
        ("up", "--listen", "8001"),
        ("up", "--listen", "127.0.0.1:99999"),
        ("up", "--timeout", "0"),
        ("up", "--timeout", "nan"),
        ("query",),
        ("query", "--user", "1", "--history", "1"),
        ("query", "--history", "1,x"),
        ("query", "--history", "1:x"),
        ("config",),
        ("status", "--output", "xml"),
    ],
)
def test_wrong_usage_has_its_exit_code(command: Command, arguments: tuple[str, ...]) -> None:
    run = command(*arguments)
    assert run.code == 2
    assert "usage: silvershard" in run.err


def test_bad_settings_from_options_are_wrong_usage(command: Command) -> None:
    said = failed(command("up", "--shards", "0"), 2)
    assert "sharding.shards: input should be greater than or equal to 1, got 0" in said


def test_a_bad_parameter_is_named(command: Command) -> None:
    said = failed(command("query", "--history", "1", "--param", "x", "--address", "a:1"), 2)
    assert "--param must be name=value, got 'x'" in said


def test_a_bad_feature_is_named(command: Command) -> None:
    said = failed(command("query", "--history", "1:2", "--feature", "x", "--address", "a:1"), 2)
    assert "--feature must be name=value, got 'x'" in said


def test_a_history_may_have_weights() -> None:
    options = verbs._arguments().parse_args(["query", "--history", "7:0.5,9, 4:-2"])
    assert options.history == WeightedIds([7, 9, 4], [0.5, 1.0, -2.0])


def test_the_schema_is_json(command: Command) -> None:
    assert json.loads(command("config", "schema").out) == Config.model_json_schema()


def test_settings_can_be_shown_as_json(command: Command) -> None:
    shown = json.loads(command("config", "show", "--output", "json").out)
    assert Config.model_validate_json(json.dumps(shown)) == Config()


def test_the_version_is_printed(command: Command) -> None:
    assert command("version").out == "silvershard 0.1.0\n"
    assert json.loads(command("version", "--output", "json").out) == {"version": "0.1.0"}


def test_the_state_variable_names_the_directory(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SILVERSHARD_STATE", str(tmp_path / "elsewhere"))
    assert str(tmp_path / "elsewhere") in command("status").out


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
def test_a_signal_ends_a_command_with_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    def interrupted(options: object) -> int:
        signal.raise_signal(number)
        raise AssertionError("the signal was ignored")

    monkeypatch.setattr(verbs, "_version", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    failed(command("version"), code)
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_mark_under_a_filter_is_left_to_the_position(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(options: object) -> int:
        raise RemoteError("INVALID_ARGUMENT", "filter: position 5: expected ':'\na b c\n     ^")

    monkeypatch.setattr(verbs, "_version", refused)
    assert failed(command("version"), 2) == (
        "silvershard: INVALID_ARGUMENT: filter: position 5: expected ':'\n"
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RemoteError("DEADLINE_EXCEEDED", "x"), 5),
        (RemoteError("UNAVAILABLE", "x"), 1),
        (RemoteError("NOT_FOUND", "x"), 2),
        (DeadlineExceeded("x"), 5),
        (TimedOut("x"), 5),
        (SnapshotError("/g", "x"), 1),
        (FileNotFoundError(2, "No such file", "/x"), 1),
    ],
)
def test_every_error_has_its_exit_code(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fail(options: object) -> int:
        raise error

    monkeypatch.setattr(verbs, "_version", fail)
    assert "x" in failed(command("version"), code)


def test_the_operations_page_has_every_verb_option_and_exit_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    parser = verbs._arguments()
    (commands,) = [one for one in parser._actions if isinstance(one.choices, dict)]
    assert isinstance(commands.choices, dict)
    for name, verb in commands.choices.items():
        assert f"`{name}" in page
        for action in verb._actions:
            if action.option_strings and action.dest not in ("help", "address", "devices"):
                assert action.option_strings[-1] in page, (name, action.dest)
    for code in ExitCode:
        assert f"| {int(code)} | " in page


def test_a_reader_that_leaves_is_no_stack_trace() -> None:
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "silvershard.deploy.cli", "config", "show"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(("rejected", "code"), [(0, ExitCode.OK), (3, ExitCode.DEGRADED)])
def test_an_ingest_with_rejected_records_is_degraded(
    tmp_path: Path, rejected: int, code: ExitCode
) -> None:
    options = argparse.Namespace(state=tmp_path, output="json", address="")
    found = verbs._changed(lambda *_: {"rejected": rejected}, lambda _: "", options)
    assert found == code
