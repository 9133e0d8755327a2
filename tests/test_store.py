from __future__ import annotations

import pytest

from popi.signals import Statement, UserSignals
from popi.store import InferenceKey, Version, current_version, edited_summary
from popi.summary import Author, Claim, Provenance, summarize_claims

MADE = Provenance(author=Author.INFERRED, model="w", template_hash="t")
KEY = InferenceKey(signals_digest="d", template_hash="t", writer="w")


def version(number: int, text: str, *, edit: bool = False, withdrawn: bool = False) -> Version:
    summary = summarize_claims("ann", [Claim(text=text, evidence=("s",))], MADE)
    return Version(number=number, interface=summary, key=None if edit else KEY, withdrawn=withdrawn)


FIRST, EDIT, SECOND, UNDONE = (
    version(1, "first"),
    version(2, "edit", edit=True),
    version(3, "second"),
    version(4, "undone", edit=True, withdrawn=True),
)


@pytest.mark.parametrize(
    ("history", "holds"),
    [
        ([], None),
        ([FIRST], FIRST),
        ([FIRST, SECOND], SECOND),
        ([FIRST, EDIT, SECOND], EDIT),
        ([FIRST, SECOND, UNDONE], SECOND),
        ([FIRST, EDIT, SECOND, UNDONE], EDIT),
        ([UNDONE], None),
    ],
)
def test_the_last_edit_holds_else_the_last_inferred_version(history: list[Version], holds: Version | None) -> None:
    assert current_version(history) is holds


def test_a_version_is_read_back_from_json() -> None:
    assert Version.model_validate_json(EDIT.model_dump_json()) == EDIT


def test_an_edit_keeps_the_evidence_of_unchanged_claims_and_where_it_comes_from() -> None:
    user = UserSignals(user_id="ann", signals=(Statement(text="short please"),))
    edited = edited_summary(user, FIRST, "- first\n- mine")
    assert [claim.evidence for claim in edited.claims] == [("s",), ()]
    assert (edited.provenance.model, edited.provenance.author) == ("w", Author.EDITED)
    fresh = edited_summary(user, None, "- mine")
    assert (fresh.text, fresh.provenance.signals_digest) == ("- mine", user.digest())
