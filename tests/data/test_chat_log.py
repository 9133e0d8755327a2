from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from popi.data.chat_log import convert_chat
from popi.data.reading import read_examples
from popi.errors import InputError
from popi.io import BadRows, write_jsonl
from popi.signals import Conversation, Speaker, Turn

Save = Callable[..., Path]
SYSTEM = {"role": "system", "content": "You are helpful."}
HI, HELLO = {"role": "user", "content": " Hi! "}, {"role": "assistant", "content": "Hello, how can I help?"}
SHORT = {"role": "user", "content": "Keep it short."}


def log(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


@pytest.fixture(params=["lines", "list"])
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Save:
    """Writes records as JSON lines, and as a JSON list."""

    def write(*records: Any) -> Path:
        path = tmp_path / "chats.json"
        lines = [json.dumps(record) for record in records]
        path.write_text("\ufeff" + "\n".join(lines) if request.param == "lines" else f" [{','.join(lines)}]")
        return path

    return write


def places(path: Path, *numbers: str) -> list[str]:
    """The places of records, counted from 0, as they are in this file."""
    lines = path.read_text().startswith("\ufeff")
    found = []
    for number in numbers:
        index, dot, field = number.partition(".")
        found.append(f"chats.json:{int(index) + 1}{dot}{field}" if lines else f"chats.json[{index}]{dot}{field}")
    return found


def test_a_record_is_a_conversation_of_its_user(save: Save, tmp_path: Path) -> None:
    records = [log(SYSTEM, HI, HELLO, SHORT, user=" ann ", id="chatcmpl-1"), log(HI, HELLO, user_id="bob")]
    conversion = convert_chat(save(*records))
    ann, bob = conversion.examples
    assert [example.user.user_id for example in (ann, bob)] == ["ann", "bob"]
    [chat] = ann.user.signals
    assert chat == Conversation(
        turns=(
            Turn(speaker=Speaker.USER, text="Hi!"),
            Turn(speaker=Speaker.ASSISTANT, text="Hello, how can I help?"),
            Turn(speaker=Speaker.USER, text="Keep it short."),
        ),
        origin="chat",
    )
    assert [item.reason for item in conversion.dropped] == ["turn of the role system"]
    write_jsonl(tmp_path / "users.jsonl", conversion.examples)
    assert tuple(read_examples(tmp_path / "users.jsonl")) == conversion.examples


@pytest.mark.parametrize(
    "named",
    [
        {"user_id": 7},
        {"user": 7.0},
        {"user": "7", "user_id": None},
        {"metadata": {"user_id": " 7 ", "plan": "free"}},
        {"metadata": {"user": 7}, "user": ""},
        {"user_id": "7", "user": "an address", "metadata": {"user": "x"}},
    ],
)
def test_the_user_is_named_in_one_of_four_fields(save: Save, named: dict[str, Any]) -> None:
    [example] = convert_chat(save(log(HI, **named))).examples
    assert example.user.user_id == "7"


def test_a_user_is_the_same_however_the_id_is_encoded(save: Save) -> None:
    named = [{"user": "caf\u00e9"}, {"metadata": {"user_id": "cafe\u0301"}}]
    records = [{"messages": [{"role": "user", "content": f"{n}"}], **name} for n, name in enumerate(named)]
    [example] = convert_chat(save(*records)).examples
    assert len(example.user.signals) == 2


@pytest.mark.parametrize("name", ["time", "created_at", "created", "timestamp"])
def test_the_time_is_read_in_utc(save: Save, name: str) -> None:
    for value in (1714564800, 1714564800000, "2024-05-01T14:00:00+02:00"):
        [example] = convert_chat(save(log(HI, user="ann", **{name: value}))).examples
        assert example.user.signals[0].time == datetime(2024, 5, 1, 12, tzinfo=UTC)
    with pytest.raises(InputError, match=f"field (0.)?{name}: .* is not a Unix time"):
        convert_chat(save(log(HI, user="ann", **{name: 45321})))


def test_content_may_come_in_parts(save: Save) -> None:
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "input_text", "text": "And why?"},
    ]
    answer = [{"type": "refusal", "refusal": "No."}]
    path = save(log({"role": "user", "content": parts}, {"role": "assistant", "content": answer}, HI, user="ann"))
    conversion = convert_chat(path)
    [chat] = conversion.examples[0].user.signals
    assert isinstance(chat, Conversation)
    assert [turn.text for turn in chat.turns] == ["What is this?\nAnd why?", "Hi!"]
    assert [item.reason for item in conversion.dropped] == [
        "content of the type image_url",
        "content of the type refusal",
        "turn of the assistant without text",
    ]
    assert [item.place for item in conversion.dropped] == places(
        path, "0.messages.0.content.1", "0.messages.1.content.0", "0.messages.1"
    )


