"""The record beside a trained model, and the prompts that it decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from popi.errors import ConfigError, ModelError
from popi.models import shipped
from popi.prompts import DEFAULT
from popi.trained import TrainingRecord, prompts_of, training_record


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = TrainingRecord("popi-mini-base", "0a1b2c3d4e5f")
    record.write(tmp_path)
    assert training_record(str(tmp_path)) == record


@pytest.mark.parametrize("model", ["org/model-on-the-hub", "gpt-4.1-mini", "/no/such/folder", ""])
def test_a_model_that_is_not_here_has_no_record(model: str) -> None:
    assert training_record(model) is None
    assert prompts_of(model) is DEFAULT


@pytest.mark.parametrize("text", ["{", "[]", '{"from": 3}', '{"template_hash": null}'])
def test_a_malformed_record_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "popi.json").write_text(text)
    with pytest.raises(ModelError, match="malformed training record"):
        training_record(str(tmp_path))


@pytest.mark.parametrize("model", [name for name in shipped() if training_record(name)])
def test_the_shipped_models_were_trained_with_a_prompt_set_of_this_version(model: str) -> None:
    record = training_record(model)
    assert record is not None and record.template_hash == DEFAULT.hash
    assert prompts_of(model) is DEFAULT


def test_a_model_that_was_trained_with_other_templates_is_refused_unless_they_are_named(tmp_path: Path) -> None:
    TrainingRecord(None, "0a1b2c3d4e5f").write(tmp_path)
    with pytest.raises(
        ModelError, match=r"was trained with prompt templates 0a1b2c3d4e5f, which this version does not"
    ):
        prompts_of(str(tmp_path))
    assert prompts_of(str(tmp_path), "default") is DEFAULT
    mine = replace(DEFAULT, name="mine", cut="...")
    assert prompts_of(str(tmp_path), mine) is mine
    with pytest.raises(ConfigError, match="unknown prompt set"):
        prompts_of(str(tmp_path), "mine")
