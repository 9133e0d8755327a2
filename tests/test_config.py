import json
from pathlib import Path
from typing import get_args

import pytest

from popi.config import Dimension, load, parse_overrides
from popi.errors import ConfigError, InputError

RECIPES = Path(__file__).parents[1] / "recipes"


def edited(tmp_path, old, new):
    text = (RECIPES / "mini_base" / "config.yaml").read_text()
    assert old in text
    file = tmp_path / "recipe.yaml"
    file.write_text(text.replace(old, new, 1))
    return file


def test_a_recipe_in_another_encoding_is_bad_input(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_bytes("# café".encode("latin-1"))
    with pytest.raises(InputError, match="is not YAML in UTF-8"):
        load(file)


def test_the_dimensions_of_a_dilution_are_those_of_the_mini_world():
    from popi.data.miniworld import DIMENSIONS

    assert get_args(Dimension) == DIMENSIONS


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_loads(file):
    assert load(file).name.startswith("popi-")


def test_a_folder_stands_for_its_config():
    assert load(RECIPES / "mini_base") == load(RECIPES / "mini_base" / "config.yaml")


def test_a_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load(RECIPES / "mini_base").seed = 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 1", "sead: 1", "field sead"),
        ("seed: 1", "seed: one", "field seed"),
        ("steps: 60", "steps: 0", "field phases.0.steps"),
        ("write: 16", "wriet: 16", "field phases.0.lessons"),
        ("kind: byte-level", "kind: bytes", "field tokenizer.kind"),
        ("seed: 1", "seed: [1", "not YAML"),
        ("name: warm-up", "name: 2024-13-45", "not YAML"),
        ("seed: 1", "seed: -1", "field seed"),
        ("signals: [1, 3]", "signals: [3, 1]", "phases.0.signals.*the minimum 3 is greater than the maximum 1"),
        ("signals: [1, 3]", "signals: [0, 3]", "field phases.0.signals.0"),
        ("write: 16", "write: -1", "field phases.0.lessons.write"),
        ("lessons: {write: 16, raw: 4, summary: 20, bare: 4}", "lessons: {}", "field phases.0.lessons"),
        ("learning_rate: [0.0001, 0.003]", "learning_rate: [.nan, 0.003]", "field phases.0.learning_rate.0"),
        ("blurred: [stance", "blurred: [stanse", "field phases.3.dilution.blurred.0"),
        ("write: 16", "write: 4070", "phases.0.lessons.*a step has at most 4096 lessons, got 4098"),
        ("name: warm-up", "name: read", "two phases are named 'read'"),
        ("name: warm-up", "name: tokenizer", "a phase cannot be named 'tokenizer'"),
        ("name: warm-up", "name: a/b", "field phases.0.name"),
    ],
)
def test_an_invalid_field_is_named_with_its_file(tmp_path, old, new, message):
    file = edited(tmp_path, old, new)
    with pytest.raises(InputError, match=message) as caught:
        load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


JOINT = {
    "task": "joint",
    "name": "pair",
    "data": {"world": "miniworld", "users": 10},
    "writer": {"model": "a"},
    "generator": {"model": "b"},
    "steps": 10,
}


@pytest.mark.parametrize(
    ("changes", "steps", "rollouts"),
    [
        ({}, 7, 7 * 2 * 3),
        ({"train": "writer"}, 7, 42),
        # The generator reads one summary of each user per round.
        ({"schedule": "sequential"}, 14, 42 + 10),
        ({"schedule": "alternating"}, 14, 42 + 10 + 10),
        ({"schedule": "alternating", "data.users": 20}, 14, 42 + 20 + 18),
        ({"train": "generator"}, 7, 10),
        ({"train": "generator", "data.users": 100}, 7, 42),
        ({"train": "generator", "generator.context": "none"}, 7, 0),
        ({"train": "generator", "generator.context": "raw-signals"}, 7, 0),
    ],
    ids=str,
)
def test_a_joint_recipe_counts_every_rollout(tmp_path, changes, steps, rollouts):
    file = tmp_path / "recipe.yaml"
    small = {"data.users": 10, "steps": 7, "users_per_step": 2, "writer.num_generations": 3, "writer.max_tokens": 5}
    file.write_text(json.dumps(JOINT))
    cost = load(file, small | changes).cost()
    assert cost == {"steps": steps, "rollouts": rollouts, "max_rollout_tokens": 5 * rollouts}


def test_a_world_needs_as_many_pairs_as_score_a_summary(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(JOINT))
    with pytest.raises(
        InputError, match=r"pairs_per_summary must be at most the number of pairs of a user \(data\.pairs\), 3"
    ):
        load(file, {"data.pairs": 3, "pairs_per_summary": 4})
    assert load(file, {"data.pairs": 4, "pairs_per_summary": 4}).pairs_per_summary == 4


