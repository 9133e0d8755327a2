"""Prompt sets in files: what is refused, and where the error is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from popi.errors import InputError, ModelError
from popi.prompt_files import read_prompts
from popi.prompts import CUSTOM, DEFAULT, INSTRUCT, check_template_hash, quote
from popi.trained import TrainingRecord, prompts_of

OWN: dict[str, Any] = {
    "name": "own",
    "system": "You describe a reader. Write {nothing} if you cannot.",
    "examples": [{"signals": "[1] The user said: Be brief.", "reply": "- Brief answers [1]"}],
    "infer": "Signals:\n{open}\n{signals}\n{close}\nDescribe this reader.",
    "answer_system": "The reader:\n{open}\n{context}\n{close}",
    "answer": "{prompt}",
    "signal": {"statement": "They said: {text}"},
}


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "own.yaml"
    tree = {name: value for name, value in {**OWN, **changes}.items() if value is not None}
    file.write_text(yaml.safe_dump(tree))
    return file


def test_a_file_replaces_templates_of_its_base(tmp_path: Path) -> None:
    own = read_prompts(write(tmp_path))
    assert own.infer == OWN["infer"] and own.turn == INSTRUCT.turn
    assert own.signal == {**INSTRUCT.signal, **OWN["signal"]}
    assert [message.role for message in own.inference_messages("x")] == ["system", "user", "assistant", "user"]
    plain = read_prompts(write(tmp_path, base="default", system=None, examples=[], answer_system="", answer=None))
    assert (plain.answer, plain.examples, plain.cut) == (DEFAULT.answer, (), DEFAULT.cut)


def test_the_hash_of_a_file_is_that_of_its_templates(tmp_path: Path) -> None:
    own = read_prompts(write(tmp_path))
    assert own.hash.startswith(CUSTOM)
    check_template_hash(own.hash, where="summaries.jsonl:1")
    assert read_prompts(write(tmp_path, name="other")).hash == own.hash
    assert read_prompts(write(tmp_path, answer="{prompt}!")).hash != own.hash


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": None}, "field name: field required"),
        ({"base": "instruckt"}, "field base: unknown prompt set 'instruckt'; did you mean instruct"),
        ({"inferr": "x"}, "field inferr: "),
        ({"infer": 3}, "field infer: "),
        ({"examples": [{"signals": "x"}]}, "field examples.0.reply: field required"),
        ({"infer": "{open}\n{close}"}, "field infer: lacks the placeholder {signals}; add {signals}"),
        ({"infer": OWN["infer"] + "{user}"}, "field infer: has the unknown placeholder {user}; use {close}, {nothing}"),
        ({"infer": OWN["infer"] + "{"}, "field infer: is not a template: "),
        ({"infer": OWN["infer"] + "{}"}, "field infer: has the unknown placeholder {}"),
        ({"system": "{signals}"}, "field system: has the unknown placeholder {signals}; use {nothing}"),
        ({"unnamed": "{text}"}, "field unnamed: has the unknown placeholder {text}; write {{ for a brace"),
        ({"answer": "Answer."}, "field answer: lacks the placeholder {prompt}"),
        ({"signal": {"pair": "{prompt} {chosen}"}}, "field signal.pair: lacks the placeholder {rejected}"),
        ({"signal": {"par": "{prompt}"}}, "field signal.par: is not a kind of signal or turn; did you mean pair"),
        ({"signal": {"statement": "{text:d}"}}, "field signal.statement: cannot be filled in: "),
        ({"numbered": "{number:s}. {signal}"}, "field numbered: cannot be filled in: "),
        ({"turn": {"user": "hm"}}, "field turn.user: lacks the placeholder {text}"),
        # Text without a frame, in two frames, or after the frame.
        ({"infer": "{signals} {open}{close}"}, "field infer: does not have the signals in the frame"),
        ({"infer": OWN["infer"] + "{open}"}, "field infer: does not have the signals in the frame"),
        ({"infer": OWN["infer"] + ">>>"}, "field infer: does not have the signals in the frame"),
        ({"answer_system": "The reader: {context}"}, "field answer: does not have the context in the frame"),
        ({"answer_system": ""}, "field answer: does not have the context in the frame"),
        ({"answer": OWN["answer_system"] + "{prompt}"}, "field answer: does not have the context in the frame"),
    ],
    ids=str,
)
def test_a_wrong_file_is_an_error_that_names_the_field(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    file = write(tmp_path, **changes)
    with pytest.raises(InputError) as raised:
        read_prompts(file)
    assert str(raised.value).startswith(f"{file}, {says}") and "\n" not in str(raised.value)


@given(st.text("<>|{} \nabc"))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_leaves_the_frame_of_a_file_that_was_read(tmp_path: Path, text: str) -> None:
    own = read_prompts(write(tmp_path))
    for content in (own.inference_messages(text)[-1].content, own.answer_messages("x", text)[0].content):
        assert content.partition(own.open)[2].partition(own.close)[0] == f"\n{quote(text)}\n"


def test_a_model_that_was_trained_with_a_file_keeps_it(tmp_path: Path) -> None:
    own = read_prompts(write(tmp_path))
    TrainingRecord.of("base", own.hash, own).write(tmp_path)
    (tmp_path / "own.yaml").unlink()
    found = prompts_of(str(tmp_path))
    assert (found.hash, found.name, found.templates()) == (own.hash, "own", own.templates())
    TrainingRecord.of("base", INSTRUCT.hash, INSTRUCT).write(tmp_path)
    assert prompts_of(str(tmp_path)) is INSTRUCT
    (tmp_path / "popi.json").write_text(json.dumps({"template_hash": own.hash, "prompts": {"name": "own"}}))
    with pytest.raises(ModelError, match="malformed training record of"):
        prompts_of(str(tmp_path))


def test_a_file_is_named_in_place_of_a_set(tmp_path: Path) -> None:
    assert prompts_of("gpt-4.1-mini", str(write(tmp_path))).name == "own"
    with pytest.raises(InputError, match=r"none\.yaml: cannot be read"):
        prompts_of("gpt-4.1-mini", str(tmp_path / "none.yaml"))
