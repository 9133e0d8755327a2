"""Fingerprints, and the check that settings have not changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from popi.provenance import fingerprint_files, first_difference


def test_the_fingerprint_of_a_model_is_that_of_its_files(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    before = fingerprint_files(tmp_path)
    assert before == fingerprint_files(tmp_path)
    assert before is not None
    weights.write_bytes(b"two")
    assert fingerprint_files(tmp_path) != before
    assert fingerprint_files(weights) is not None
    assert fingerprint_files(tmp_path / "org/model") is None


@pytest.mark.parametrize(
    ("known", "wanted", "says"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, "a.c 2, not 3"),
        ({"a": 1}, {"a": 1, "b": 2}, "b None, not 2"),
        ({"a": {"b": 1}}, {"a": 1}, "a {'b': 1}, not 1"),
        ({"a": None}, {}, None),
    ],
)
def test_the_first_difference_of_two_trees_is_named(known: object, wanted: object, says: str | None) -> None:
    assert first_difference(known, wanted) == says
