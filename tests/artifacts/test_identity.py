import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.identity import (
    FileEntry,
    check_digest,
    check_file_name,
    check_name,
    content_digest,
    describe_files,
    stage_key,
)
from common.errors import UserError

LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("abé ☃"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=2), inner, max_size=3),
    max_leaves=8,
)
ENTRIES = st.dictionaries(
    st.text("abc/.", min_size=1, max_size=6),
    st.builds(FileEntry, sha256=st.text("0123456789abcdef", min_size=64, max_size=64), size=st.integers(0, 9)),
)


@given(st.dictionaries(st.text("abc", max_size=3), LITERALS, max_size=4))
def test_a_key_does_not_depend_on_the_order_of_the_config(config: dict[str, Any]) -> None:
    reverse = dict(reversed(list(config.items())))
    assert stage_key("s", 1, config, {}) == stage_key("s", 1, reverse, {})


def test_a_key_is_that_of_its_parts_alone() -> None:
    digests = {"a": "1" * 64, "b": "2" * 64}
    keys = [
        stage_key("s", 1, {"x": 1}, digests),
        stage_key("t", 1, {"x": 1}, digests),
        stage_key("s", 2, {"x": 1}, digests),
        stage_key("s", 1, {"x": 1.0}, digests),
        stage_key("s", 1, {"x": True}, digests),
        stage_key("s", 1, {"x": None}, digests),
        stage_key("s", 1, {"x": 1}, {"a": "2" * 64, "b": "1" * 64}),
        stage_key("s", 1, {"x": 1}, {}),
    ]
    assert len(set(keys)) == len(keys)


def test_a_key_stays_the_same_over_releases() -> None:
    # A change here makes every user's work count as undone.
    key = stage_key("tokens", 3, {"size": 2, "name": "é"}, {"documents": "ab" * 32})
    assert key == "e9a46760bbcf07fe9384bdd4cbac7e0098061d634d8ce244665a8d4908a19907"


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, {1, 2}, Path("x"), {1: 2}, b"x", object(), [math.nan], {"a": {2: 3}}]
)
def test_a_key_refuses_what_is_no_plain_literal(value: Any) -> None:
    with pytest.raises(ValueError, match=r"config\.config\.part"):
        stage_key("s", 1, {"part": value}, {})


@given(ENTRIES)
def test_a_content_digest_does_not_depend_on_order(files: dict[str, FileEntry]) -> None:
    assert content_digest(files) == content_digest(dict(reversed(list(files.items()))))


@given(ENTRIES, ENTRIES)
def test_different_contents_have_different_digests(one: dict[str, FileEntry], other: dict[str, FileEntry]) -> None:
    same = {name: entry.sha256 for name, entry in one.items()} == {name: e.sha256 for name, e in other.items()}
    assert (content_digest(one) == content_digest(other)) == same


def test_a_folder_is_described_by_names_and_bytes_not_by_how_it_came_about(tmp_path: Path) -> None:
    for folder, names in (("one", ["b", "a", "sub/c"]), ("two", ["sub/c", "a", "b"])):
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode())
    os.utime(tmp_path / "one/a", (1, 1))
    (tmp_path / "two/empty").mkdir()
    one, two = describe_files(tmp_path / "one"), describe_files(tmp_path / "two")
    assert list(one) == ["a", "b", "sub/c"]
    assert one == two


def test_links_and_special_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="link or a special file"):
        describe_files(tmp_path)
    (tmp_path / "link").unlink()
    (tmp_path / "folder").symlink_to("/etc", target_is_directory=True)
    with pytest.raises(UserError, match="link or a special file"):
        describe_files(tmp_path)
    (tmp_path / "folder").unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="link or a special file"):
        describe_files(tmp_path)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        describe_files(tmp_path / "none")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "..",
        "a/../b",
        "a/..",
        "./a",
        "a//b",
        "a/",
        "a\\b",
        "a\nb",
        "a\0",
        "\x9b",
        "\ud800",
        "é" * 200,
    ],
)
def test_file_names_that_could_leave_their_folder_are_refused(name: str) -> None:
    with pytest.raises(UserError):
        check_file_name(name)


@given(st.text(max_size=12))
def test_a_file_name_that_is_allowed_stays_inside(name: str) -> None:
    try:
        check_file_name(name)
    except UserError:
        return
    base = Path("/base/folder")
    assert Path(os.path.normpath(base / name)).is_relative_to(base)
    assert Path(os.path.normpath(base / name)) != base


@pytest.mark.parametrize("name", ["models/arithmetic", "models/elite-112m@sft", "a", "A.b_c-9", "_x/y.z"])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "../a", "a/..", "a..b", ".a", "a/.b", "ä", "a b", "a\n", "x" * 201]
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="is no name"):
        check_name(name)


@pytest.mark.parametrize("value", ["", "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", "../" + "a" * 61])
def test_digests_that_are_refused(value: str) -> None:
    with pytest.raises(UserError, match="no key or digest"):
        check_digest(value)
