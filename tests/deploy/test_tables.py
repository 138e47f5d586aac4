from silvershard.deploy.tables import clipped, milliseconds, pairs, table, width_of


def test_numbers_go_right_and_text_left() -> None:
    shown = table(("name", "count"), [("a", 5), ("long name", 12345)], indent=0)
    assert shown.splitlines() == [
        "name        count",
        "─────────  ──────",
        "a               5",
        "long name  12,345",
    ]


def test_a_missing_value_is_a_dash_and_a_float_has_four_decimals() -> None:
    assert table(("x",), [(None,), (0.25,)], indent=0).splitlines()[2:] == ["     -", "0.2500"]


def test_wide_and_combining_characters_keep_columns_aligned() -> None:
    assert width_of("七人の侍") == 8
    assert width_of("Ame\u0301lie") == 6
    lines = table(("title", "n"), [("七人の侍", 1), ("Heat", 2)], indent=0).splitlines()
    assert [width_of(line) for line in lines[2:]] == [11, 11]


def test_long_text_is_cut_with_an_ellipsis() -> None:
    assert clipped("abcdef", 4) == "abc…"
    assert clipped("abcd", 4) == "abcd"
    assert clipped("七人の侍", 5) == "七人…"


def test_a_table_without_rows_has_its_header() -> None:
    assert table(("a", "b"), [], indent=0).splitlines()[0] == "a  b"


def test_pairs_line_up() -> None:
    assert pairs([("a", "1"), ("long", "2")], indent=0) == "a     1\nlong  2"


def test_times_have_about_three_digits() -> None:
    assert (milliseconds(1234), milliseconds(12345)) == ("1.23 ms", "12.3 ms")
