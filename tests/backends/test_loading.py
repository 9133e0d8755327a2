"""A model that cannot be loaded says why in one line."""

import json

import pytest
import torch
from transformers import PreTrainedModel

from popi.backends.causal.loading import load
from popi.errors import ConfigError, ModelError
from popi.testing import tiny_model


@pytest.fixture
def folder(tmp_path):
    """A tiny model on disk."""
    for part in tiny_model():
        part.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_model_is_loaded_to_be_asked(folder):
    model, tokenizer = load(str(folder), None, "float32")
    assert not model.training and model.dtype == torch.float32
    assert tokenizer.chat_template


def test_a_name_that_nobody_has_is_told_with_the_hub_s_answer():
    with pytest.raises(ModelError, match=r"^no model 'org/none' here, and none from the Hugging Face hub: \w+: "):
        load("org/none", "cpu", "auto")


def test_weights_of_another_shape_are_not_made_up(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(ModelError, match=r"the weights of .*tiny do not fit its configuration: model\.layers\.0\.mlp"):
        load(str(folder), "cpu", "auto")


def test_a_file_that_is_no_json_is_named_in_one_line(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"^the model '.*tiny' cannot be loaded: .*; check the name") as caught:
        load(str(folder), "cpu", "auto")
    assert "\n" not in str(caught.value)


def test_want_of_memory_is_told_apart_from_a_broken_model(folder, monkeypatch):
    def full(self, place):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(PreTrainedModel, "to", full)
    with pytest.raises(ModelError, match=r"tiny' has no room in memory; free the device, or take a smaller model"):
        load(str(folder), "cpu", "auto")


@pytest.mark.parametrize(
    ("device", "dtype", "says"), [("tpu9", "auto", "no device 'tpu9'"), ("cpu", "int3", "no dtype")]
)
def test_a_device_or_a_dtype_that_is_none_is_bad_input(folder, device, dtype, says):
    with pytest.raises(ConfigError, match=says):
        load(str(folder), device, dtype)
