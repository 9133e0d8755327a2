"""Cutting long answers by one rule, so that both responses of a pair fit into a small model's memory.

The rule reads nothing but the answer itself, so it is the same for chosen and rejected responses. It can still move the
mean lengths of the two sides nearer to each other or further apart, and evidence beyond the limit is lost. The report
therefore has the lengths of both sides, before and after.

A word is what white space separates. In scripts that write sentences without spaces (Chinese, Japanese, Thai, Lao,
Khmer, Burmese, Tibetan) each letter is a word, as most word processors count Chinese. Korean has spaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from popi.data.convert import Conversion, Dropped
from popi.data.example import HeldOutPair, PersonalizationExample, find_unusable
from popi.errors import InputError
from popi.signals import Comment, Edit, PreferencePair, Rating, Signal

MARK = "…"
"""Ends an answer that was cut inside a sentence. No space precedes it, so it is not another word."""

SIDES = {"chosen": "chosen", "rejected": "rejected", "response": "other", "original": "other", "edited": "other"}
"""The fields with answers, and the rows of the report that count them."""

_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u0f40-\u0fbc"  # Tibetan letters
    "\u1000-\u109f\u1780-\u17d3"  # Burmese, Khmer
    "\u3005-\u3007\u3041-\u30ff\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9d"  # kana, bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # ideographs
)
# Combining marks and punctuation belong to the letter before them. Neither matches \w.
_WORD = re.compile(rf"[{_UNSPACED}][^\w\s]*|[^\s{_UNSPACED}]+")
_STOPS = ".!?\u3002\uff01\uff1f\uff0e\uff61\u061f\u06d4\u0964\u0965\u0589\u1362\u104b\u17d4"
"""Full stops, question and exclamation marks: Latin, Chinese and Japanese, Arabic, Urdu, Hindi, Armenian, ..."""
_CLOSERS = "\"'\u201d\u2019\u00bb)\\]}*_\u300d\u300f\uff09\u3011\u300b"
_SENTENCE_END = re.compile(rf"[{_STOPS}]+[{_CLOSERS}]*$")
_NUMBERING = re.compile(r"\W*(\d{1,2}|[^\W\d_])\.\W*")
"""The number of a list item, or an initial: its full stop does not end a sentence."""


def count_words(text: str) -> int:
    """Counts words, or letters in scripts without spaces.

    Example:
        >>> count_words("Fill it to here."), count_words("加水到这里。")
        (4, 5)
    """
    return sum(1 for _ in _WORD.finditer(text))


def cut_text(text: str, max_words: int) -> str:
    """Cuts a text at its last sentence end within the limit.

    If this would leave less than half of the limit, the text is cut after the last word within the limit, and
    :data:`MARK` is added. A text within the limit is unchanged.

    Example:
        >>> cut_text("Fill it to here. Then wait for an hour.", 6)
        'Fill it to here.'
        >>> cut_text("Yes. Fill it to here, then wait.", 6)
        'Yes. Fill it to here, then…'

    Args:
        text: The text.
        max_words: Maximum number of words; see the module for what a word is.
    """
    words = list(islice(_WORD.finditer(text), max_words + 1))
    if len(words) <= max_words:
        return text
    for place in range(max_words - 1, -1, -1):
        if 2 * (place + 1) < max_words:
            break
        if _ends_sentence(words[place].group(), words[place + 1].group()):
            return text[: words[place].end()]
    return text[: words[max_words - 1].end()] + MARK


def _ends_sentence(word: str, following: str) -> bool:
    """Whether a sentence ends with a word. ``e.g. this`` does not end one, because a small letter follows."""
    return bool(_SENTENCE_END.search(word)) and not _NUMBERING.fullmatch(word) and not following[0].islower()


@dataclass(slots=True)
class Lengths:
    """The answers of one side, in words.

    Example:
        >>> lengths = Lengths()
        >>> lengths.add("Fill it to here. Then wait.", "Fill it to here.")
        >>> lengths.summary()
        {'answers': 1, 'cut': 1, 'marked': 0, 'words_before': 6.0, 'words_after': 4.0}

    Attributes:
        answers: Number of answers.
        cut: Number of those that were cut.
        marked: Number of those that were cut inside a sentence.
        before: Number of words before.
        after: Number of words after.
    """

    answers: int = 0
    cut: int = 0
    marked: int = 0
    before: int = 0
    after: int = 0

    def add(self, old: str, new: str) -> None:
        """Counts an answer."""
        self.answers += 1
        self.cut += old != new
        self.marked += old != new and new.endswith(MARK)
        self.before += count_words(old)
        self.after += count_words(new)

    def summary(self) -> dict[str, int | float]:
        """The counts and the mean numbers of words."""
        answers = max(self.answers, 1)
        return {
            "answers": self.answers,
            "cut": self.cut,
            "marked": self.marked,
            "words_before": round(self.before / answers, 2),
            "words_after": round(self.after / answers, 2),
        }


@dataclass
class AnswerCutter:
    """Cuts the answers of examples, and counts them by side.

    The answers are the responses of pairs, ratings and edits, and the text that a comment is about. Turns of
    conversations are left whole, because later turns refer to them. The rule and the number of cut answers are recorded
    in the facts of each user: ``max_words`` and ``cut_answers``.

    Example:
        >>> from popi.signals import UserSignals
        >>> pair = HeldOutPair(prompt="How much?", chosen="To here.", rejected="Fill it to here. Then wait.")
        >>> cutter = AnswerCutter(max_words=4)
        >>> made = cutter.cut(Conversion((PersonalizationExample(user=UserSignals(user_id="ann"), tests=(pair,)),), ()))
        >>> made.examples[0].tests[0].rejected, made.examples[0].facts
        ('Fill it to here.', {'max_words': 4, 'cut_answers': 1})

    Attributes:
        max_words: Maximum number of words of an answer.
        lengths: The lengths by side: chosen, rejected, and other for answers that are in no pair.

    Raises:
        InputError: If the limit is less than 1.
    """

    max_words: int
    lengths: dict[str, Lengths] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_words < 1:
            raise InputError(f"must be positive, got {self.max_words}", field="max_words")

    def cut(self, conversion: Conversion, file: str = "") -> Conversion:
        """Cuts the answers of all examples.

        Pairs and signals that cannot be used any more are dropped: both sides have become the same text, or the
        same as those of another pair or signal.

        Args:
            conversion: The examples.
            file: The name of the converted file, for what is dropped.
        """
        dropped: list[Dropped] = []
        examples = tuple(self._cut_example(example, file, dropped) for example in conversion.examples)
        return Conversion(examples, (*conversion.dropped, *dropped))

    def summary(self) -> list[dict[str, str | int | float]]:
        """The report, one record per side."""
        return [
            {"side": side, "max_words": self.max_words, **self.lengths[side].summary()}
            for side in dict.fromkeys(SIDES.values())
            if side in self.lengths
        ]

    def _cut_example(
        self, example: PersonalizationExample, file: str, dropped: list[Dropped]
    ) -> PersonalizationExample:
        before = sum(lengths.cut for lengths in self.lengths.values())

        def drop(reason: str, field: str) -> None:
            dropped.append(Dropped(reason, file, field=field, user=example.user.user_id))

        signals: dict[str, Signal] = {}
        for place, signal in enumerate(example.user.signals):
            cut = self._cut_signal(signal)
            if cut is None:
                drop("both responses are the same text after cutting", f"signals.{place}")
            elif signals.setdefault(cut.id, cut) is not cut:
                drop("repeats an earlier signal after cutting", f"signals.{place}")
        user = example.user.model_copy(update={"signals": tuple(signals.values())})
        pairs: dict[int, HeldOutPair] = {}
        for place, pair in enumerate(example.tests):
            texts = self._cut_fields(pair, ("chosen", "rejected"))
            if texts["chosen"] == texts["rejected"]:
                drop("both responses are the same text after cutting", f"tests.{place}")
            else:
                pairs[place] = pair.model_copy(update=texts)
        unusable = find_unusable(user, tuple(pairs.values()))
        for number, place in enumerate(list(pairs)):
            if number in unusable:
                drop(f"{unusable[number]}, after cutting", f"tests.{place}")
                del pairs[place]
        count = sum(lengths.cut for lengths in self.lengths.values()) - before
        facts = {**example.facts, "max_words": self.max_words, "cut_answers": count}
        return example.model_copy(update={"user": user, "tests": tuple(pairs.values()), "facts": facts})

    def _cut_signal(self, signal: Signal) -> Signal | None:
        """The signal with its answers cut; ``None`` if it says nothing any more."""
        match signal:
            case PreferencePair():
                texts = self._cut_fields(signal, ("chosen", "rejected"))
            case Edit():
                texts = self._cut_fields(signal, ("original", "edited"))
            case Rating():
                texts = self._cut_fields(signal, ("response",))
            case Comment() if signal.about:
                texts = self._cut_fields(signal, ("about",))
            case _:
                return signal
        if len(texts) > 1 and len(set(texts.values())) == 1:
            return None
        content = signal.model_dump(exclude={"id"})
        # An id that was derived from the content changes with it; one that was given stays.
        given = {"id": signal.id} if type(signal)(**content).id != signal.id else {}
        return type(signal)(**content | texts | given)

    def _cut_fields(self, item: Signal | HeldOutPair, names: Iterable[str]) -> dict[str, str]:
        texts = {}
        for name in names:
            old: str = getattr(item, name)
            texts[name] = cut_text(old, self.max_words)
            self.lengths.setdefault(SIDES.get(name, "other"), Lengths()).add(old, texts[name])
        return texts
