"""What people copy to launch a cluster, held against what the program and Ray really have."""

import http.client
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from silvershard.cluster.config import ListenSection, ObservabilitySection, RouterConfig
from silvershard.cluster.router import Router
from silvershard.deploy import verbs
from silvershard.deploy.config import Config, load
from silvershard.deploy.doctor import RAY_HEAD_BYTES, RAY_NODE_BYTES, Stock, needed_memory
from silvershard.deploy.doctor_software import GCS_PATH, GCS_STORAGE, RAY_SETTINGS
from silvershard.deploy.errors import ExitCode

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]
DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
UNIT = ROOT / "deploy/systemd/silvershard.service"
KUBERAY = ROOT / "deploy/kuberay/raycluster.yaml"
RAY_UP = sorted((ROOT / "deploy/ray").glob("*.yaml"))
PAGE = ROOT / "docs/launching.md"
COPIED = [KUBERAY, UNIT, *RAY_UP]
LAUNCH_FILES = [DOCKERFILE, *COPIED]
PINS = dict(
    re.fullmatch(r"([a-z-]+)(?:\[[a-z]+\])?==([\w.+]+)", line).groups()  # type: ignore[union-attr]
    for line in PROJECT["project"]["dependencies"]
    if "==" in line
)
MEBI = {"Mi": 1 << 20, "Gi": 1 << 30}


def size_of(text: str) -> int:
    match = re.fullmatch(r"(\d+)(Mi|Gi)", text)
    assert match, text
    return int(match[1]) * MEBI[match[2]]


def lines_of(value: Any) -> Iterator[str]:
    """Every text in a document, a list of words as one line of a shell."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from lines_of(one)
    elif isinstance(value, list):
        if value and all(isinstance(one, str) for one in value):
            yield shlex.join(value)
        for one in value:
            yield from lines_of(one)


def commands_in(text: str, program: str) -> Iterator[list[str]]:
    """The words after a program, wherever a line of a shell calls it."""
    for part in re.split(r"\|\||&&|[;|\n]", text.replace("\\\n", " ")):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:
            continue
        for word in words:
            if " " in word:
                yield from commands_in(word, program)
        called = [
            at
            for at, word in enumerate(words)
            if word == program or word.endswith(f"/bin/{program}")
        ]
        if called:
            # What comes before may be `sudo -u silvershard`.
            yield words[called[-1] + 1 :]


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, each on one line."""
    text = "\n".join(
        line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")
    )
    joined = re.sub(r"\\\n", " ", text)
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


