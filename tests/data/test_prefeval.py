from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from popi.data.convert import Conversion
from popi.data.example import PersonalizationExample, text_key
from popi.data.prefeval import convert_prefeval, split_prefeval
from popi.data.reading import read_examples
from popi.errors import InputError
from popi.io import write_jsonl
from popi.signals import Conversation, Speaker, Statement

FOLDERS = {
    "explicit": "explicit_preference",
    "choice": "implicit_preference/choice-based",
    "persona": "implicit_preference/persona-driven",
    "options": "mcq_options",
}


def item(number: int) -> dict[str, Any]:
    return {"preference": f"I like kind {number}.", "question": f"Which {number}?", "explanation": "Most are not."}


def options(number: int) -> dict[str, Any]:
    texts = [f"Follows {number}.", *(f"Violates {number}{letter}." for letter in "abc")]
    return {**item(number), "violation_probability": 1.0, "classification_task_options": texts}


def choice(number: int) -> dict[str, Any]:
    said = {
        "query": f"What is there, {number}?",
        "assistant_options": "1. This 2. That",
        "user_selection": "That.",
        "assistant_acknowledgment": "Noted.",
    }
    return {**item(number), "implicit_query": "?", "options": ["a", "b"], "aligned_op": "a", "conversation": said}


def persona(number: int) -> dict[str, Any]:
    said = {str(turn): {"user": f"Hi {turn}", "assistant": f"Hello {turn}"} for turn in range(2)}
    return {**item(number), "persona": "A sailor", "conversation": said}


