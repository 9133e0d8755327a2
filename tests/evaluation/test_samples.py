"""Where the users of an evaluation come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from popi.data.example import PersonalizationExample
from popi.errors import ConfigError, InputError
from popi.evaluation.samples import Sample, from_file, from_world
from popi.io import BadRows, write_jsonl

Make = Callable[..., PersonalizationExample]


@pytest.fixture
def ten_users(tmp_path: Path, make_example: Make) -> Path:
    """Ten users with a pair each, and two without any."""
    path = tmp_path / "users.jsonl"
    write_jsonl(path, [make_example(f"user {place}", *[("good", "bad")] * (place < 10)) for place in range(12)])
    return path


def ids(sample: Sample) -> list[str]:
    return [example.user.user_id for example in sample.examples]


def test_a_world_makes_other_users_for_another_seed() -> None:
    first, second = from_world("miniworld", split="unseen-users", users=3, seeds=[4, 5])
    assert (first.seed, second.seed) == (4, 5)
    assert len(set(ids(first)) | set(ids(second))) == 6
    assert from_world("miniworld", split="unseen-users", users=3, seeds=[5])[0].examples == second.examples


def test_a_file_is_dealt_out_and_nobody_is_dealt_twice(ten_users: Path) -> None:
    samples = from_file(ten_users, users=None, seeds=[0, 1, 2])
    assert [len(sample.examples) for sample in samples] == [3, 3, 3]
    assert len({name for sample in samples for name in ids(sample)}) == 9
    assert ids(from_file(ten_users, users=3, seeds=[0])[0]) == ids(samples[0])
    assert sorted(ids(from_file(ten_users, users=None, seeds=[1])[0])) == sorted(f"user {n}" for n in range(10))


def test_a_file_with_too_few_users_says_how_many_are_needed(ten_users: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 10 users with held-out pairs, but 12 are needed; lower the number"):
        from_file(ten_users, users=4, seeds=[0, 1, 2])
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(InputError, match=r"has 0 users with held-out pairs.*in the field tests"):
        from_file(empty, users=None, seeds=[0])


def test_bad_rows_are_an_error_unless_they_are_skipped(ten_users: Path) -> None:
    ten_users.write_text(ten_users.read_text() + '{"user_id": ""}\n{half\n')
    with pytest.raises(InputError, match="2 bad rows; the first: line 13, field user_id"):
        from_file(ten_users, users=3, seeds=[0])
    bad = BadRows(skip=True)
    assert len(from_file(ten_users, users=3, seeds=[0], bad_rows=bad)[0].examples) == 3
    assert bad.count == 2


def test_unknown_worlds_and_splits() -> None:
    with pytest.raises(ConfigError, match="did you mean miniworld"):
        from_world("minworld", split="train", users=1, seeds=[0])
    with pytest.raises(InputError, match="unknown split 'moon'"):
        from_world("miniworld", split="moon", users=1, seeds=[0])


def test_users_of_one_cluster_are_not_dealt_to_two_samples(tmp_path: Path, make_example: Make) -> None:
    made = [make_example(f"user {place}", ("good", "bad")) for place in range(24)]
    clustered = [one.model_copy(update={"facts": {"cluster": f"item {place % 8}"}}) for place, one in enumerate(made)]
    path = tmp_path / "users.jsonl"
    write_jsonl(path, clustered)
    first, second = from_file(path, users=None, seeds=[0, 1])
    assert not {example.cluster for example in first.examples} & {example.cluster for example in second.examples}
