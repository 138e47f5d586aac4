import ctypes
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from silvershard.kernels import native_library, quantize_rows
from silvershard.kernels.native_library import (
    IMPLEMENTATIONS,
    NativeLibrary,
    ValueRefused,
    available,
    call,
    in_use,
    load_library,
    run_on_cpu,
    use,
)

RunPython = Callable[..., str]


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a fresh process: nothing is loaded or chosen yet, and nothing chosen here stays."""
    monkeypatch.setattr(native_library, "_choice", native_library._Choice())
    load_library.cache_clear()
    yield
    load_library.cache_clear()


@pytest.fixture
def library() -> NativeLibrary:
    library = load_library()
    if library is None:
        pytest.skip("no native library here")
    return library


def answering(status: int) -> Any:
    """A library whose every operator answers with one status."""
    functions = {"refine": lambda isa, arguments: status}
    return SimpleNamespace(functions=functions, best_isa=0)


@pytest.mark.parametrize("best_isa", [0, 1, 2])
def test_every_instruction_set_includes_those_before_it(
    best_isa: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = SimpleNamespace(best_isa=best_isa)
    monkeypatch.setattr(native_library, "load_library", lambda: stub)
    assert available() == ("reference", "scalar", "avx2", "avx512")[: best_isa + 2]


def test_without_a_library_only_the_references_are_available(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native_library, "load_library", lambda: None)
    assert available() == ("reference",)


def test_the_best_implementation_is_chosen_by_the_first_question() -> None:
    assert native_library._choice.isa is None
    assert in_use() == available()[-1]


def test_the_scalar_set_runs_wherever_there_is_a_library(library: NativeLibrary) -> None:
    assert available()[:2] == ("reference", "scalar")
    assert library.best_isa == len(available()) - 2


def test_use_holds_while_its_context_is_open() -> None:
    best = available()[-1]
    for name in available():
        with use(name):
            assert in_use() == name
            with use("reference"):
                assert in_use() == "reference"
            assert in_use() == name
        assert in_use() == best


def test_use_restores_the_choice_after_an_exception() -> None:
    before = in_use()
    for name in available():
        with pytest.raises(KeyError), use(name):
            raise KeyError(name)
        assert in_use() == before


@pytest.mark.parametrize("best_isa", [None, 0, 1])
def test_what_this_machine_lacks_is_refused(
    best_isa: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = None if best_isa is None else SimpleNamespace(best_isa=best_isa)
    monkeypatch.setattr(native_library, "load_library", lambda: stub)
    for name in ("sse9", "", *IMPLEMENTATIONS[1 if best_isa is None else best_isa + 2 :]):
        before = in_use()
        with (
            pytest.raises(ValueError, match=r"must be one of \('reference'.*got '" + name),
            use(name),
        ):
            raise AssertionError("entered")
        assert in_use() == before


def test_the_choice_reaches_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bytes]] = []
    stub = SimpleNamespace(
        best_isa=2, functions={"refine": lambda isa, arguments: seen.append((isa, arguments))}
    )
    monkeypatch.setattr(native_library, "load_library", lambda: stub)
    for name in IMPLEMENTATIONS[1:]:
        with use(name):
            call("refine", name.encode())
    assert seen == [(0, b"scalar"), (1, b"avx2"), (2, b"avx512")]


def test_a_missing_library_is_said_once_and_references_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native_library, "LIBRARY_PATH", tmp_path / "none.so")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            codes, _ = quantize_rows(torch.tensor([[1.0, -2.0]]))
            assert codes.tolist() == [[64, -127]]
        assert available() == ("reference",)
        assert in_use() == "reference"
    (record,) = caplog.records
    assert "native operators were not built" in record.getMessage()
    with pytest.raises(ValueError, match="x must be finite"):
        quantize_rows(torch.tensor([[torch.nan]]))


@pytest.mark.parametrize("content", ["text", "stranger", "stale"])
def test_a_library_that_cannot_be_used_is_said_once_and_references_run(
    content: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "broken.so"
    path.write_text("not a shared object")
    if content == "stranger":
        # A shared object without our functions.
        path = Path(torch._C.__file__)
    elif content == "stale":
        path = native_library.LIBRARY_PATH
        if not path.exists():
            pytest.skip("no native library here")
        monkeypatch.setattr(native_library, "_ABI_VERSION", 12_345)
    monkeypatch.setattr(native_library, "LIBRARY_PATH", path)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert quantize_rows(torch.tensor([[1.0]])).codes.tolist() == [[127]]
        assert in_use() == "reference"
    (record,) = caplog.records
    assert "native operators cannot be used" in record.getMessage()
    reason = {
        "text": "broken.so",
        "stranger": "silvershard_abi_version",
        "stale": "needed is 12345",
    }
    assert reason[content] in record.getMessage()


def test_a_library_of_another_interface_version_is_refused(
    library: NativeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = native_library._ABI_VERSION
    monkeypatch.setattr(native_library, "_ABI_VERSION", built + 1)
    with pytest.raises(OSError, match=f"interface version {built}, needed is {built + 1}"):
        NativeLibrary(native_library.LIBRARY_PATH)


def test_the_library_gives_away_nothing_but_its_interface(library: NativeLibrary) -> None:
    handle = ctypes.CDLL(str(native_library.LIBRARY_PATH))
    assert all(hasattr(handle, f"silvershard_{name}") for name in library.functions)
    assert not hasattr(handle, "_ZN11silvershard16scalar_operatorsEv")


@pytest.mark.parametrize(("status", "error"), [(1, ValueRefused), (2, MemoryError)])
def test_a_status_becomes_an_error(
    status: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_library, "load_library", lambda: answering(status))
    with use("scalar"), pytest.raises(error):
        call("refine", b"")
    monkeypatch.setattr(native_library, "load_library", lambda: answering(0))
    with use("scalar"):
        call("refine", b"")


def test_a_call_without_a_library_in_use_is_an_error() -> None:
    with use("reference"), pytest.raises(RuntimeError, match="not in use"):
        call("refine", b"")


def test_the_checked_reference_says_why_the_library_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native_library, "load_library", lambda: answering(1))

    def native(value: int) -> int:
        call("refine", b"")
        return value

    def checked(value: int) -> int:
        if value < 0:
            raise ValueError("value must be at least 0")
        return value

    run = run_on_cpu(native, checked)
    with use("reference"):
        assert run(3) == 3
    with use("scalar"):
        with pytest.raises(ValueError, match="value must be at least 0"):
            run(-1)
        # Values that the reference takes must not be refused: an answer would hide the mistake.
        with pytest.raises(RuntimeError, match="refused values that its contract allows"):
            run(3)


def test_running_out_of_memory_is_no_reason_to_ask_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native_library, "load_library", lambda: answering(2))

    def unwanted() -> None:
        raise AssertionError("the reference ran")

    with use("scalar"), pytest.raises(MemoryError):
        run_on_cpu(lambda: call("refine", b""), unwanted)()


OUT_OF_MEMORY = """
import resource
import torch
from silvershard.kernels import bloom_build, merge_topk

