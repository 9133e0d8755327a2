"""Gradient checkpointing changes no gradient, with shared prefixes, in every family of models."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from popi.engine.chat_tokens import ChatTokens
from popi.engine.checks import verify
from popi.engine.packing import Scored
from popi.errors import ConfigError
from popi.testing import FAMILIES, tiny_model
from popi.training.likelihood import computing, token_likelihood
from popi.training.recomputation import check_recomputable, recomputed_layers


def items(vocabulary):
    """Two prompts, with three responses each."""
    draw = torch.Generator().manual_seed(0)

    def some(count):
        return torch.randint(6, vocabulary, (count,), generator=draw).tolist()

    prompts = [some(30), some(41)]
    return [Scored(prompt, some(3 + place)) for prompt in prompts for place in range(3)]


@contextmanager
def recomputing(model, seen=None):
    """The context of a model that recomputes its layers."""
    if seen is not None:
        seen.append(model.training)
    with computing(model), recomputed_layers(model, partial(computing, model)):
        yield


def gradients(model, layout, within, batch_tokens):
    model.zero_grad()
    given = items(min(300, model.config.get_text_config().vocab_size))
    found = token_likelihood(model, given, batch_tokens=batch_tokens, layout=layout, within=within).logps_R_T
    (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_without_recomputation(family):
    model, tokenizer = tiny_model(family)
    layout = verify(model, ChatTokens(tokenizer, family), family).layout
    for batch_tokens in (100_000, 60):
        kept = gradients(model, layout, partial(computing, model), batch_tokens)
        recomputed = gradients(model, layout, partial(recomputing, model), batch_tokens)
        assert kept.keys() == recomputed.keys()
        largest = max(float(gradient.abs().max()) for gradient in kept.values())
        for name, gradient in kept.items():
            assert (recomputed[name] - gradient).abs().max() <= 1e-5 * largest, name


def test_less_is_kept_and_the_model_is_as_before():
    model, _ = tiny_model("llama")
    given = items(300)

    def kept(within):
        seen = {}

        def keep(value):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        weights = {value.untyped_storage().data_ptr() for value in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            token_likelihood(model, given, batch_tokens=100_000, layout="shared", within=within)
        return sum(size for place, size in seen.items() if place not in weights)

    assert kept(partial(recomputing, model)) < 0.5 * kept(partial(computing, model))
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_without_layers_is_refused():
    with pytest.raises(ConfigError, match="gradient_checkpointing: the model 'own' has no layers"):
        check_recomputable(torch.nn.Linear(2, 2), "own")