def test_other_roles_and_empty_turns_are_dropped_and_counted(save: Save) -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    others = [{"role": role, "content": "x"} for role in ("developer", "tool", "function")]
    records = [
        log(HI, calls, *others, user="ann"),
        log(SYSTEM, HELLO, {"role": "user"}, user="bob"),
        log(HI, user="cho"),
    ]
    path = save(*records)
    conversion = convert_chat(path)
    assert [example.user.user_id for example in conversion.examples] == ["ann", "cho"]
    assert conversion.reasons()[-1] == {
        "dropped because": "the user says nothing in this record",
        "count": 1,
        "first": places(path, "1")[0],
    }
    assert [item.reason for item in conversion.dropped if item.field.startswith("messages")] == [
        "turn of the assistant without text",
        *(f"turn of the role {role}" for role in ("developer", "tool", "function", "system")),
        "turn of the user without text",
    ]


def test_a_log_of_requests_gives_each_conversation_once(save: Save) -> None:
    path = save(
        log(HI, user="ann"),
        log(SYSTEM, HI, HELLO, SHORT, user="ann"),
        log(HI, HELLO, SHORT, user="ann"),
        log(HI, HELLO, SHORT, user="ann", created=1714564800),
        log(HI, HELLO, user="bob"),
        log(SHORT, user="ann"),
    )
    ann, bob = convert_chat(path).examples
    assert [len(chat.turns) for chat in ann.user.signals] == [3, 3, 1]  # type: ignore[union-attr]
    assert [len(chat.turns) for chat in bob.user.signals] == [2]  # type: ignore[union-attr]
    repeated = [item for item in convert_chat(path).dropped if "record" in item.reason]
    assert [item.reason for item in repeated] == ["another record continues this one", "repeats an earlier record"]
    assert [item.place for item in repeated] == places(path, "0", "2")


@pytest.mark.parametrize(
    ("record", "field", "says"),
    [
        (log(HI), "", "names no user; give user_id, user, metadata.user_id or metadata.user"),
        (log(HI, metadata="ann"), "", "names no user"),
        (log(HI, user=True), "user", "valid string"),
        ({"user": "ann"}, "messages", "field required"),
        (log(user="ann"), "messages", "at least 1 item"),
        (log({"from": "human", "value": "Hi"}, user="ann"), "messages.0.role", "field required"),
        (log({"role": "human", "content": "Hi"}, user="ann"), "messages.0.role", "should be 'user', 'assistant'"),
        ("text", "", "is not a JSON object"),
    ],
)
def test_a_bad_record_is_named_and_can_be_skipped(save: Save, record: Any, field: str, says: str) -> None:
    path = save(log(HI, user="ann"), record)
    with pytest.raises(InputError, match=says) as caught:
        convert_chat(path)
    [place] = places(path, f"1.{field}".strip("."))
    by_line = caught.value.line is not None
    assert (caught.value.line, caught.value.field) == (
        (2, field or None) if by_line else (None, f"1.{field}".strip("."))
    )
    bad = BadRows(skip=True)
    conversion = convert_chat(path, bad_rows=bad)
    assert (len(conversion.examples), bad.count) == (1, 1)
    assert [item.place for item in conversion.dropped] == [place]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "contains no conversation; give a log in which users say something"),
        ("[]", "contains no conversation"),
        ('{"messages": [{"role": "system", "content": "x"}], "user": "ann"}', r"first of 2 dropped: chats\.json:1"),
        ("[1", "is not JSON"),
        ("{half", ":1: is not JSON"),
        ("\xff\xfe", "is not"),
    ],
)
def test_a_file_without_chats_is_one_error(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "chats.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=says):
        convert_chat(path)
    with pytest.raises(InputError, match="cannot be read"):
        convert_chat(tmp_path / "absent.json")
