"""PrefEval: a preference in one of three forms, and a question for which it matters (amazon-science/PrefEval).

Each item becomes one user per form: the preference is stated, shown by a choice among options that an assistant gave,
or mentioned in a dialogue. The held-out pair is the item's question with two options: the one that follows the
preference, and a random one that violates it. The true preference is known, so that the faithfulness of a summary can
be checked.

The held-out pair of an item is the same in every form, so its users are not independent: they have the same
``cluster``, and confidence intervals resample clusters.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any, ClassVar

from pydantic import ConfigDict, Field

from popi.claims import as_text
from popi.data.convert import Conversion, Dropped, check_any, divide, read_records
from popi.data.example import HeldOutPair, PersonalizationExample
from popi.errors import InputError
from popi.io import validate
from popi.signals import Conversation, FileRecord, Speaker, Statement, Text, Turn, UserSignals
from popi.summary import Claim

OPTIONS = "mcq_options"
"""The folder with the options of the items, one file per topic."""

ORIGIN = "prefeval"


class _Explicit(FileRecord):
    """An item that states its preference."""

    model_config = ConfigDict(extra="ignore")
    form: ClassVar[str] = "explicit"

    preference: Text
    question: Text
    explanation: str = ""

    def signal(self) -> Statement | Conversation:
        return Statement(text=self.preference, origin=ORIGIN)

    def facts(self) -> dict[str, str]:
        return {"form": self.form, "preference": self.preference, "explanation": self.explanation}


class _Choice(FileRecord):
    model_config = ConfigDict(extra="ignore")

    query: Text
    assistant_options: Text
    user_selection: Text
    assistant_acknowledgment: Text


class _ByChoice(_Explicit):
    """An item that shows its preference by a choice."""

    form = "choice"

    conversation: _Choice

    def signal(self) -> Conversation:
        said = self.conversation
        return _conversation(said.query, said.assistant_options, said.user_selection, said.assistant_acknowledgment)


class _Exchange(FileRecord):
    model_config = ConfigDict(extra="ignore")

    user: Text
    assistant: Text


class _InDialogue(_Explicit):
    """An item that mentions its preference in a dialogue."""

    form = "persona"

    persona: Text
    conversation: dict[str, _Exchange] = Field(min_length=1)

    def signal(self) -> Conversation:
        return _conversation(*(text for part in self.conversation.values() for text in (part.user, part.assistant)))

    def facts(self) -> dict[str, str]:
        return super().facts() | {"persona": self.persona}


class _Options(FileRecord):
    """The question of an item, and responses. The first one follows the preference, and the others violate it."""

    model_config = ConfigDict(extra="ignore")

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
"""The types of the items in the publisher's folders, which have one file per topic."""


def convert_prefeval(path: Path, *, seed: int = 0) -> Conversion:
    """Makes a user from each item in each form.

    Args:
        path: The publisher's folder, a folder in it, or one file.
        seed: Determines the rejected options. An item has the same held-out pair in every form.

    Raises:
        InputError: If the files are not in this format, or the options of a file were not found.
    """
    examples: dict[str, PersonalizationExample] = {}
    files, dropped = _find(path)
    for file in files:
        records = read_records(file, of="items with a preference and a question")
        form = _form_of(file, records)
        options = _options_of(file, records)
        for index, record in enumerate(records):
            try:
                example = _example(file, form, index, record, options, seed)
            except InputError as error:
                name = str(error.file) if error.file else _name(file, path)
                dropped.append(Dropped(error.what, name, index, field=error.field or ""))
                continue
            if examples.setdefault(example.user.user_id, example) is not example:
                dropped.append(Dropped("an earlier file has the same form and topic", _name(file, path), index))
    check_any(path, examples, dropped, what="usable items", fix="give the publisher's files unchanged")
    return Conversion(tuple(examples.values()), tuple(dropped))


def split_prefeval(path: Path, *, fraction: float, seed: int = 0) -> tuple[Conversion, Conversion]:
    """Makes users for training and users for evaluation, who have no topic, question or preference in common.

    Topics that share a question or a preference stay together.

    Args:
        path: The publisher's folder, or a folder in it.
        fraction: Fraction of the users that are for evaluation, to the nearest whole topics.
        seed: Determines the division, and the rejected options.

    Returns:
        The users for training and the users for evaluation. All that was dropped is in the first.

    Raises:
        InputError: If the files are not in this format, the fraction is not between 0 and 1, or there are too few
            topics.
    """

    def texts_of(example: PersonalizationExample) -> tuple[str, ...]:
        facts = example.facts
        return f"topic {facts['topic']}", f"preference {facts['preference']}", f"question {example.tests[0].prompt}"

    made = convert_prefeval(path, seed=seed)
    train, evaluation = divide(made.examples, texts_of, fraction=fraction, seed=seed, file=path)
    return Conversion(tuple(train), made.dropped), Conversion(tuple(evaluation), ())


def _find(path: Path) -> tuple[list[Path], list[Dropped]]:
    """The files of items, and the other files. Options are items only if there are no other items."""
    if not path.is_dir():
        return [path], []
    found = sorted(path.rglob("*.json"))
    items = [file for file in found if file.absolute().parent.name in FORMS]
    others = [Dropped("contains no items", _name(file, path)) for file in found if file not in items]
    return [file for file in items if file.absolute().parent.name != OPTIONS] or items, others


def _name(file: Path, path: Path) -> str:
    return file.relative_to(path).as_posix() if path.is_dir() else file.name


def _form_of(file: Path, records: list[Any]) -> type[_Explicit]:
    """The form of a file's items, by its folder; for a file from elsewhere by the first item."""
    folder = file.absolute().parent.name
    if folder in FORMS:
        return FORMS[folder]
    first = records[0] if records and isinstance(records[0], dict) else {}
    if "conversation" not in first:
        return _Explicit
    return _InDialogue if "persona" in first else _ByChoice


def _options_of(file: Path, records: list[Any]) -> list[Any]:
    """The options of a file's items: in the items themselves, or in the file of the same name in ``OPTIONS``."""
    if file.absolute().parent.name == OPTIONS or (
        records and isinstance(records[0], dict) and "classification_task_options" in records[0]
    ):
        return records
    for parent in file.absolute().parents[:3]:
        if (parent / OPTIONS / file.name).is_file():
            return read_records(parent / OPTIONS / file.name, of="items with their options")
    raise InputError(
        f"the options of its items were not found in {OPTIONS}/{file.name}",
        file=file,
        fix=f"keep the file in the publisher's folder, with {OPTIONS} next to its folder",
    )


def _example(
    file: Path, form: type[_Explicit], index: int, record: object, options: list[Any], seed: int
) -> PersonalizationExample:
    item = validate(form, record)
    if index >= len(options):
        raise InputError(f"has no options in {OPTIONS}")
    choices = validate(_Options, options[index], file=Path(OPTIONS, file.name))
    if choices.question != item.question:
        raise InputError(f"is not the question in {OPTIONS}", field="question")
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
