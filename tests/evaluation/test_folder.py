"""Pieces are kept, never made twice, and never mixed."""

from __future__ import annotations

from pathlib import Path

import pytest

from popi.errors import InputError
from popi.evaluation.folder import Folder, RunConfig
from popi.evaluation.measure import Plain

CONFIG = RunConfig(
    settings={"world": "miniworld", "writer": "a", "judged": 3},
    models={"a": "0011"},
    rows=["no-context"],
    columns=["a"],
    seeds=[0],
    versions={"popi": "0"},
    started="2026-01-01T00:00:00+00:00",
)


async def test_a_piece_is_made_once(tmp_path: Path) -> None:
    made = []

    async def make() -> list[Plain]:
        made.append(1)
        return [Plain(user_id="ann", differences=(0.5, None), answer="Ünï\n👍")]

    for _ in range(2):
        piece = await Folder(tmp_path).piece("seed-0", "org/model", "plain", model=Plain, make=make)
        assert piece == [Plain(user_id="ann", differences=(0.5, None), answer="Ünï\n👍")]
    assert len(made) == 1


async def test_a_piece_whose_making_failed_is_absent(tmp_path: Path) -> None:
    async def fail() -> list[Plain]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await Folder(tmp_path).piece("seed-0", "a", "plain", model=Plain, make=fail)
    assert not list(tmp_path.rglob("*.jsonl"))


async def test_names_that_are_no_file_names_stay_apart(tmp_path: Path) -> None:
    async def make() -> list[Plain]:
        return []

    for name in ("org/model", "org-model", "org model", "..", "Llama-3.2-1B"):
        await Folder(tmp_path).piece("seed-0", name, "plain", model=Plain, make=make)
    made = sorted(path.relative_to(tmp_path / "users" / "seed-0") for path in tmp_path.rglob("*.jsonl"))
    assert len(made) == 5
    assert Path("Llama-3.2-1B/plain.jsonl") in made


async def test_a_broken_piece_is_named(tmp_path: Path) -> None:
    path = tmp_path / "users" / "seed-0" / "a" / "plain.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"user_id": "ann"}\n')

    async def make() -> list[Plain]:
        raise AssertionError("it is there")

    with pytest.raises(InputError, match=r"plain\.jsonl:1, field differences"):
        await Folder(tmp_path).piece("seed-0", "a", "plain", model=Plain, make=make)


def test_the_same_settings_open_a_folder_again_and_its_time_adds_up(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "new")
    folder.close(folder.open(CONFIG), 2.0)
    more = CONFIG.model_copy(
        update={"models": {"a": "0011", "b": None}, "columns": ["a", "b"], "seeds": [0, 1], "started": "later"}
    )
    opened = folder.open(more)
    assert (opened.started, opened.seconds) == (CONFIG.started, 2.0)
    folder.close(opened, 3.0)
    again = folder.open(CONFIG)
    assert again.models == {"a": "0011", "b": None}
    assert again.seconds == 5.0


def test_a_model_that_was_fetched_meanwhile_is_not_another(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    (tmp_path / "users").mkdir()
    folder.open(CONFIG)
    fetched = CONFIG.model_copy(update={"models": {"b": "4455"}})
    assert folder.open(fetched).models == {"a": "0011", "b": "4455"}
    for other in ("6677", None):
        with pytest.raises(InputError, match=r"models\.b '4455', not"):
            folder.open(fetched.model_copy(update={"models": {"b": other}}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"settings": {**CONFIG.settings, "judged": 4}}, "made with judged 3, not 4; name another folder"),
        ({"settings": {"data": "users.jsonl", "writer": "a", "judged": 3}}, "world 'miniworld', not None"),
        ({"models": {"a": "2233"}}, "models.a '0011', not '2233'"),
    ],
)
def test_other_settings_are_refused_and_change_nothing(tmp_path: Path, change: dict[str, object], says: str) -> None:
    folder = Folder(tmp_path)
    folder.open(CONFIG)
    (tmp_path / "users").mkdir()
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(InputError, match=says):
        folder.open(CONFIG.model_copy(update=change))
    assert (tmp_path / "config.json").read_bytes() == before


def test_settings_with_which_nothing_was_measured_bind_nobody(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.open(CONFIG.model_copy(update={"settings": {"judged": 9}}))
    assert folder.open(CONFIG).settings == CONFIG.settings


def test_a_folder_with_another_config_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=r"config\.json"):
        Folder(tmp_path).open(CONFIG)
