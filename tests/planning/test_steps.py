import pytest
import torch
from transformers import LlamaConfig

from popi.planning import steps
from popi.planning.lengths import Lengths
from popi.planning.steps import PARTS, Blank, Sizes, trace
from popi.planning.tracing import LiveBytes, blank_model, forget_numbers, without_numbers
from popi.training.models import LoraOptions

SIZES, LENGTHS = (
    Sizes(users=2, samples=3, pairs=1, batch_tokens=256),
    Lengths(signals=80, prompt=10, summary=20, answer=15),
)


def config(layers, *, tied=True):
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        tie_word_embeddings=tied,
    )


def blank(layers, **options):
    given = {"autocast": False, "recompute": False, "lora": None, "trained": True, "gpu": True, **options}
    return Blank(config(layers), torch.float32, torch.float32, **given)


def largest(found):
    return max(found[0], key=lambda peak: peak.total)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "options"),
    [
        *((part, {}) for part in PARTS),
        ("writer update", {"recompute": True}),
        ("generator update", {"autocast": True}),
        ("joint update", {"lora": LoraOptions(4, 8, "all-linear")}),
    ],
)
def test_further_layers_add_what_the_first_ones_do(part, options, monkeypatch):
    found = trace(part, blank(10, **options), SIZES, LENGTHS)
    monkeypatch.setattr(steps, "LAYERS", (10, 10))
    whole = trace(part, blank(10, **options), SIZES, LENGTHS)
    # Without a gradient, another moment can become the peak in a model with more layers.
    assert largest(found).total == pytest.approx(largest(whole).total, rel=0.06 if part == "scoring" else 0.01)
    assert found[1] == whole[1]


def test_the_keys_and_values_of_a_group_are_counted():
    kept = trace("rollouts", blank(2), Sizes(1, 3, 1, 256), LENGTHS)[1]
    # A row has room for the prompt without its last token and three summaries; 2 layers, 2 heads of 8 numbers.
    columns = 79 + 3 * 20
    assert kept == 2 * 2 * columns * 2 * 8 * 4


def test_tensors_are_counted_as_long_as_they_are_alive():
    model = blank_model(config(1), torch.float32, layers=1)
    with without_numbers(gpu=False):
        forget_numbers(model)
        live = LiveBytes(model)
        with live:
            first = torch.zeros(1000)
            second = first.view(10, 100) + 1
            del first
            third = second * 2
            del second, third
        live.close()
    [peak] = live.peaks.values()
    assert (peak.activations, peak.logits, peak.gradients) == (8000, 0, 0)


def test_a_gradient_belongs_to_its_weight():
    model = blank_model(config(1, tied=False), torch.float32, layers=1)
    weights = sum(weight.numel() for weight in model.parameters())
    with without_numbers(gpu=False):
        forget_numbers(model)
        live = LiveBytes(model)
        with live:
            model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
        live.close()
    assert max(peak.gradients + peak.arriving for peak in live.peaks.values()) == pytest.approx(4 * weights, rel=0.1)
