"""What is computed together, and what a pass may hold."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from popi.engine.packing import ROW_OWN_TOKENS, Row, Scored, _blocks, _passes, shared_prefixes

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


def blocks_of(items: list[Scored], together: int = 1) -> list[list[Row]]:
    units = [list(range(start, start + together)) for start in range(0, len(items), together)]
    return list(_blocks(items, units, shared_prefixes([item.prompt for item in items])))


def rows_of(items: list[Scored]) -> list[Row]:
    return [row for block in blocks_of(items) for row in block]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=30), st.integers(1, 40))
def test_a_pass_holds_no_more_tokens_of_its_own_than_it_may(lengths: list[tuple[int, int]], max_own: int) -> None:
    items = [Scored([1] * prompt, [2] * response) for prompt, response in lengths]
    made = list(_passes(items, blocks_of(items), batch_tokens=10_000, max_own=max_own, max_scored=10_000))
    assert sorted(index for passed in made for row in passed for index in row.items) == list(range(len(items)))
    for passed in made:
        assert len(passed) == 1 or len(passed) * max(len(row.tree.tokens) for row in passed) <= max_own


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 400)), max_size=20))
def test_a_row_shares_one_prefix_and_is_not_too_long(drawn: list[tuple[int, int]]) -> None:
    items = [Scored([prompt] * 300, [*range(9, 9 + response)]) for prompt, response in drawn]
    rows = rows_of(items)
    assert sorted(index for row in rows for index in row.items) == list(range(len(items)))
    for row in rows:
        assert {tuple(items[index].prompt[: len(row.prefix)]) for index in row.items} == {tuple(row.prefix)}
        # Rows are filled evenly, so that one is over by less than what was put in last.
        longest = max(len(items[index].response) for index in row.items)
        assert len(row.items) == 1 or len(row.tree.tokens) <= 300 * 1.5 + longest


@given(st.lists(st.tuples(st.integers(0, 2), ids, ids), max_size=8))
def test_what_belongs_together_is_in_one_block(drawn: list[tuple[int, list[int], list[int]]]) -> None:
    items = [Scored([7] * 5 + [prompt], answer) for prompt, *answers in drawn for answer in answers]
    blocks = blocks_of(items, together=2)
    homes = {index: number for number, block in enumerate(blocks) for row in block for index in row.items}
    assert len(homes) == len(items)
    assert all(homes[index] == homes[index + 1] for index in range(0, len(items), 2))


def test_rows_of_a_prefix_are_of_like_length() -> None:
    least, _ = ROW_OWN_TOKENS
    sizes = [90, 80, 70, 60, 50, 34]
    items = [Scored([9] * 50 + [place], [100 * place + n for n in range(size)]) for place, size in enumerate(sizes)]
    assert sum(sizes) == 2 * least
    assert sorted(len(row.tree.tokens) for row in rows_of(items)) == [184, 200]


def test_long_answers_that_belong_together_have_rows_of_their_own_behind_one_prefix() -> None:
    items = [Scored([9] * 50, [100 * place + n for n in range(500)]) for place in range(2)]
    [block] = blocks_of(items, together=2)
    assert [row.items for row in block] == [[0], [1]]
    assert [row.prefix for row in block] == [[9] * 49] * 2
