"""Packed weights give the numbers of the weights that they replace, and leave out what they would change."""

from __future__ import annotations

import platform
import weakref

import pytest
import torch
from torch import nn

from popi.engine.packed import LEAST, MACHINES, PackedLinear, pack
from popi.testing import FAMILIES, tiny_model

pytestmark = pytest.mark.skipif(
    platform.machine() not in MACHINES or not torch.backends.mkldnn.is_available(), reason="this CPU has no oneDNN"
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs small layers, too."""
    for dtype in LEAST:
        monkeypatch.setitem(LEAST, dtype, 1)


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_of_every_family_are_the_same(family: str) -> None:
    model, _ = tiny_model(family)
    ids = torch.randint(3, 90, (3, 17), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits
    pack(model)
    assert any(isinstance(layer, PackedLinear) for layer in model.modules())
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 3, 16, 200])
def test_half_precision_is_bit_for_bit_the_same(rows: int) -> None:
    model = nn.Sequential(nn.Linear(96, 160), nn.Linear(160, 40, bias=False)).bfloat16()
    given = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows)).bfloat16()
    before = model(given)
    pack(model)
    assert torch.equal(model(given), before)


def test_packed_weights_are_no_parameters_but_can_be_read() -> None:
    model, _ = tiny_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    weights = {name: layer.weight.clone() for name, layer in model.named_modules() if type(layer) is nn.Linear}
    embeddings = model.get_input_embeddings()
    parameters = list(embeddings.parameters())
    pack(model)
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, PackedLinear) and torch.equal(layer.weight, weight)
    assert list(model.get_input_embeddings().parameters()) == parameters
    assert sum(each.numel() for each in model.parameters()) < sum(each.numel() for each in parameters) + 1000


def test_each_weight_is_released_before_the_next_one_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)], nn.Sequential(nn.Linear(8, 8)))
    weights = [weakref.ref(layer.weight) for layer in model.modules() if type(layer) is nn.Linear]
    alive: list[int] = []
    original = PackedLinear.__init__

    def counting(self: PackedLinear, layer: nn.Linear) -> None:
        alive.append(sum(weight() is not None for weight in weights))
        original(self, layer)

    monkeypatch.setattr(PackedLinear, "__init__", counting)
    pack(model)
    assert alive == [5, 4, 3, 2, 1]


def test_a_layer_in_two_places_is_packed_once() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    pack(model)
    assert isinstance(model[0], PackedLinear) and model[0] is model[2]


def test_small_layers_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEAST, torch.float32, 100)
    model = nn.Sequential(nn.Linear(9, 11), nn.Linear(11, 10))
    pack(model)
    assert [isinstance(layer, PackedLinear) for layer in model] == [False, True]


def test_other_layers_and_types_stay_as_they_are() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    layers = nn.ModuleList([Scaled(8, 8), nn.Linear(8, 8, dtype=torch.float64), nn.Linear(8, 8, dtype=torch.float16)])
    before = list(layers)
    pack(layers)
    assert list(layers) == before
