"""PrefEval: a preference, shown in one of three forms, and a question that it bears on (amazon-science/PrefEval).

Each item is a user in each form: the preference is stated, or shown by a choice among options that an assistant gave,
or told in passing in a dialogue. The test is the item's question, with the option that follows the preference against
one of those that do not. The true preference is known, so the faithfulness of a summary can be checked.

The test of an item is the same in every form, so its users do not witness independently: they share a ``cluster``, and
intervals resample clusters.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from popi.claims import as_text
from popi.data.convert import Conversion, Dropped, check_any, read_records
from popi.data.example import HeldOutPair, PersonalizationExample
from popi.errors import InputError
from popi.io import validate
from popi.signals import Conversation, Speaker, Statement, Text, Turn, UserSignals
from popi.summary import Claim

OPTIONS = "mcq_options"
"""The folder that has a file for each topic, with the options of each of its items."""

ORIGIN = "prefeval"


class _Explicit(BaseModel):
    """An item that states its preference."""

    model_config = ConfigDict(str_strip_whitespace=True)
    form: ClassVar[str] = "explicit"

    preference: Text
    question: Text
    explanation: str = ""

    def signal(self) -> Statement | Conversation:
        return Statement(text=self.preference, origin=ORIGIN)

    def facts(self) -> dict[str, str]:
        return {"form": self.form, "preference": self.preference, "explanation": self.explanation}


class _Choice(BaseModel):
    model_config = ConfigDict(str_strip_whitespace=True)

    query: Text
    assistant_options: Text
    user_selection: Text
    assistant_acknowledgment: Text


class _ByChoice(_Explicit):
    """An item whose preference shows in a choice."""

    form = "choice"

    conversation: _Choice

    def signal(self) -> Conversation:
        said = self.conversation
        return _conversation(said.query, said.assistant_options, said.user_selection, said.assistant_acknowledgment)


class _Exchange(BaseModel):
    model_config = ConfigDict(str_strip_whitespace=True)

    user: Text
    assistant: Text


class _InDialogue(_Explicit):
    """An item whose preference is told in passing."""

    form = "persona"

    persona: Text
    conversation: dict[str, _Exchange] = Field(min_length=1)

    def signal(self) -> Conversation:
        return _conversation(*(text for part in self.conversation.values() for text in (part.user, part.assistant)))

    def facts(self) -> dict[str, str]:
        return super().facts() | {"persona": self.persona}


class _Options(BaseModel):
    """What an item asks, and answers of which the first follows the preference and the others do not."""

    model_config = ConfigDict(str_strip_whitespace=True)

    question: Text
    classification_task_options: list[Text] = Field(min_length=2)


def _conversation(*texts: str) -> Conversation:
    speakers = (Speaker.USER, Speaker.ASSISTANT)
    turns = tuple(Turn(speaker=speakers[place % 2], text=text) for place, text in enumerate(texts))
    return Conversation(turns=turns, origin=ORIGIN)


FORMS: dict[str, type[_Explicit]] = {
    "explicit_preference": _Explicit,
    OPTIONS: _Explicit,
    "choice-based": _ByChoice,
    "persona-driven": _InDialogue,
}
"""What the items of the publisher's folders are; each folder has a file a topic."""


def convert_prefeval(path: Path, *, seed: int = 0) -> Conversion:
    """Makes a user of each item in each form.

    Args:
        path: The publisher's folder, one of the folders in it, or one file of these.
        seed: Another seed chooses other dispreferred options. An item has the same test in every form.

    Raises:
        InputError: If the files are not what they should be, or the options of a file are not to be found.
    """
    examples: dict[str, PersonalizationExample] = {}
    files, dropped = _find(path)
    for file in files:
        records = read_records(file, holds="items with a preference and a question")
        options = _options_of(file, records)
        for index, record in enumerate(records):
            try:
                example = _example(file, index, record, options, seed)
            except InputError as error:
                name = str(error.file) if error.file else _name(file, path)
                dropped.append(Dropped(error.what, name, index, error.field or ""))
                continue
            if examples.setdefault(example.user.user_id, example) is not example:
                dropped.append(Dropped("a file of the same form and topic came before", _name(file, path), index))
    check_any(path, examples, dropped, what="item that can be used")
    return Conversion(tuple(examples.values()), tuple(dropped))


def _find(path: Path) -> tuple[list[Path], list[Dropped]]:
    """The files of items, and those that are something else; options are items only where there are no others."""
    if not path.is_dir():
        if path.exists() and path.absolute().parent.name not in FORMS:
            raise InputError(f"lies in none of {', '.join(FORMS)}", file=path, fix="keep it in its publisher's folder")
        return [path], []
    found = sorted(path.rglob("*.json"))
    items = [file for file in found if file.absolute().parent.name in FORMS]
    others = [Dropped("holds no items", _name(file, path)) for file in found if file not in items]
    return [file for file in items if file.absolute().parent.name != OPTIONS] or items, others


def _name(file: Path, path: Path) -> str:
    return file.relative_to(path).as_posix() if path.is_dir() else file.name


def _options_of(file: Path, records: list[Any]) -> list[Any]:
    """The options of a file's items: in the items themselves, or in the file of its name beside its folder."""
    if file.absolute().parent.name == OPTIONS:
        return records
    for parent in file.absolute().parents[1:3]:
        if (parent / OPTIONS / file.name).is_file():
            return read_records(parent / OPTIONS / file.name, holds="items with their options")
    raise InputError(
        "its options are not to be found", file=file, fix=f"put the publisher's {OPTIONS} beside its folder"
    )


def _example(file: Path, index: int, record: object, options: list[Any], seed: int) -> PersonalizationExample:
    item = validate(FORMS[file.absolute().parent.name], record)
    if index >= len(options):
        raise InputError(f"has no options in {OPTIONS}")
    choices = validate(_Options, options[index], file=Path(OPTIONS, file.name))
    if choices.question != item.question:
        raise InputError(f"asks something else than in {OPTIONS}", field="question")
    follows, *others = choices.classification_task_options
    violating = [option for option in others if option != follows]
    if not violating:
        raise InputError("all options are the same text", field="classification_task_options")
    rejected = Random(f"{seed}/{file.stem}/{index}").choice(violating)
    return PersonalizationExample(
        user=UserSignals(user_id=f"{item.form}-{file.stem}-{index:03d}", signals=(item.signal(),)),
        tests=(HeldOutPair(prompt=item.question, chosen=follows, rejected=rejected),),
        oracles={"truth": as_text([Claim(text=item.preference)])},
        facts={"dataset": "prefeval", "topic": file.stem, "cluster": f"{file.stem}-{index:03d}", **item.facts()},
    )
