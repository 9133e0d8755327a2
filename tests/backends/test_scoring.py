"""Which prefixes are shared, and what a batch may hold."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from popi.backends.causal.scoring import ROW_OWN_TOKENS, Scored, _passes, _read, _rows, shared_prefixes

ids = st.lists(st.integers(0, 2), min_size=1, max_size=6)


def test_a_prompt_by_itself_shares_nothing() -> None:
    assert shared_prefixes([[1, 2, 3, 4]]) == [0]
    assert shared_prefixes([]) == []


def test_equal_prompts_share_all_but_their_last_token() -> None:
    assert shared_prefixes([[1, 2, 3, 4], [5, 6], [1, 2, 3, 4]]) == [3, 0, 3]


def test_a_long_common_context_is_worth_the_shorter_prefix() -> None:
    context = [7] * 100
    prompts = [[*context, 1, 2], [*context, 1, 2], [*context, 3, 4], [*context, 3, 4]]
    # Apart: 101 saved twice. Together: 100 saved three times.
    assert shared_prefixes(prompts) == [100] * 4


def test_a_short_common_beginning_is_not() -> None:
    one, other = [9, 1, 1, 1, 1, 1], [9, 2, 2, 2, 2, 2]
    # Apart: 5 saved twice. Together: 1 saved three times.
    assert shared_prefixes([one, one, other, other]) == [5] * 4


@given(st.lists(ids, max_size=12))
def test_sharing_is_sound_and_never_costs(prompts: list[list[int]]) -> None:
    lengths = shared_prefixes(prompts)
    assert all(0 <= length < len(prompt) for length, prompt in zip(lengths, prompts, strict=True))
    prefixes = [tuple(prompt[:length]) for length, prompt in zip(lengths, prompts, strict=True)]
    computed = sum(map(len, set(prefixes)))
    computed += sum(len(prompt) - length for length, prompt in zip(lengths, prompts, strict=True))
    assert computed <= sum(map(len, prompts))
    assert all(prefixes.count(prefix) > 1 for prefix in prefixes if prefix)


@given(st.lists(ids, max_size=8), st.randoms())
def test_the_order_of_the_prompts_does_not_matter(prompts: list[list[int]], random) -> None:
    order = list(range(len(prompts)))
    random.shuffle(order)
    lengths = shared_prefixes(prompts)
    assert shared_prefixes([prompts[place] for place in order]) == [lengths[place] for place in order]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=30), st.integers(1, 40))
def test_a_pass_holds_no_more_tokens_of_its_own_than_it_may(lengths: list[tuple[int, int]], max_own: int) -> None:
    items = [Scored([1] * prompt, [2] * response) for prompt, response in lengths]
    prefixes = shared_prefixes([item.prompt for item in items])
    rows = _rows(items, prefixes)
    made = list(_passes(items, rows, batch_tokens=10_000, max_own=max_own, max_scored=10_000))
    assert sorted(index for passed in made for row in passed for index in row.items) == list(range(len(items)))
    for passed in made:
        own = [sum(len(_read(items[index], row.prefix)) for index in row.items) for row in passed]
        assert len(passed) == 1 or len(passed) * max(own) <= max_own


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 400)), max_size=20))
def test_a_row_shares_one_prefix_and_is_not_too_long(drawn: list[tuple[int, int]]) -> None:
    items = [Scored([prompt] * 300, [2] * response) for prompt, response in drawn]
    prefixes = shared_prefixes([item.prompt for item in items])
    rows = _rows(items, prefixes)
    assert sorted(index for row in rows for index in row.items) == list(range(len(items)))
    for row in rows:
        assert len({(items[index].prompt[0], prefixes[index]) for index in row.items}) == 1
        own = sum(len(_read(items[index], row.prefix)) for index in row.items)
        assert len(row.items) == 1 or (row.prefix == 299 and own <= ROW_OWN_TOKENS)
