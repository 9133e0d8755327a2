"""Adapters: what a model computes with each of them and without, and runs that train them."""

import json

import pytest
import torch

from popi.config import load
from popi.engine.loading import load as load_model
from popi.errors import ConfigError
from popi.models import find
from popi.testing import tiny_model
from popi.training import joint
from popi.training.adapters import Adapter, original, original_weights, trainable
from popi.training.joint import run
from popi.training.models import JointModels
from tests.training.rank_runs import make_inputs, write_recipe

FAMILIES = ["llama", "neox", "qwen3", "gpt2"]


def adapter(model, name, targets="all-linear"):
    """An adapter whose product of matrices is not zero."""
    made = Adapter(model, name, rank=2, alpha=4, targets=targets, seed=len(name))
    draw = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for value in made.parameters().values():
            value.copy_(torch.randn(value.shape, generator=draw) * 0.1)
    return made


def logits(model):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_each_adapter_computes_alone_and_the_model_without_them_as_before(family):
    before = logits(tiny_model(family)[0])
    model = tiny_model(family)[0]
    one, two = adapter(model, "writer"), adapter(model, "generator")
    found = {}
    for name, each in (("one", one), ("two", two)):
        with each.active():
            found[name] = logits(model)
    with original(model):
        torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    assert (found["one"] - before).abs().max() > 1e-3 and (found["one"] - found["two"]).abs().max() > 1e-3
    alone = tiny_model(family)[0]
    with adapter(alone, "writer").active():
        torch.testing.assert_close(logits(alone), found["one"], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_computes_the_same(family):
    model = tiny_model(family)[0]
    one, _ = adapter(model, "writer"), adapter(model, "generator")
    with one.active():
        wanted = logits(model)
    merged = tiny_model(family)[0]
    merged.load_state_dict(one.merged())
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    before = tiny_model(family)[0].state_dict()
    assert all(torch.equal(value, before[name]) for name, value in original_weights(model).items())


def test_a_new_adapter_changes_nothing_and_only_its_weights_are_trained():
    before = logits(tiny_model()[0])
    model = tiny_model()[0]
    made = Adapter(model, "writer", rank=2, alpha=4, targets=["q_proj", "v_proj"], seed=0)
    with made.active():
        torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    assert trainable(model).keys() == made.parameters().keys()
    assert {name.split(".")[-4] for name in made.parameters()} == {"q_proj", "v_proj"}
    other = Adapter(tiny_model()[0], "writer", rank=2, alpha=4, targets=["q_proj", "v_proj"], seed=0)
    assert all(torch.equal(value, made.parameters()[name]) for name, value in other.parameters().items())


def test_layers_that_the_model_does_not_have_are_an_error():
    with pytest.raises(ConfigError, match=r"no layer of the model matches \['nothing'\]; name linear layers"):
        Adapter(tiny_model()[0], "writer", rank=2, alpha=4, targets=["nothing"], seed=0)


def test_the_gradient_of_one_adapter_does_not_touch_the_other():
    model = tiny_model()[0]
    one, two = adapter(model, "writer"), adapter(model, "generator")
    with one.active():
        loss = model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum()
    with two.active():
        logits(model)
    loss.backward()
    assert all(value.grad is not None for value in one.parameters().values())
    assert all(value.grad is None for value in two.parameters().values())


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"shared": True}, {"schedule": "sequential"}], ids=str)
def test_adapters_of_both_roles_are_trained_on_one_model(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(joint, "draw_curves", lambda metrics, picture: None)
    made = []

    class Watched(JointModels):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(joint, "JointModels", Watched)
    lora = {"writer.lora": {"rank": 4}, "generator.lora": {"rank": 4}, "writer.kl_coef": 0.1}
    recipe = load(write_recipe(tmp_path / "recipe.yaml", make_inputs(tmp_path)), {**lora, **changes, "steps": 3})
    run(recipe, tmp_path / "run", source="a test", report=lambda measured: None)
    [models] = made
    assert models.writer is models.generator
    initial = load_model("popi-mini-base", "cpu", "float32")[0].state_dict()
    assert all(torch.equal(value, initial[name]) for name, value in original_weights(models.writer).items())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    kl = [line["kl"] for line in lines if "kl" in line]
    # The reference is the model without adapters, which the first step equals.
    assert abs(kl[0]) < 1e-6 < kl[-1]
    for role in ("writer", "generator"):
        saved, _ = load_model(str(tmp_path / "run" / role), "cpu", "float32")
        with models._adapters[role].active():
            torch.testing.assert_close(logits(saved), logits(models.writer), rtol=1e-4, atol=1e-4)
        assert (logits(saved) - logits(load_model("popi-mini-base", "cpu", "float32")[0])).abs().max() > 1e-3


@pytest.mark.slow
def test_the_written_adapter_is_one_of_peft(tmp_path):
    from peft import PeftModel

    model, _ = load_model("popi-mini-base", "cpu", "float32")
    model.config.name_or_path = find("popi-mini-base")
    made = adapter(model, "writer")
    made.save(tmp_path)
    with made.active():
        wanted = logits(model)
    read = PeftModel.from_pretrained(load_model("popi-mini-base", "cpu", "float32")[0], str(tmp_path))
    torch.testing.assert_close(logits(read), wanted, rtol=1e-5, atol=1e-5)
