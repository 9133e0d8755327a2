from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popi.cli.growing import GrowingFile
from popi.errors import InputError, PopiError


def grow(path: Path, *lines: str) -> bool:
    """Adds lines and tells whether a half line was cut off before."""
    with GrowingFile(path) as file:
        file.append(f"{line}\n" for line in lines)
        return file.repaired


def test_lines_are_added_behind_those_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.jsonl"
    assert not grow(path, '{"a": 1}')
    assert not grow(path, '{"b": "שלום"}', '{"c": 3}')
    assert path.read_text(encoding="utf-8") == '{"a": 1}\n{"b": "שלום"}\n{"c": 3}\n'


def test_without_lines_nothing_is_left(tmp_path: Path) -> None:
    with GrowingFile(tmp_path / "out.jsonl") as file:
        file.append([])
    assert not list(tmp_path.iterdir())


objects = st.dictionaries(st.text(max_size=3), st.text(max_size=200) | st.integers(), max_size=3)


@given(st.lists(objects, min_size=1, max_size=4), st.data())
def test_whatever_a_killed_process_left_only_whole_lines_stay(
    tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, object]], data: st.DataObject
) -> None:
    lines = [json.dumps(value, ensure_ascii=False).encode() + b"\n" for value in values]
    written = b"".join(lines)
    cut = data.draw(st.integers(0, len(written)))
    path = tmp_path_factory.mktemp("cut") / "out.jsonl"
    path.write_bytes(written[:cut])
    repaired = grow(path, '"next"')

    whole = [line for number, line in enumerate(lines) if cut >= sum(map(len, lines[: number + 1])) - 1]
    assert path.read_bytes() == b"".join(whole) + b'"next"\n'
    assert repaired == (cut > sum(map(len, whole)))


def test_a_long_half_line_is_cut_off_too(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 300_000)
    assert grow(path)
    assert path.read_bytes() == b'{"a": 1}\n'


def test_only_one_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    code = "import sys; from pathlib import Path; from popi.cli.growing import GrowingFile as G; "
    with GrowingFile(path):
        with pytest.raises(PopiError, match="is being written by another process"), GrowingFile(path):
            pass
        other = subprocess.run(
            [sys.executable, "-c", code + "G(Path(sys.argv[1])).__enter__()", str(path)], capture_output=True, text=True
        )
        assert "is being written by another process" in other.stderr
    assert not grow(path, "1")


def test_a_full_disk_leaves_what_was_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    grow(path, '{"a": 1}')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with GrowingFile(path) as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
        try:
            with pytest.raises(PopiError, match=r"cannot write .*out\.jsonl: File too large"):
                file.append(['{"b": "' + "x" * 100 + '"}\n'])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == b'{"a": 1}\n'
        file.append(['{"c": 3}\n'])
    assert path.read_bytes() == b'{"a": 1}\n{"c": 3}\n'


def test_what_is_not_on_the_disk_is_not_reported_as_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with GrowingFile(tmp_path / "out.jsonl") as file:
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(PopiError, match="Input/output error"):
            file.append(["1\n"])
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_lines_are_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    grow(path, "1", "2", "3")
    with GrowingFile(path) as file:
        file.replace(3, "0\n")
        file.replace(1, '"one"\n')
        file.replace(3, '"three"\n')
        file.append(["4\n"])
        assert path.read_text() == "1\n2\n3\n4\n"
    assert path.read_text() == '"one"\n2\n"three"\n4\n'
    assert sorted(file.name for file in tmp_path.iterdir()) == [".out.jsonl.lock", "out.jsonl"]


@pytest.mark.parametrize("cut", [0, 1])
def test_lines_that_a_killed_process_replaced_are_replaced_when_the_file_is_used_again(
    tmp_path: Path, cut: int
) -> None:
    path, changes = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.changes"
    grow(path, "1", "2", "3")
    file = GrowingFile(path)
    file.__enter__()
    file.replace(1, '"one"\n')
    file.replace(3, '"three"\n')
    file._lock.close()  # type: ignore[union-attr]
    changes.write_bytes(changes.read_bytes()[: -1 if cut else None])
    grow(path, "4")
    last = "3" if cut else '"three"'
    assert path.read_text() == f'"one"\n2\n{last}\n4\n'
    assert not changes.exists()


def test_a_line_that_somebody_else_changed_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    grow(path, "1", "2", "3")
    file = GrowingFile(path)
    file.__enter__()
    file.replace(1, '"one"\n')
    file.replace(2, '"two"\n')
    file._lock.close()  # type: ignore[union-attr]
    path.write_text('"mine"\n2\n3\n')
    grow(path)
    assert path.read_text() == '"mine"\n"two"\n3\n'
    path.unlink()
    with GrowingFile(path):
        pass
    assert not list(tmp_path.iterdir())


def test_replacing_many_lines_takes_no_longer_for_a_long_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    grow(path, *(str(number) for number in range(2000)))
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    with GrowingFile(path) as file:
        for number in range(1, 2001):
            file.replace(number, f'"{number}"\n')
    assert path.read_text() == "".join(f'"{number}"\n' for number in range(1, 2001))


def test_changes_that_cannot_be_made_now_are_made_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    grow(path, "1", "2")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(PopiError, match="No space left"), GrowingFile(path) as file:
            file.replace(1, '"one"\n')
        with pytest.raises(KeyError), GrowingFile(tmp_path / "other"):
            raise KeyError
    assert path.read_text() == "1\n2\n"
    grow(path)
    assert path.read_text() == '"one"\n2\n'


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path, says in (
        (tmp_path / "file" / "out.jsonl", "cannot write"),
        (tmp_path / "folder", "is not a regular file"),
        (tmp_path / "pipe", "is not a regular file"),
    ):
        with pytest.raises(PopiError, match=says), GrowingFile(path):
            pass


@pytest.mark.parametrize("content", ["notes", "one\ntwo", '{"a": 1}\nnotes'])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with (
        pytest.raises(InputError, match=r"notes\.txt: is not a file of JSON lines; name another file"),
        GrowingFile(path),
    ):
        pass
    assert path.read_text() == content
