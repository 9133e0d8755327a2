"""The run folder: finished files are kept, temporary files are removed, and other files are not touched."""

from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from popi.errors import InputError, PopiError
from popi.io import UNFINISHED
from popi.run_folder import RunFolder, save_model, writing
from popi.testing import tiny_model

PART = ".popi-0123456789ab.part"


class Recipe(BaseModel):
    steps: int = 1


def opened(path):
    return RunFolder.open(path, Recipe(), libraries=())


def names(path):
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


def test_a_run_that_was_killed_before_its_start_can_start(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / PART).write_text('{"recipe": {"st')
    with opened(tmp_path) as folder:
        folder.begin({})
    assert names(tmp_path) == [".lock", "config.json"]


def test_temporary_files_of_a_killed_run_are_removed(tmp_path):
    with opened(tmp_path) as folder:
        folder.begin({})
        folder.log({"step": 1})
        folder.save("writer", lambda hidden: (Path(hidden) / "config.json").write_text("{}"))
    whole = names(tmp_path)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / PART).touch()
    (tmp_path / PART).mkdir()
    (tmp_path / PART / "writer").mkdir()
    with opened(tmp_path):
        assert names(tmp_path) == sorted([*whole, "samples"])


def test_a_model_is_written_under_the_name_of_a_temporary_file(tmp_path):
    written = []
    with opened(tmp_path) as folder:
        folder.save("writer", written.append)
    assert Path(written[0]).parent.match(UNFINISHED) and Path(written[0]).parent.parent == tmp_path


def test_a_folder_with_other_files_is_not_changed(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / PART).touch()
    with pytest.raises(InputError, match=r"contains thesis\.txt, which does not belong to a run; choose another"):
        opened(tmp_path)
    assert names(tmp_path) == [PART, "thesis.txt"]


def test_out_of_memory_is_not_reported_as_a_full_disk(tmp_path):
    with pytest.raises(torch.OutOfMemoryError), writing(tmp_path / "model"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(PopiError, match=r"cannot write .*model: no room; fix this and"), writing(tmp_path / "model"):
        raise RuntimeError("no room")


def test_everyone_may_read_a_model_and_its_folders(tmp_path):
    def write(hidden):
        (Path(hidden) / "templates").mkdir(mode=0o700)
        (Path(hidden) / "templates" / "tool_use.jinja").touch(mode=0o600)

    with opened(tmp_path) as folder:
        folder.save("writer", write)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "writer").rglob("*")}
    assert modes == {"templates": 0o755, "tool_use.jinja": 0o644}


def test_the_error_for_another_run_names_the_first_difference(tmp_path):
    with opened(tmp_path) as folder:
        folder.begin({"data": "0a1b"})
    with pytest.raises(InputError, match=r"was made with recipe.steps 1, not 2; choose another folder"):
        RunFolder.open(tmp_path, Recipe(steps=2), libraries=())
    with pytest.raises(InputError, match=r"versions.numpy None, not '\d+\.[^;]*; choose"):
        RunFolder.open(tmp_path, Recipe(), libraries=["numpy"])
    with opened(tmp_path) as folder, pytest.raises(InputError, match=r"was made with data .*; put the data back"):
        folder.begin({"data": "2c3d"})


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_saved_in_its_own_precision_with_tied_weights_once(half, tied, tmp_path):
    _, tokenizer = tiny_model()
    config = tiny_model()[0].config
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    save_model(model, tokenizer, "card", str(tmp_path), half=half)
    saved = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16 if half else torch.float32}
    assert ("lm_head.weight" in saved) == (not tied)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value.to(saved["model.norm.weight"].dtype).float())