def test_the_defaults_of_a_joint_recipe_are_those_of_popi_as_released(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(JOINT))
    recipe = load(file)
    writer, generator = recipe.writer, recipe.generator
    assert (writer.num_generations, recipe.users_per_step, writer.temperature, writer.max_tokens) == (8, 8, 0.6, 2048)
    assert (writer.kl_coef, writer.scale_by_std, writer.learning_rate, recipe.warmup) == (2e-3, False, 1e-6, 150)
    assert (generator.loss, generator.beta, generator.reduction, generator.learning_rate) == ("dpo", 0.01, "sum", 1e-6)
    assert recipe.pairs_per_summary == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "jiont"}, "unknown task 'jiont'; did you mean joint"),
        ({"task": None}, "field task: field required; known names: joint, pretrain"),
        ({"data": {"world": "miniworld"}}, "field data: a world needs the number of users"),
        ({"data": {"users": 3}}, "field data: give either world or file"),
        ({"data": {"world": "miniworld", "file": "x", "users": 3}}, "give either world or file"),
        ({"shared": True}, "shared weights need train: both, and the same model in both roles"),
        ({"writer": {"model": "a", "num_generations": 1}}, "field writer.num_generations"),
        ({"generator": {"model": "b", "loss": "ppo"}}, "field generator.loss"),
        (
            {"generator": {"model": "b", "context": "none"}},
            "generator.context must be summary unless train is generator",
        ),
        ({"schedule": "alternating", "rounds": 11}, "steps must be at least the number of rounds, 11"),
    ],
)
def test_what_does_not_fit_together_is_named(tmp_path, change, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({**JOINT, **change}))
    with pytest.raises(InputError, match=message):
        load(file)


@pytest.mark.parametrize("text", ["", "[]", "just words", "[" * 5000])
def test_a_file_that_is_not_a_mapping_is_bad_input(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    for overrides in ({}, {"seed": 2}):
        with pytest.raises(InputError):
            load(file, overrides)


def test_a_missing_recipe_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / "none.yaml")


def test_overrides_replace_values_deep_inside():
    recipe = load(RECIPES / "mini_base", {"phases.0.steps": 2, "architecture.hidden_size": 64, "seed": 7})
    assert (recipe.phases[0].steps, recipe.architecture["hidden_size"], recipe.seed) == (2, 64, 7)


@pytest.mark.parametrize("name", ["phases.9.steps", "phases.x.steps", "seed.deeper"])
def test_an_override_of_an_unknown_field_is_refused(name):
    with pytest.raises(ConfigError, match="cannot be overridden: unknown field"):
        load(RECIPES / "mini_base", {name: 1})


def test_an_override_of_an_unknown_section_is_refused():
    with pytest.raises(InputError, match="field nothing: extra inputs are not permitted"):
        load(RECIPES / "mini_base", {"nothing.here": 1})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"engine.scorer": "sharded"}, "scorer: sharded needs kind: zero1, zero2 or zero3"),
        ({"engine": {"kind": "zero2", "scorer": "sharded"}}, "needs a local generator that is not updated while it"),
        ({"engine.kind": "zero2", "precision": "bfloat16"}, "bfloat16 needs engine.kind: single or ddp"),
        ({"generator.model": "servers.yaml"}, "described by a backend file needs train: writer"),
    ],
    ids=str,
)
def test_options_that_exclude_each_other_are_refused(changes, says):
    with pytest.raises(InputError, match=says):
        load(RECIPES / "popi_mini", changes)


def test_a_section_that_the_file_leaves_out_can_be_overridden():
    engine = load(RECIPES / "popi_mini", {"engine.kind": "zero3", "engine.offload": "optimizer"}).engine
    assert (engine.kind, engine.offload) == ("zero3", "optimizer")


@pytest.mark.parametrize(("kind", "offload"), [("single", "optimizer"), ("ddp", "parameters"), ("zero2", "parameters")])
def test_an_engine_offloads_only_what_it_divides(kind, offload):
    with pytest.raises(InputError, match="offload"):
        load(RECIPES / "popi_mini", {"engine.kind": kind, "engine.offload": offload})


def test_override_words_are_yaml():
    assert parse_overrides(["phases.0.steps=2", "name=x", "phases.0.signals=[1, 2]"]) == {
        "phases.0.steps": 2,
        "name": "x",
        "phases.0.signals": [1, 2],
    }


@pytest.mark.parametrize("word", ["seed", "=3", "seed=[1", "seed=2024-13-45", "seed=" + "[" * 5000])
def test_a_broken_override_is_refused(word):
    with pytest.raises(ConfigError, match="invalid override"):
        parse_overrides([word])
