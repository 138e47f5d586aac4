import json
from pathlib import Path

from silvershard.shard.generations import generation_dir, list_generations, number_of, stored_files


def test_generations_are_listed_in_order_and_unfinished_ones_do_not_count(tmp_path: Path) -> None:
    for name in ("gen-000010", "gen-000002", ".gen-000011.77.tmp", "gen-x", "other"):
        (tmp_path / name).mkdir()
    assert list_generations(tmp_path) == [2, 10]
    assert list_generations(tmp_path / "nowhere") == []


def test_a_generation_has_the_directory_that_it_is_listed_by(tmp_path: Path) -> None:
    for generation in (3, 12, 1_234_567):
        generation_dir(tmp_path, generation).mkdir()
    assert list_generations(tmp_path) == [3, 12, 1_234_567]
    assert generation_dir(tmp_path, 12).name == "gen-000012"


def test_stored_files_are_found_by_content_and_a_damaged_manifest_holds_none(
    tmp_path: Path,
) -> None:
    files = {"dense.safetensors": {"sha256": "a" * 64}, "golden.json": {"sha256": "b" * 64}}
    for generation, content in ((1, json.dumps({"files": files})), (2, "{"), (3, "[]"), (4, None)):
        directory = generation_dir(tmp_path, generation)
        directory.mkdir()
        if content is not None:
            (directory / "manifest.json").write_text(content)
    first = generation_dir(tmp_path, 1)
    assert stored_files(tmp_path) == {
        "a" * 64: first / "dense.safetensors",
        "b" * 64: first / "golden.json",
    }


def test_the_name_of_a_directory_tells_its_generation() -> None:
    assert number_of("gen-000012") == 12
    assert [number_of(name) for name in ("gen-12", ".gen-000012.7.tmp", "x")] == [None] * 3
