"""What a personalizer relies on, for every store."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from threading import Thread

import pytest

from popi.errors import InputError
from popi.interface import UserEmbedding
from popi.signals import Statement
from popi.store import InferenceKey, Store, Version
from popi.summary import NO_EVIDENCE, Author, Claim, PreferenceSummary, Provenance, summarize_claims
from tests.forks import needs_fork, succeeds_in_child

SHORT, LONG = Statement(text="short please"), Statement(text="longer please")


def summary(text: str, user_id: str = "ann", *evidence: str) -> PreferenceSummary:
    return summarize_claims(user_id, [Claim(text=text, evidence=evidence)], Provenance(author=Author.INFERRED))


def key(store: Store, user_id: str = "ann") -> InferenceKey:
    """The key of an inference from the signals that are stored now."""
    return InferenceKey(signals_digest=store.signals(user_id).digest(), template_hash="t", writer="w")


def add(store: Store, text: str, user_id: str = "ann") -> Version:
    version = store.add_inferred(summary(text, user_id), key(store, user_id))
    assert version is not None
    return version


def test_an_unknown_user_has_nothing(store: Store) -> None:
    assert store.signals("ann").user_id == "ann"
    assert store.signals("ann").signals == ()
    assert (store.history("ann"), store.current("ann"), store.users()) == ((), None, [])
    assert not store.withdraw_edit("ann")
    assert not store.delete("ann")
    store.add_signals("ann")
    assert store.users() == []


def test_signals_are_added_in_order_and_stored_once(store: Store) -> None:
    store.add_signals("ann", SHORT)
    user = store.add_signals("ann", LONG, SHORT)
    assert user == store.signals("ann")
    assert user.signals == (SHORT, LONG)


def test_signals_of_which_one_has_the_id_of_another_are_not_added(store: Store) -> None:
    store.add_signals("ann", SHORT)
    with pytest.raises(InputError, match="already has a different signal"):
        store.add_signals("ann", LONG, Statement(id=SHORT.id, text="something else"))
    assert store.signals("ann").signals == (SHORT,)


def test_an_id_is_the_same_user_with_and_without_white_space(store: Store) -> None:
    store.add_signals(" ann ", SHORT)
    store.add_inferred(summary("short", "ann"), key(store, "ann "))
    store.edit("\tann", "- mine")
    assert store.users() == ["ann"]
    for name in ("ann", "ann "):
        assert len(store.history(name)) == 2
        assert store.current(name) == store.history(name)[-1]
        assert store.signals(name).signals == (SHORT,)
    assert store.withdraw_edit(" ann")
    assert store.delete("ann  ")
    assert store.users() == []


def test_an_id_is_the_same_user_however_its_characters_are_encoded(store: Store) -> None:
    store.add_signals("Jose\u0301", SHORT)
    assert store.signals("Jos\u00e9").signals == (SHORT,) and store.users() == ["Jos\u00e9"]
    store.edit("Jos\u00e9", "- mine")
    assert store.current("Jose\u0301") is not None
    assert store.delete("Jose\u0301") and store.users() == []


def test_an_empty_id_is_refused(store: Store) -> None:
    for call in (store.signals, store.history, store.add_signals, store.current, store.delete, store.withdraw_edit):
        with pytest.raises(InputError, match="the id of the user is empty"):
            call(" ")


def test_versions_are_kept_with_what_they_were_inferred_from(store: Store) -> None:
    before = datetime.now(UTC)
    store.add_signals("ann", SHORT)
    first_key = key(store)
    first = add(store, "short")
    store.add_signals("ann", LONG)
    second = add(store, "long")
    assert store.history("ann") == (first, second)
    assert store.current("ann") == second
    assert [(version.number, version.interface.text) for version in (first, second)] == [(1, "- short"), (2, "- long")]
    assert (first.key, second.key) == (first_key, key(store))
    assert not first.is_edit
    assert before <= first.time <= second.time


def test_an_embedding_is_kept_as_it_is(store: Store) -> None:
    store.add_signals("ann", SHORT)
    embedding = UserEmbedding(user_id="ann", vectors=((0.5, -1.0), (1e-8, 2.0)), model_fingerprint="f")
    store.add_inferred(embedding, key(store))
    current = store.current("ann")
    assert current is not None
    assert current.interface == embedding
    assert store.edit("ann", "- mine").interface.text == "- mine"


def test_what_was_inferred_from_other_signals_is_not_stored(store: Store) -> None:
    store.add_signals("ann", SHORT)
    old = key(store)
    store.add_signals("ann", LONG)
    assert store.add_inferred(summary("short"), old) is None
    assert store.history("ann") == ()


@pytest.mark.parametrize("returns", [False, True])
def test_what_was_inferred_from_deleted_signals_is_not_stored(store: Store, returns: bool) -> None:
    store.add_signals("ann", SHORT)
    old = key(store)
    store.delete("ann")
    if returns:
        store.add_signals("ann", LONG)
    assert store.add_inferred(summary("short"), old) is None
    assert store.history("ann") == ()
    assert store.users() == (["ann"] if returns else [])


def test_an_edit_holds_until_it_is_withdrawn(store: Store) -> None:
    store.add_signals("ann", SHORT)
    store.add_inferred(summary("short", "ann", SHORT.id), key(store))
    edited = store.edit("ann", "- short\n- rhymes")
    assert edited.is_edit
    assert isinstance(edited.interface, PreferenceSummary)
    assert edited.interface.provenance.author is Author.EDITED
    assert [claim.evidence for claim in edited.interface.claims] == [(SHORT.id,), ()]
    store.add_signals("ann", LONG)
    later = add(store, "long")
    assert store.current("ann") == edited
    second = store.edit("ann", "- rhymes only")
    assert store.current("ann") == second

    assert store.withdraw_edit("ann")
    assert not store.withdraw_edit("ann")
    assert store.current("ann") == later
    assert [version.withdrawn for version in store.history("ann")] == [False, True, False, True]
    assert [version.number for version in store.history("ann")] == [1, 2, 3, 4]


def test_an_edit_needs_no_summary(store: Store) -> None:
    assert store.edit("ann", "- mine").interface.text == "- mine"
    assert store.users() == ["ann"]
    nothing = store.edit("ann", " ").interface
    assert isinstance(nothing, PreferenceSummary)
    assert (nothing.text, nothing.status) == (NO_EVIDENCE, "not_enough_evidence")
    assert store.withdraw_edit("ann")
    assert store.current("ann") is None


def test_deleting_a_user_leaves_nothing_of_them_and_all_of_the_others(store: Store) -> None:
    for name in ("ann", "bob"):
        store.add_signals(name, SHORT)
        add(store, "short", name)
        store.edit(name, "- mine")
    kept = store.history("bob")
    assert store.delete("ann")
    assert store.users() == ["bob"]
    assert (store.signals("ann").signals, store.history("ann"), store.current("ann")) == ((), (), None)
    assert store.history("bob") == kept
    store.add_signals("ann", LONG)
    assert store.users() == ["bob", "ann"]
    assert add(store, "long").number == 1


def test_what_is_returned_is_not_changed_by_later_calls(store: Store) -> None:
    user, history, users = store.add_signals("ann", SHORT), store.history("ann"), store.users()
    store.add_signals("ann", LONG)
    store.edit("bob", "- mine")
    assert (user.signals, history, users) == ((SHORT,), (), ["ann"])


def in_threads(*work: Callable[[], object]) -> None:
    threads = [Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_lose_nothing(store: Store) -> None:
    def observe(thread: int) -> None:
        for number in range(200):
            store.add_signals("ann", Statement(text=f"I like the number {number} of {thread}."))

    def edit() -> None:
        for number in range(50):
            store.edit("ann", f"- number {number}")
            store.withdraw_edit("ann")
            store.current("ann")

    in_threads(*(lambda thread=thread: observe(thread) for thread in range(4)), edit, edit)
    assert len(store.signals("ann").signals) == 800
    assert [version.number for version in store.history("ann")] == list(range(1, 101))


def test_threads_that_delete_and_add_leave_whole_users(store: Store) -> None:
    def add_and_edit() -> None:
        for number in range(100):
            store.add_signals("ann", Statement(text=f"number {number}"))
            store.edit("ann", "- mine")

    in_threads(add_and_edit, lambda: [store.delete("ann") for _ in range(300)], add_and_edit)
    history = store.history("ann")
    assert [version.number for version in history] == list(range(1, len(history) + 1))


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_goes_on_while_another_thread_is_writing(store: Store) -> None:
    store.edit("bob", "- short")
    done: list[bool] = []

    def observe() -> None:
        number = 0
        while not done:
            store.add_signals("ann", Statement(text=f"number {number}"))
            number += 1

    def works() -> bool:
        before = store.signals("ann").signals
        store.add_signals("ann", SHORT)
        store.edit("ann", "- mine")
        return store.signals("ann").signals == (*before, SHORT) and store.delete("ann") and store.users() == ["bob"]

    thread = Thread(target=observe)
    thread.start()
    try:
        time.sleep(0.02)
        assert all(succeeds_in_child(works) for _ in range(5))
    finally:
        done.append(True)
        thread.join()