MAKE = {"explicit": item, "choice": choice, "persona": persona, "options": options}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as the publisher makes it, with a topic of three items."""
    for form, name in FOLDERS.items():
        (tmp_path / name).mkdir(parents=True)
        save(tmp_path / name / "hats.json", [MAKE[form](number) for number in range(3)])
    return tmp_path


def save(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def by_form(examples: tuple[PersonalizationExample, ...], form: str) -> list[PersonalizationExample]:
    return [example for example in examples if example.facts["form"] == form]


def test_each_item_is_a_user_in_each_form_with_one_test(folder: Path) -> None:
    conversion = convert_prefeval(folder)
    assert conversion.dropped == ()
    assert sorted(example.user.user_id for example in conversion.examples) == [
        f"{form}-hats-00{number}" for form in ("choice", "explicit", "persona") for number in range(3)
    ]
    for example in conversion.examples:
        number = int(example.user.user_id[-1])
        (test,) = example.tests
        assert (test.prompt, test.chosen) == (f"Which {number}?", f"Follows {number}.")
        assert test.rejected in {f"Violates {number}{letter}." for letter in "abc"}
        assert example.oracles == {"truth": f"- I like kind {number}."}
        assert (example.facts["preference"], example.facts["topic"]) == (f"I like kind {number}.", "hats")


def test_a_preference_is_stated_or_shown_in_a_conversation(folder: Path) -> None:
    examples = convert_prefeval(folder).examples
    (stated,) = by_form(examples, "explicit")[0].user.signals
    assert isinstance(stated, Statement) and stated.text == "I like kind 0."
    (chosen,) = by_form(examples, "choice")[1].user.signals
    assert isinstance(chosen, Conversation)
    assert [(turn.speaker, turn.text) for turn in chosen.turns] == [
        (Speaker.USER, "What is there, 1?"),
        (Speaker.ASSISTANT, "1. This 2. That"),
        (Speaker.USER, "That."),
        (Speaker.ASSISTANT, "Noted."),
    ]
    (told,) = by_form(examples, "persona")[2].user.signals
    assert isinstance(told, Conversation)
    assert [(turn.speaker, turn.text) for turn in told.turns] == [
        (Speaker.USER, "Hi 0"),
        (Speaker.ASSISTANT, "Hello 0"),
        (Speaker.USER, "Hi 1"),
        (Speaker.ASSISTANT, "Hello 1"),
    ]
    assert by_form(examples, "persona")[2].facts["persona"] == "A sailor"


def test_an_item_has_the_same_test_in_every_form(folder: Path) -> None:
    examples = convert_prefeval(folder, seed=3).examples
    forms = [[example.tests for example in by_form(examples, form)] for form in ("explicit", "choice", "persona")]
    assert forms[0] == forms[1] == forms[2]


def test_the_seed_chooses_the_rejected_options(folder: Path) -> None:
    save(folder / FOLDERS["options"] / "caps.json", [options(number) for number in range(40)])
    path = folder / FOLDERS["options"]
    assert convert_prefeval(path, seed=1) == convert_prefeval(path, seed=1) != convert_prefeval(path, seed=2)
    rejected = {example.tests[0].rejected[-2] for example in convert_prefeval(path, seed=1).examples}
    assert rejected == set("abc")


@pytest.mark.parametrize(
    ("part", "forms"),
    [
        ("implicit_preference", {"choice", "persona"}),
        ("implicit_preference/choice-based", {"choice"}),
        ("implicit_preference/persona-driven/hats.json", {"persona"}),
        ("explicit_preference/hats.json", {"explicit"}),
        ("mcq_options", {"explicit"}),
        ("mcq_options/hats.json", {"explicit"}),
    ],
)
def test_a_part_of_the_folder_will_do(folder: Path, part: str, forms: set[str]) -> None:
    examples = convert_prefeval(folder / part).examples
    assert {example.facts["form"] for example in examples} == forms
    assert len(examples) == 3 * len(forms)


def test_a_path_may_be_relative(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = convert_prefeval(folder / FOLDERS["choice"]).examples
    monkeypatch.chdir(folder / FOLDERS["choice"])
    assert convert_prefeval(Path()).examples == convert_prefeval(Path("hats.json")).examples == examples


def test_broken_items_are_dropped_with_file_index_field_and_reason(folder: Path) -> None:
    save(
        folder / FOLDERS["choice"] / "hats.json",
        [
            choice(0) | {"question": "Something else?"},
            {name: value for name, value in choice(1).items() if name != "conversation"},
            choice(2) | {"conversation": choice(2)["conversation"] | {"user_selection": ""}},
            choice(3),
        ],
    )
    save(folder / FOLDERS["persona"] / "hats.json", ["text", persona(1) | {"conversation": {}}, persona(2)])
    save(
        folder / FOLDERS["options"] / "hats.json",
        [
            options(0),
            options(1) | {"classification_task_options": ["One.", "One. "]},
            options(2) | {"classification_task_options": ["Only one."]},
        ],
    )
    save(folder / "turns.json", [{"conversation_id": "x"}])
    conversion = convert_prefeval(folder)
    assert [(item.place, item.reason.split(",")[0]) for item in conversion.dropped] == [
        ("turns.json", "contains no items"),
        ("explicit_preference/hats.json[1].classification_task_options", "all options are the same text"),
        (
            "mcq_options/hats.json[2].classification_task_options",
            "list should have at least 2 items after validation",
        ),
        ("implicit_preference/choice-based/hats.json[0].question", "is not the question in mcq_options"),
        ("implicit_preference/choice-based/hats.json[1].conversation", "field required"),
        (
            "implicit_preference/choice-based/hats.json[2].conversation.user_selection",
            "string should have at least 1 character",
        ),
        ("implicit_preference/choice-based/hats.json[3]", "has no options in mcq_options"),
        ("implicit_preference/persona-driven/hats.json[0]", "is not a JSON object"),
        (
            "implicit_preference/persona-driven/hats.json[1].conversation",
            "dictionary should have at least 1 item after validation",
        ),
        (
            "mcq_options/hats.json[2].classification_task_options",
            "list should have at least 2 items after validation",
        ),
    ]
    assert [example.user.user_id for example in conversion.examples] == ["explicit-hats-000"]


def test_a_second_copy_of_a_file_is_not_counted_twice(folder: Path) -> None:
    shutil.copytree(folder / "explicit_preference", folder / "old" / "explicit_preference")
    shutil.copytree(folder / "mcq_options", folder / "old" / "mcq_options")
    conversion = convert_prefeval(folder)
    assert len(conversion.examples) == 9
    assert [item.place for item in conversion.dropped] == [f"old/explicit_preference/hats.json[{n}]" for n in range(3)]


@pytest.mark.parametrize("form", FOLDERS)
def test_a_file_outside_the_publishers_folder_is_known_by_its_items(folder: Path, form: str) -> None:
    elsewhere = folder / "elsewhere"
    (elsewhere / "mcq_options").mkdir(parents=True)
    shutil.copy(folder / FOLDERS[form] / "hats.json", elsewhere / "hats.json")
    if form != "options":
        shutil.copy(folder / FOLDERS["options"] / "hats.json", elsewhere / "mcq_options" / "hats.json")
    expected = convert_prefeval(folder / FOLDERS[form] / "hats.json").examples
    assert convert_prefeval(elsewhere / "hats.json").examples == expected


def test_files_that_cannot_be_used_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "turns.json").write_text('[{"conversation": []}]')
    with pytest.raises(InputError, match=r"its items were not found in mcq_options/turns\.json"):
        convert_prefeval(folder / "turns.json")
    with pytest.raises(InputError, match="cannot be read"):
        convert_prefeval(folder / "nothing")
    (folder / "explicit_preference" / "hats.json").write_text("{}")
    with pytest.raises(InputError, match="is not a list of items"):
        convert_prefeval(folder)
    shutil.rmtree(folder / "mcq_options")
    with pytest.raises(InputError, match=r"not found in mcq_options/hats\.json; keep the file"):
        convert_prefeval(folder / "implicit_preference")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="contains no usable items"):
        convert_prefeval(tmp_path / "empty")


def shared_texts(first: Conversion, second: Conversion, name: str) -> set[str]:
    """What occurs in both: values of a fact, or prompts."""
    texts = [
        {text_key(example.tests[0].prompt if name == "question" else example.facts[name]) for example in part.examples}
        for part in (first, second)
    ]
    return texts[0] & texts[1]


def test_whole_topics_are_for_evaluation(folder: Path) -> None:
    for topic in range(4):
        for form, name in FOLDERS.items():
            # Topics 1 and 2 share a question.
            numbers = [10 * topic, 10 * topic + 1, 5 if topic in (1, 2) else 10 * topic + 2]
            save(folder / name / f"topic{topic}.json", [MAKE[form](number) for number in numbers])
    (folder / FOLDERS["persona"] / "hats.json").write_text('["text"]')
    sizes = set()
    for seed in range(6):
        train, evaluation = split_prefeval(folder, fraction=0.25, seed=seed)
        topics = {example.facts["topic"] for example in evaluation.examples}
        assert not any(shared_texts(train, evaluation, name) for name in ("topic", "preference", "question"))
        assert ("topic1" in topics) == ("topic2" in topics)
        whole = convert_prefeval(folder, seed=seed)
        assert len(train.examples) + len(evaluation.examples) == len(whole.examples)
        assert train.dropped == whole.dropped and evaluation.dropped == ()
        sizes.add(frozenset(topics))
    assert len(sizes) > 1
    with pytest.raises(InputError, match="in 1 group by common texts; a fraction of"):
        split_prefeval(folder / FOLDERS["choice"] / "hats.json", fraction=0.25)


def test_the_publishers_folder_divides_by_topics(shared_data: Path) -> None:
    train, evaluation = split_prefeval(shared_data / "prefeval", fraction=0.3)
    assert not any(shared_texts(train, evaluation, name) for name in ("topic", "preference", "question"))
    assert abs(len(evaluation.examples) / (len(train.examples) + len(evaluation.examples)) - 0.3) < 0.05


def test_the_publishers_folder(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "prefeval"
    conversion = convert_prefeval(folder)
    for form, name in list(FOLDERS.items())[:3]:
        records = [entry for path in sorted((folder / name).glob("*.json")) for entry in json.loads(path.read_text())]
        examples = by_form(conversion.examples, form)
        assert [example.facts["preference"] for example in examples] == [entry["preference"] for entry in records]
        assert [example.tests[0].prompt for example in examples] == [entry["question"] for entry in records]
        assert all(example.user.signals[0].is_evidence for example in examples)
    # Beside the items there is one file, of dialogues that are about something else.
    assert [item.place for item in conversion.dropped] == ["filtered_inter_turns.json"]
    write_jsonl(tmp_path / "prefeval.jsonl", conversion.examples)
    assert tuple(read_examples(tmp_path / "prefeval.jsonl")) == conversion.examples
