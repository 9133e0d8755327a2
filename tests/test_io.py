from __future__ import annotations

import errno
import json
import os
import stat
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popi.errors import InputError, PopiError
from popi.io import (
    BadRows,
    as_line,
    read_json,
    read_json_lines,
    read_jsonl,
    read_text,
    replacing,
    validate,
    write_bytes,
    write_jsonl,
    write_jsonl_together,
    write_text,
)
from popi.signals import Statement, UserSignals
from tests.strategies import users


@given(st.lists(users(max_size=3), max_size=4))
def test_lines_out_and_in_are_the_same(tmp_path_factory: pytest.TempPathFactory, written: list[UserSignals]) -> None:
    path = tmp_path_factory.mktemp("io") / "users.jsonl"
    assert write_jsonl(path, written) == len(written)
    assert list(read_jsonl(path, UserSignals)) == list(enumerate(written, start=1))


def test_a_long_text_stays_whole(tmp_path: Path) -> None:
    user = UserSignals(user_id="ada", signals=(Statement(text="שלום 👩‍👩‍👧\u2028\x00" * 12_500),))
    write_jsonl(tmp_path / "users.jsonl", [user])
    assert [again for _, again in read_jsonl(tmp_path / "users.jsonl", UserSignals)] == [user]


def test_passes_over_empty_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
    assert list(read_json_lines(path)) == [(1, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"a": ', "is not JSON (Expecting value at character 7)"),
        (b"\x00\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"1" * 5_000, "is not JSON"),
        (b'{"a": Infinity}', "is not JSON (Infinity is not a JSON number)"),
        (b'{"a": "\xff"}', "is not UTF-8 text; save the file as UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text"),
        (b'"\xed\xa0\x80"', "is not UTF-8 text"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, says: str) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line)
    with pytest.raises(InputError) as caught:
        list(read_json_lines(path))
    assert str(caught.value).startswith(f"{path}:2: {says}")


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"cannot be read \(.+\); check the path"):
        list(read_json_lines(tmp_path / name))


PAIR = {"kind": "pair", "prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("record", "field", "says"),
    [
        ({"user_id": "u", "signals": [PAIR, PAIR | {"chosen": 5}]}, "signals.1.chosen", "valid string"),
        ({"user_id": "u", "signals": [PAIR | {"rejected": "a"}]}, "signals.0", "the same text"),
        ({"user_id": "u", "signals": [{"kind": "statement"}]}, "signals.0.text", "field required"),
        (
            {"user_id": "u", "signals": [{"kind": "shrug"}]},
            "signals.0.kind",
            "unknown value 'shrug'; use one of 'pair'",
        ),
        ({"user_id": "u", "signals": [{"text": "x"}]}, "signals.0.kind", "field required"),
        ({"user_id": "u", "signals": [{"kind": "statement", "text": None}]}, "signals.0.text", "field required"),
        ({"user_id": None, "signals": []}, "user_id", "field required"),
        ({"user_id": "u", "signals": [PAIR | {"mood": "x"}]}, "signals.0.mood", "not permitted"),
        ({"user_id": "u\ud800"}, "user_id", "lone surrogate"),
        ({"signals": []}, "user_id", "field required"),
        (["u"], None, "is not a JSON object"),
    ],
)
def test_a_misfit_is_named_with_its_field(record: Any, field: str | None, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        validate(UserSignals, record, file=Path("users.jsonl"), line=7)
    assert (caught.value.file, caught.value.line, caught.value.field) == (Path("users.jsonl"), 7, field)


def test_says_how_many_more_misfits_there_are() -> None:
    with pytest.raises(InputError, match="and 2 more in this place"):
        validate(UserSignals, {"x": 1, "y": 2})


def test_bad_rows_are_counted_to_the_end_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "users.jsonl"
    path.write_text("{half\n" + 20 * '{"user_id": ""}\n' + '{"user_id": "ann"}\n')
    with pytest.raises(InputError, match=r"users\.jsonl:1: is not JSON"):
        list(read_jsonl(path, UserSignals))
    with pytest.raises(
        InputError, match=r"users\.jsonl: 21 bad rows; the first: line 1: is not JSON .* \(write one JSON"
    ) as caught:
        list(read_jsonl(path, UserSignals, bad_rows=BadRows()))
    assert [note.split(":")[1] for note in caught.value.__notes__[:-1]] == [f"{n}, field user_id" for n in range(2, 11)]
    bad = BadRows(skip=True)
    assert [(line, user.user_id) for line, user in read_jsonl(path, UserSignals, bad_rows=bad)] == [(22, "ann")]
    assert (bad.count, len(bad.first)) == (21, 10)


def test_one_bad_row_is_its_own_error_and_none_is_none(tmp_path: Path) -> None:
    path = tmp_path / "users.jsonl"
    path.write_text('{"user_id": "ann"}\n{"user_id": ""}\n')
    bad = BadRows()
    with pytest.raises(
        InputError, match=r"^\S+users\.jsonl:2, field user_id: string should have at least 1 character$"
    ):
        list(read_jsonl(path, UserSignals, bad_rows=bad))
    assert bad.summary().startswith("skipped 1 bad row: ")
    path.write_text('{"user_id": "ann"}\n')
    bad = BadRows()
    assert len(list(read_jsonl(path, UserSignals, bad_rows=bad))) == 1
    assert (bad.count, bad.summary()) == (0, "")


def test_nan_is_null_in_lines_and_an_error_elsewhere_unless_allowed(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": NaN, "b": [NaN, 1]}')
    assert list(read_json_lines(path)) == [(1, {"a": None, "b": [None, 1]})]
    assert read_json(path, nan_is_null=True) == {"a": None, "b": [None, 1]}
    with pytest.raises(InputError, match=r"is not JSON \(NaN is not a JSON number\)"):
        read_json(path)


def test_text_is_read_without_its_byte_order_mark_and_with_its_line_ends(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("\ufeffé\r\nb\r".encode())
    assert read_text(tmp_path / "text") == "é\r\nb\r"
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is not UTF-8 text; save the file as UTF-8"):
        read_text(tmp_path / "text")
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_replaces_only_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    with replacing(path) as stream:
        stream.write("new")
        stream.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert _names(tmp_path) == ["out.txt"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, FileNotFoundError, ConnectionError])
def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(failure, match="its own trouble"), replacing(path) as stream:
        stream.write("half")
        raise failure("its own trouble")
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["out.txt"]


def test_only_a_regular_file_is_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a regular file"):
        write_text(tmp_path / "pipe", "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert _names(tmp_path) == ["pipe"]


def test_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    write_bytes(tmp_path / "new" / "bytes", b"\x00\r\n\xff")
    assert (tmp_path / "new" / "bytes").read_bytes() == b"\x00\r\n\xff"


def test_values_that_fail_midway_leave_no_file(tmp_path: Path) -> None:
    def values() -> Any:
        yield Statement(text="x")
        raise InputError("line 2 is broken")

    with pytest.raises(InputError, match="line 2 is broken"):
        write_jsonl(tmp_path / "out.jsonl", values())
    assert _names(tmp_path) == []


def test_files_written_together_are_all_written_or_none(tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    write_jsonl_together({first: [Statement(text="x")], second: [Statement(text="y"), Statement(text="z")]})
    before = [path.read_text() for path in (first, second)]
    assert [text.count("\n") for text in before] == [1, 2]

    def values() -> Any:
        yield Statement(text="x")
        raise InputError("line 2 is broken")

    for broken in ({first: values(), second: []}, {first: [], second: values()}):
        with pytest.raises(InputError, match="line 2 is broken"):
            write_jsonl_together(broken)
    with pytest.raises(InputError, match="is a folder"):
        write_jsonl_together({first: [], tmp_path: []})
    assert [path.read_text() for path in (first, second)] == before
    assert _names(tmp_path) == ["first.jsonl", "second.jsonl"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("full", [0, 1])
def test_a_disk_that_fills_leaves_none_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: int) -> None:
    opened, calls = Path.open, count()

    def open_one_full(self: Path, mode: str, **rest: Any) -> Any:
        path = Path("/dev/full") if next(calls) == full else self
        return opened(path, "w", **rest)

    names = ("first.jsonl", "second.jsonl")
    files = {tmp_path / name: [Statement(text="x")] for name in names}
    with monkeypatch.context() as patch, pytest.raises(PopiError, match=f"cannot write .*{names[full]}: No space left"):
        patch.setattr(Path, "open", open_one_full)
        write_jsonl_together(files)
    assert _names(tmp_path) == []


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    with (
        pytest.raises(PopiError, match=r"cannot write .*out\.txt: No space left on device; nothing was changed"),
        replacing(path) as stream,
    ):
        stream.write("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert _names(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_fills_while_the_last_words_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode, **rest: opened(Path("/dev/full"), "w", **rest))
    with pytest.raises(PopiError, match="No space left on device; nothing was changed"):
        write_text(tmp_path / "out.txt", "words")
    assert _names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(PopiError, match="cannot write"):
        write_text(tmp_path / "file" / "out.txt", "words")
    with pytest.raises(InputError, match="is a folder; name a file in it"):
        write_text(tmp_path, "words")
    assert (tmp_path / "file").read_text() == "old"
    assert _names(tmp_path) == ["file"]


def test_makes_folders_and_takes_the_longest_names(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / ("n" * 250)
    write_text(path, "words")
    assert path.read_text() == "words"


def test_a_link_is_followed_and_permissions_are_kept(tmp_path: Path) -> None:
    path, link = tmp_path / "out.txt", tmp_path / "link.txt"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    write_text(link, "new")
    assert link.is_symlink() and path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    write_text(tmp_path / "out.txt", "words")
    (tmp_path / "other.txt").touch()
    assert (tmp_path / "out.txt").stat().st_mode == (tmp_path / "other.txt").stat().st_mode


def test_half_a_surrogate_pair_is_written_as_json_escapes_it(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write_text(path, json.dumps({"name": "\udc80"}, ensure_ascii=False) + "\n")
    assert list(read_json_lines(path)) == [(1, {"name": "\udc80"})]


def test_a_value_is_one_line() -> None:
    assert as_line(Statement(id="s", text="a\nb\u2028c")).count("\n") == 1
