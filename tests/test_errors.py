from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popi.errors import (
    LONGEST,
    BackendError,
    ConfigError,
    InputError,
    MissingExtra,
    ModelError,
    PopiError,
    did_you_mean,
)


def test_says_what_where_and_what_to_do() -> None:
    error = InputError("is not JSON", file="users.jsonl", line=3, field="signals.0", fix="fix it")
    assert str(error) == "users.jsonl:3, field signals.0: is not JSON; fix it"
    assert (error.what, error.file, error.line, error.field, error.fix) == (
        "is not JSON",
        "users.jsonl",
        3,
        "signals.0",
        "fix it",
    )


def test_leaves_out_what_is_not_known() -> None:
    assert str(InputError("is odd")) == "is odd"
    assert str(InputError("is odd", field="text")) == "field text: is odd"
    assert str(InputError("is odd", file="a.json")) == "a.json: is odd"


@given(st.text(st.characters()), st.sampled_from([PopiError, BackendError, InputError, ConfigError, ModelError]))
def test_every_message_is_one_printable_line(message: str, kind: type[PopiError]) -> None:
    assert str(kind(message)).isprintable()


def test_shows_what_a_terminal_would_act_on() -> None:
    assert str(PopiError("a\x1b[2J\n  b \ud800 \u202e")) == "a\\x1b[2J b \\ud800 \\u202e"


def test_keeps_a_path_as_it_is() -> None:
    assert str(PopiError("cannot write my  file שלום")) == "cannot write my  file שלום"


@pytest.mark.parametrize(
    ("kind", "code"), [(PopiError, 1), (BackendError, 1), (InputError, 2), (ConfigError, 2), (ModelError, 2)]
)
def test_exit_codes(kind: type[PopiError], code: int) -> None:
    assert kind("x").exit_code == code


def test_a_missing_extra_names_the_command_that_installs_it() -> None:
    error = MissingExtra("torch", "local")
    assert str(error) == "torch is not installed; install it with: pip install 'popi[local]'"
    assert error.exit_code == 2


def test_did_you_mean_the_nearest_or_any() -> None:
    assert did_you_mean("trainn", ["train", "eval"]) == "did you mean train?"
    assert did_you_mean("xyz", ["train", "eval"]) == "known names: eval, train"
    assert did_you_mean("xyz", []) == "known names: (none)"


def test_a_message_too_long_to_read_keeps_its_ends() -> None:
    message = str(InputError("x" * 100_000, file="users.jsonl", line=1, fix="shorten it"))
    assert message.startswith("users.jsonl:1: xxx") and message.endswith("xxx; shorten it")
    assert len(message) == LONGEST + len(" ... ")


def test_notes_and_fields_survive_a_trip_to_another_process() -> None:
    error = InputError("2 bad rows", file="users.jsonl", line=3)
    error.add_note("users.jsonl:4: is not JSON")
    again = pickle.loads(pickle.dumps(error))
    assert (again.line, again.__notes__) == (3, ["users.jsonl:4: is not JSON"])


def test_errors_survive_a_trip_to_another_process() -> None:
    for error in (MissingExtra("torch", "local"), PopiError("no"), BackendError("dead")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