def unit() -> dict[str, list[str]]:
    """The settings of the systemd unit; some are given several times."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def seconds(text: str) -> float:
    assert text.isdecimal(), text
    return float(text)


@pytest.fixture(scope="module")
def kinds() -> dict[str, Any]:
    """The documents for Kubernetes by kind; of claims the last one."""
    return {one["kind"]: one for one in documents(KUBERAY)}


@pytest.fixture(scope="module")
def groups(kinds: dict[str, Any]) -> dict[str, Any]:
    """Pod templates of the Ray cluster by group."""
    spec = kinds["RayCluster"]["spec"]
    return {"head": spec["headGroupSpec"]} | {
        one["groupName"]: one for one in spec["workerGroupSpecs"]
    }


@pytest.fixture(scope="module")
def settings(kinds: dict[str, Any]) -> Config:
    """What the container on Kubernetes runs with."""
    return load(None, environ=kinds["ConfigMap"]["data"])


def pod_of(group: Any) -> Any:
    return group["template"]["spec"]


def containers(group: Any) -> dict[str, Any]:
    return {one["name"]: one for one in pod_of(group)["containers"]}


@pytest.mark.parametrize("path", COPIED, ids=lambda path: path.name)
def test_three_lines_are_to_be_edited_and_a_page_says_so(path: Path) -> None:
    assert path.read_text().count("EDIT:") == 3
    assert str(path.relative_to(ROOT)) in PAGE.read_text()


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_versions_are_those_of_the_project_and_nothing_is_the_latest(path: Path) -> None:
    text = path.read_text()
    assert "latest" not in re.sub(r"restore .* latest", "", text)
    for name, tag in re.findall(r"(silvershard):([\w.-]+)", text):
        assert tag.removesuffix("-cuda") == VERSION, name
    for version in re.findall(r"silvershard-(\d[\d.]*\d)", text):
        assert version == VERSION


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_no_file_holds_a_secret(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"PRIVATE KEY|AKIA[0-9A-Z]{16}|[0-9a-f]{32}", text)
    assert not re.search(r"(?i)\b(password|secret|token)\b\s*[:=]\s*['\"]?\w{12,}", text)


def test_every_command_of_ours_is_one_that_exists() -> None:
    parser = verbs._arguments()
    page = PAGE.read_text()
    code = [*re.findall(r"```sh\n(.*?)```", page, re.DOTALL), *re.findall(r"`([^`\n]+)`", page)]
    sources = {PAGE: "\n".join(code)}
    sources |= {path: "\n".join(lines_of(documents(path))) for path in (KUBERAY, *RAY_UP)}
    sources[UNIT] = "\n".join(one for values in unit().values() for one in values)
    found = [
        (path.name, words)
        for path, text in sources.items()
        for words in commands_in(text, "silvershard")
        if words
    ]
    for name, words in found:
        try:
            parser.parse_args([word for word in words if not word.startswith((">", "2>"))])
        except SystemExit:
            pytest.fail(f"{name}: silvershard {shlex.join(words)}")
    assert {path.name for path in sources} == {name for name, _ in found}
    assert ("silvershard.service", ["up", "--foreground"]) in found
    assert ("raycluster.yaml", ["up", "--foreground"]) in found


def test_the_settings_of_ray_are_those_that_were_measured() -> None:
    text = yaml.safe_dump(documents(KUBERAY))
    for path in RAY_UP:
        for name, value in RAY_SETTINGS.items():
            said = path.read_text().count(f"{name}={value}")
            assert said == len(re.findall(rf"{name}\b", path.read_text())) > 0, (path.name, name)
        assert f"{GCS_STORAGE}=rocksdb" in path.read_text()
        assert f"{GCS_PATH}=" in path.read_text()
    for group in documents(KUBERAY)[-1]["spec"]["workerGroupSpecs"]:
        environ = {one["name"]: one.get("value") for one in containers(group)["ray-worker"]["env"]}
        assert RAY_SETTINGS.items() <= environ.items()
    for name in (GCS_STORAGE, GCS_PATH):
        assert name in text


def test_ray_knows_every_setting_by_its_name() -> None:
    ray = pytest.importorskip("ray")
    binary = (Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server").read_bytes()
    names = set(RAY_SETTINGS) | {GCS_STORAGE, GCS_PATH}
    for path in (KUBERAY, *RAY_UP):
        names.update(re.findall(r"\bRAY_[a-z]\w+", path.read_text()))
    assert len(names) > 8
    for name in names:
        assert name.removeprefix("RAY_").encode() in binary, name


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_ray_up_takes_the_file(path: Path) -> None:
    ray = pytest.importorskip("ray.autoscaler")
    jsonschema = pytest.importorskip("jsonschema", reason="comes with Ray's dashboard")
    schema = json.loads((Path(ray.__file__).parent / "ray-schema.json").read_text())
    (config,) = documents(path)
    jsonschema.validate(config, schema)
    if config["provider"]["type"] == "local":
        from ray.autoscaler._private.util import prepare_config, validate_config

        validate_config(prepare_config(config))
    else:
        types = config["available_node_types"]
        assert config["head_node_type"] in types
        workers = [one for name, one in types.items() if name != config["head_node_type"]]
        assert config["max_workers"] >= sum(one["min_workers"] for one in workers)
    for remote in config["file_mounts"]:
        assert remote.startswith(("/", "~"))


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_ray_starts_with_options_that_it_has_and_with_its_token(path: Path) -> None:
    scripts = pytest.importorskip("ray.scripts.scripts")
    options = {one for parameter in scripts.start.params for one in parameter.opts}
    (config,) = documents(path)
    found = [words for line in lines_of(config) for words in commands_in(line, "ray")]
    starts = [words for words in found if words[0] == "start"]
    assert any("--head" in words for words in starts)
    assert any("--address=$RAY_HEAD_IP:6379" in words for words in starts)
    for words in starts:
        given = {word.partition("=")[0] for word in words[1:]}
        assert given <= options, words
    text = path.read_text()
    assert "RAY_AUTH_MODE=token" in text
    assert "RAY_AUTH_TOKEN_PATH=" in text
    mounted = [one for one in config["file_mounts"] if one.endswith("ray.token")]
    assert len(mounted) == 1
    assert f"RAY_AUTH_TOKEN_PATH={mounted[0]}" in text


@pytest.mark.parametrize("path", [KUBERAY, *RAY_UP], ids=lambda path: path.name)
def test_shells_can_read_what_they_are_given(path: Path) -> None:
    for line in lines_of(documents(path)):
        if not line.startswith("-") and re.search(r"\b(ray|silvershard|mkdir|pip)\b", line):
            done = subprocess.run(["sh", "-n", "-c", line], capture_output=True, check=False)
            assert done.returncode == 0, line


def test_the_ray_cluster_has_what_its_definition_requires(kinds: dict[str, Any]) -> None:
    cluster = kinds["RayCluster"]
    assert (cluster["apiVersion"], cluster["metadata"]["name"]) == ("ray.io/v1", "silvershard")
    spec = cluster["spec"]
    assert spec["rayVersion"] == PINS["ray"]
    assert {"headGroupSpec", "workerGroupSpecs"} <= set(spec)
    assert {"rayStartParams", "template"} <= set(spec["headGroupSpec"])
    for group in spec["workerGroupSpecs"]:
        required = {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"}
        assert required <= set(group)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_ray_containers_come_first_with_options_that_ray_has(groups: dict[str, Any]) -> None:
    scripts = pytest.importorskip("ray.scripts.scripts")
    options = {one for parameter in scripts.start.params for one in parameter.opts}
    for name, group in groups.items():
        assert pod_of(group)["containers"][0]["name"] == (
            "ray-head" if name == "head" else "ray-worker"
        )
        for option, value in group["rayStartParams"].items():
            assert f"--{option}" in options
            assert isinstance(value, str)


def test_every_container_has_limits_rights_an_image_and_volumes_that_exist(
    groups: dict[str, Any], kinds: dict[str, Any]
) -> None:
    claims = {
        one["metadata"]["name"]
        for one in documents(KUBERAY)
        if one["kind"] == "PersistentVolumeClaim"
    }
    for group in groups.values():
        pod = pod_of(group)
        assert pod["securityContext"]["runAsNonRoot"] is True
        volumes = {one["name"]: one for one in pod["volumes"]}
        mounted = set()
        for one in [*pod["containers"], *pod.get("initContainers", [])]:
            assert one["image"].endswith(f"/silvershard:{VERSION}")
            assert one["securityContext"]["allowPrivilegeEscalation"] is False
            assert {"cpu", "memory"} <= set(one["resources"]["requests"])
            assert one["resources"]["limits"]["memory"] == one["resources"]["requests"]["memory"]
            mounted |= {mount["name"] for mount in one["volumeMounts"]}
            for source in one.get("envFrom", []):
                assert source["configMapRef"]["name"] == kinds["ConfigMap"]["metadata"]["name"]
        assert mounted == set(volumes)
        used = {
            one["persistentVolumeClaim"]["claimName"]
            for one in volumes.values()
            if "persistentVolumeClaim" in one
        }
        assert used <= claims


def test_the_token_comes_from_a_secret_that_no_file_holds(groups: dict[str, Any]) -> None:
    for group in groups.values():
        environ = {one["name"]: one for one in pod_of(group)["containers"][0]["env"]}
        assert environ["RAY_AUTH_MODE"]["value"] == "token"
        reference = environ["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert reference == {"name": "silvershard-ray", "key": "auth_token"}
    assert "create secret generic silvershard-ray --from-literal=auth_token=" in KUBERAY.read_text()


def test_the_gcs_writes_to_a_volume_that_outlives_the_head(groups: dict[str, Any]) -> None:
    head = containers(groups["head"])["ray-head"]
    environ = {one["name"]: one.get("value") for one in head["env"]}
    assert environ[GCS_STORAGE] == "rocksdb"
    volumes = {one["name"]: one for one in pod_of(groups["head"])["volumes"]}
    (mount,) = [
        one
        for one in head["volumeMounts"]
        if str(environ[GCS_PATH]).startswith(f"{one['mountPath']}/")
    ]
    assert "persistentVolumeClaim" in volumes[mount["name"]]


def test_memory_is_what_was_measured_and_shared_memory_holds_the_object_store(
    groups: dict[str, Any], settings: Config
) -> None:
    def memory(group: str, name: str) -> int:
        return size_of(containers(groups[group])[name]["resources"]["requests"]["memory"])

    needed = needed_memory(settings, Stock(), joins=False)
    assert memory("front", "silvershard") >= needed * 5 // 4
    assert memory("head", "ray-head") >= 2 * RAY_HEAD_BYTES
    assert memory("front", "ray-worker") >= 2 * RAY_NODE_BYTES
    assert memory("shards", "ray-worker") >= needed_memory(settings, Stock(), joins=True)
    for group in groups.values():
        store = max(
            int(group["rayStartParams"]["object-store-memory"]), settings.runtime.object_store_bytes
        )
        volumes = {one["name"]: one for one in pod_of(group)["volumes"]}
        for container in pod_of(group)["containers"]:
            (mount,) = [one for one in container["volumeMounts"] if one["mountPath"] == "/dev/shm"]
            assert size_of(volumes[mount["name"]]["emptyDir"]["sizeLimit"]) >= store


def test_hooks_end_within_the_time_that_pods_have(groups: dict[str, Any], settings: Config) -> None:
    longest: dict[tuple[str, str], int] = {}
    for name, group in groups.items():
        for container in pod_of(group)["containers"]:
            (hook,) = [container["lifecycle"]["preStop"]["exec"]["command"]]
            assert hook[:2] == ["sh", "-c"]
            spent = sum(map(int, re.findall(r"(?:sleep|--timeout|--grace-period) (\d+)", hook[2])))
            assert 0 < spent < pod_of(group)["terminationGracePeriodSeconds"]
            longest[name, container["name"]] = spent
    front = pod_of(groups["front"])["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2]
    paused = int(re.findall(r"sleep (\d+)", front)[0])
    # Ray is there until what may run on it has ended.
    assert longest["front", "silvershard"] <= paused
    runtime = settings.runtime
    assert longest["front", "silvershard"] >= runtime.drain_s + runtime.stop_timeout_s


def test_probes_ask_ports_that_are_declared_and_that_the_settings_open(
    groups: dict[str, Any], kinds: dict[str, Any], settings: Config
) -> None:
    ours = containers(groups["front"])["silvershard"]
    ports = {one["name"]: one["containerPort"] for one in ours["ports"]}
    http_host, _, http_port = settings.observability.http.rpartition(":")
    assert ports == {"grpc": settings.listen.port, "http": int(http_port)}
    # A loopback address could not be probed from outside of the pod.
    assert (http_host, settings.listen.host) == ("0.0.0.0", "0.0.0.0")
    assert settings.observability.insecure
    assert {one["targetPort"] for one in kinds["Service"]["spec"]["ports"]} == set(ports)
    allowed = {
        port["port"]
        for rule in kinds["NetworkPolicy"]["spec"]["ingress"]
        for port in rule.get("ports", [])
    }
    assert allowed == set(ports.values())
    assert kinds["Service"]["spec"]["selector"]["ray.io/group"] == "front"
    probes = [ours[one] for one in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert {one["httpGet"]["port"] for one in probes} == {"http"}
    startup = ours["startupProbe"]
    patience_s = startup["periodSeconds"] * startup["failureThreshold"]
    assert patience_s > settings.runtime.start_timeout_s
    annotations = groups["front"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == http_port


@pytest.fixture(scope="module")
def http_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a router that has no shard map yet answers over HTTP."""
    import asyncio
    import threading

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    router = Router(
        RouterConfig(
            map_path=str(tmp_path_factory.mktemp("map") / "map.json"),
            listen=ListenSection(port=0),
            observability=ObservabilitySection(http="127.0.0.1:0"),
        )
    )
    asyncio.run_coroutine_threadsafe(router.start(), loop).result(20)
    yield router.http_address
    asyncio.run_coroutine_threadsafe(router.stop(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_the_paths_of_our_probes_are_served(groups: dict[str, Any], http_address: str) -> None:
    ours = containers(groups["front"])["silvershard"]
    annotations = groups["front"]["template"]["metadata"]["annotations"]
    statuses = {}
    probes = ("startupProbe", "livenessProbe", "readinessProbe")
    for path in {
        annotations["prometheus.io/path"],
        *(ours[one]["httpGet"]["path"] for one in probes),
    }:
        connection = http.client.HTTPConnection(http_address, timeout=10)
        connection.request("GET", path)
        statuses[path] = connection.getresponse().status
        connection.close()
    # It lives and is not ready, because it knows of no shard yet.
    assert statuses == {"/livez": 200, "/readyz": 503, "/metrics": 200}


def test_the_paths_and_ports_of_rays_probes_are_those_of_ray(groups: dict[str, Any]) -> None:
    pytest.importorskip("ray")
    from ray._private import ray_constants
    from ray.dashboard import http_server_agent, http_server_head

    head = Path(http_server_head.__file__).read_text()
    for group in groups.values():
        agent = int(
            group["rayStartParams"].get(
                "dashboard-agent-listen-port", ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
            )
        )
        container = pod_of(group)["containers"][0]
        for kind in ("livenessProbe", "readinessProbe"):
            probe = container[kind]["httpGet"]
            if probe["port"] == agent:
                # Without a token, which a probe has not.
                assert probe["path"] in http_server_agent.PUBLIC_EXACT_PATHS
            else:
                assert container["name"] == "ray-head"
                assert probe["port"] == ray_constants.DEFAULT_DASHBOARD_PORT
                assert f'"{probe["path"]}",' in head


def test_two_rays_of_a_pod_do_not_share_a_port(groups: dict[str, Any]) -> None:
    front = groups["front"]
    assert len(pod_of(front)["containers"]) == 2
    assert front["rayStartParams"]["dashboard-agent-listen-port"] != "52365"


def test_the_image_copies_what_is_there_and_is_not_ignored() -> None:
    ignore = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    sources = [
        source
        for name, rest in instructions()
        if name == "COPY"
        for source in shlex.split(rest)[:-1]
    ]
    assert {"pyproject.toml", "setup.py", "kernels", "deploy"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in allowed
    assert allowed == set(sources)
    shim = re.search(r"deploy/packaging/\S+", DOCKERFILE.read_text())
    assert shim
    assert (ROOT / shim[0] / "pyproject.toml").is_file()


def test_the_image_is_made_of_pinned_images_and_stages_that_exist() -> None:
    arguments = {
        rest.partition("=")[0]: rest.partition("=")[2]
        for name, rest in instructions()
        if name == "ARG"
    }
    stages: list[str] = []
    for name, rest in instructions():
        if name != "FROM":
            continue
        base, _, stage = rest.partition(" AS ")
        base = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], base)
        assert base in stages or re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base), base
        stages.append(stage)
    assert arguments["VARIANT"] == "cpu"
    assert {"cpu", "cuda"} <= set(stages)
    for stage in re.findall(r"from=(\w+)", DOCKERFILE.read_text()):
        assert stage in stages


