import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from silvershard.deploy.pulse import Pulse

TIMEOUT_S = 0.05


@pytest.fixture
def make() -> Iterator[Callable[[str], Pulse]]:
    made: list[Pulse] = []

    def pulse(address: str) -> Pulse:
        made.append(Pulse(address, every_s=0.01, timeout_s=TIMEOUT_S))
        return made[-1]

    yield pulse
    for one in made:
        one.close()


@pytest.fixture
def server() -> Iterator[tuple[str, health.HealthServicer]]:
    with ThreadPoolExecutor(2) as pool:
        servicer = health.HealthServicer()
        made = grpc.server(pool)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, made)
        port = made.add_insecure_port("127.0.0.1:0")
        made.start()
        yield f"127.0.0.1:{port}", servicer
        made.stop(None).wait()


@pytest.fixture
def hung() -> Iterator[str]:
    # The kernel takes connections for it, as it does for a process that is stopped.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def until(pulse: Pulse, condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up_s
        pulse.poll()
        time.sleep(0.002)


def test_it_says_what_the_server_says(
    server: tuple[str, health.HealthServicer], make: Callable[[str], Pulse]
) -> None:
    address, servicer = server
    pulse = make(address)
    assert (pulse.status, pulse.silent_s) == (None, 0.0)
    until(pulse, lambda: pulse.status == health_pb2.HealthCheckResponse.SERVING)
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    until(pulse, lambda: pulse.status == health_pb2.HealthCheckResponse.NOT_SERVING)


def test_what_takes_connections_and_answers_nothing_is_silent(
    hung: str, make: Callable[[str], Pulse]
) -> None:
    pulse = make(hung)
    until(pulse, lambda: pulse.silent_s >= 3 * TIMEOUT_S)
    assert pulse.status is None


def test_a_sign_of_life_ends_the_silence(
    hung: str, server: tuple[str, health.HealthServicer], make: Callable[[str], Pulse]
) -> None:
    silent, alive = make(hung), make(server[0])
    until(silent, lambda: silent.silent_s > 0)
    alive._missed = 7
    until(alive, lambda: alive.silent_s == 0)


def test_what_cannot_be_reached_is_not_silent(make: Callable[[str], Pulse]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    pulse = make(f"127.0.0.1:{port}")
    asked: list[object] = []

    def refused() -> bool:
        asked.append(pulse._asked)
        return len({id(one) for one in asked if one is not None}) > 5

    until(pulse, refused)
    assert pulse.silent_s == 0


def test_an_owner_who_stood_still_takes_nobody_for_hung(
    hung: str, make: Callable[[str], Pulse]
) -> None:
    pulse = make(hung)
    pulse.poll()
    until_s = time.monotonic() + 10 * TIMEOUT_S
    while time.monotonic() < until_s:
        time.sleep(0.01)
    pulse.poll()
    assert pulse.silent_s == TIMEOUT_S
