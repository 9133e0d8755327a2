import importlib
from pathlib import Path

import torch

from popi.config import load
from popi.planning.memory import Engine, Held, in_training, reference

FULL = Held(1_000_000, 0, torch.bfloat16, torch.bfloat16)
ADAPTED = Held(1_000_000, 10_000, torch.bfloat16, torch.float32)


def engine(stage, **options):
    return Engine(**{"stage": stage, "ranks": 4, "offload": "none", "gpu": True, **options})


def test_an_engine_without_zero_holds_everything_on_each_rank():
    always, _, step = in_training(Held(1_000_000, 0, torch.float32, torch.float32), engine(0), by_trainer=True)
    assert always == {"weights": 4_000_000, "optimizer state": 8_000_000, "gradient buffers": 4_000_000}
    assert step == {"gradients": 4_000_000}


def test_zero_divides_more_with_each_stage():
    held = {stage: in_training(FULL, engine(stage), by_trainer=True)[0] for stage in (1, 2, 3)}
    assert held[1] == held[2] == {"weights": 2_000_000, "optimizer state": 2_000_000, "master weights": 1_000_000}
    assert held[3]["weights"] == 500_000 and held[3]["gradients"] == 1_000_000
    kept = {stage: in_training(FULL, engine(stage), by_trainer=True)[1]["gradients"] for stage in (1, 2)}
    assert kept == {1: 4_000_000, 2: 1_000_000}


def test_what_is_offloaded_is_in_the_memory_of_the_host():
    always, _, step = in_training(FULL, engine(3, offload="parameters"), by_trainer=True)
    assert always == {"host memory": 2_000_000 + 1_000_000 + 500_000, "gradients": 1_000_000} and not step


def test_only_an_adapter_has_an_optimizer_and_needs_no_reference():
    always, _, _ = in_training(ADAPTED, engine(0, ranks=1), by_trainer=False)
    assert always == {"weights": 2_040_000, "optimizer state": 80_000}
    assert not reference(ADAPTED, engine(0)) and reference(FULL, engine(3)) == {"KL reference": 500_000}


def test_every_configuration_of_the_benchmark_is_a_recipe(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    plan = importlib.import_module("plan")
    made = {
        name: load(plan.write_recipe(tmp_path / "recipe.yaml", "popi-mini-base", changes))
        for name, changes in plan.CONFIGURATIONS.items()
    }
    assert [name for name, recipe in made.items() if recipe.shared] == ["shared"]
    assert [name for name, recipe in made.items() if recipe.writer.lora] == ["LoRA"]
    kinds = {plan.ranks_of(plan.CONFIGURATIONS[name]): recipe.engine.kind for name, recipe in made.items()}
    assert kinds == {1: "single", 2: "zero3"}