def test_the_image_installs_extras_that_exist_and_runs_our_entry_point_as_nobody() -> None:
    found = dict(instructions())
    extras = re.findall(r"\.whl\)\[([\w,]+)\]", DOCKERFILE.read_text())
    assert len(extras) == 2
    known = PROJECT["project"]["optional-dependencies"]
    assert all(set(one.split(",")) <= set(known) for one in extras)
    (entry,) = json.loads(found["ENTRYPOINT"])
    assert entry in PROJECT["project"]["scripts"]
    verbs._arguments().parse_args(json.loads(found["CMD"]))
    check = found["HEALTHCHECK"].partition(" CMD ")[2].partition("||")[0]
    assert check.split()[0] in PROJECT["project"]["scripts"]
    verbs._arguments().parse_args(check.split()[1:])
    assert found["USER"].split(":")[0] not in ("root", "0")
    config = Config()
    http = int(config.observability.http.rpartition(":")[2])
    assert set(map(int, found["EXPOSE"].split())) == {config.listen.port, http}
    assert found["STOPSIGNAL"] == "SIGTERM"


def test_the_unit_starts_what_exists_and_waits_longer_than_it_takes() -> None:
    found, runtime = {name: values[-1] for name, values in unit().items()}, Config().runtime
    program = Path(found["ExecStart"].split()[0]).name
    assert program in PROJECT["project"]["scripts"]
    assert (found["Type"], found["NotifyAccess"], found["KillMode"]) == ("notify", "main", "mixed")
    # `launch.stop` waits that long for an orderly end, and kills then; the guard takes 15 s more.
    assert seconds(found["TimeoutStopSec"]) > runtime.stop_timeout_s + 15 + runtime.drain_s
    assert seconds(found["TimeoutStartSec"]) > runtime.start_timeout_s + 10
    prevented = {int(one) for one in found["RestartPreventExitStatus"].split()}
    assert prevented == {ExitCode.USAGE, ExitCode.REFUSED}
    assert int(found["LimitNOFILE"]) >= 65536
    # Below the directory that systemd makes, because others may look into that one.
    state = next(one for one in unit()["Environment"] if one.startswith("SILVERSHARD_STATE="))
    assert state.partition("=")[2].startswith(f"/var/lib/{found['StateDirectory']}/")


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not here")
    text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.MULTILINE)
    copy = tmp_path / UNIT.name
    copy.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert complaints == []
