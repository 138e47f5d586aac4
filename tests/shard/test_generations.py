from pathlib import Path

from silvershard.shard.generations import generation_dir, list_generations


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