torch.set_num_threads(1)
scores = torch.rand(2, 1, 1 << 21)
item_ids = torch.arange(1 << 22).view(2, 1, 1 << 21)
planes = torch.zeros((2, 1 << 16, 1), dtype=torch.int64)
slots, terms = torch.arange(1 << 22), torch.empty((1 << 22, 0), dtype=torch.int64)
hashing = dict(first_plane=1, num_planes=1, num_hashes=1, seed=0)
bloom_build(planes, slots[:1], terms[:1], **hashing)
size = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, ((int(size.split()[1]) << 10) + (16 << 20), before[1]))
for operator in (
    lambda: merge_topk(scores, item_ids, 3),
    lambda: bloom_build(planes, slots, terms, **hashing),
):
    try:
        operator()
    except MemoryError:
        print("out of memory")
resource.setrlimit(resource.RLIMIT_AS, before)
best = merge_topk(scores, item_ids, 3).scores
print(torch.equal(best[0], scores.flatten().sort(descending=True).values[:3]))
bloom_build(planes, slots, terms, **hashing)
"""


@pytest.mark.usefixtures("library")
def test_scratch_memory_that_cannot_be_had_is_an_error_and_nothing_breaks(
    run_python: RunPython,
) -> None:
    assert run_python(OUT_OF_MEMORY).split("\n")[:3] == ["out of memory", "out of memory", "True"]
