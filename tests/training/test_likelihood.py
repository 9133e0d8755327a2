"""Shared prefixes change neither log-probabilities nor gradients."""

import pytest
import torch

from popi.engine.packing import Scored, pack
from popi.testing import tiny_model
from popi.training.likelihood import response_logps, token_likelihood
from popi.training.ranks import Ranks


def items(groups=3, samples=4):
    """Prompts of several lengths, each with samples of several lengths."""
    draw = torch.Generator().manual_seed(0)

    def some(count):
        return torch.randint(6, 300, (count,), generator=draw).tolist()

    prompts = [some(20 + 7 * group) for group in range(groups)]
    return [Scored(prompt, some(3 + place)) for prompt in prompts for place in range(samples)]


def plain(model, item, temperature=1.0):
    """Whole sequence, all logits."""
    ids = torch.tensor([[*item.prompt, *item.response]])
    logps = (model(input_ids=ids).logits[0] / temperature).log_softmax(-1)
    places = range(len(item.prompt) - 1, ids.shape[1] - 1)
    return torch.stack([logps[place, ids[0, place + 1]] for place in places])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "neox", "qwen3"])
@pytest.mark.parametrize(("batch_tokens", "temperature"), [(100_000, 1.0), (150, 0.6)])
def test_tokens_are_those_of_whole_sequences_and_so_are_gradients(family, batch_tokens, temperature):
    model, _ = tiny_model(family)
    given = items()
    weights = [torch.linspace(-1, 2, len(item.response)) for item in given]
    with_shared = token_likelihood(model, given, batch_tokens=batch_tokens, layout="shared", temperature=temperature)
    whole = [plain(model, item, temperature) for item in given]
    for row, expected in zip(with_shared.logps_R_T, whole, strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-4, rtol=1e-5)
        assert not row[len(expected) :].any()
    ours = gradients(
        model, sum((row[: len(w)] * w).sum() for row, w in zip(with_shared.logps_R_T, weights, strict=True))
    )
    theirs = gradients(model, sum((row * w).sum() for row, w in zip(whole, weights, strict=True)))
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def kept(compute):
    """How many numbers are kept for a gradient, weights not counted, and what was computed."""
    seen = {}

    def keep(value):
        seen[value.data_ptr()] = 0 if isinstance(value, torch.nn.Parameter) else value.numel()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        result = compute()
    return sum(seen.values()), result


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_a_gradient_keeps_the_activations_of_so_many_tokens(layout):
    model, _ = tiny_model()
    given = items(groups=9)

    def found(batch_tokens):
        return token_likelihood(model, given, batch_tokens=batch_tokens, layout=layout).logps_R_T

    whole, logps = kept(lambda: found(100_000))
    expected = gradients(model, logps.sum())
    of_one, logps = kept(lambda: found(150))
    assert of_one < whole / 2
    assert of_one < kept(lambda: found(400))[0] < whole
    for name, gradient in gradients(model, logps.sum()).items():
        assert (expected[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_what_a_prompt_costs_is_counted_once():
    model, _ = tiny_model()
    given = items(groups=2, samples=3)
    # A prompt once, and all but the last token of each response.
    responses = sum(len(item.response) - 1 for item in given)
    shared = sum(len(item.prompt) for item in given[::3]) + responses
    whole = sum(len(item.prompt) for item in given) + responses
    assert token_likelihood(model, given, batch_tokens=1000, layout="shared").tokens == shared
    assert token_likelihood(model, given, batch_tokens=1000, layout="padded").tokens == whole


def test_entropies_are_those_of_the_whole_distribution():
    model, _ = tiny_model()
    item = items(1, 1)[0]
    found = token_likelihood(model, [item], batch_tokens=1000, layout="shared")
    logps = model(input_ids=torch.tensor([[*item.prompt, *item.response]])).logits[0].log_softmax(-1)
    expected = -(logps.exp() * logps).sum(-1)[len(item.prompt) - 1 : -1]
    torch.testing.assert_close(found.entropies_R_T[0], expected)
    assert not found.entropies_R_T.requires_grad


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_responses_keep_their_order_whatever_they_share(layout, reduction):
    model, _ = tiny_model()
    given = items()
    given = given[::2] + given[1::2]
    expected = torch.stack([getattr(plain(model, item), reduction)() for item in given])
    (rows,) = pack(model, given, batch_tokens=100_000, layout=layout)
    found = response_logps(model, given, rows, reduction=reduction).float()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


class Busier(Ranks):
    """A rank beside another one that has three passes with prefixes and two without."""

    count = 2

    def _reduce(self, values, operation, dtype):
        return [max(pair) for pair in zip(values, [3, 2], strict=True)] if len(values) == 2 else [1]


def test_empty_passes_of_a_rank_change_nothing_and_call_every_module():
    model, _ = tiny_model("llama")
    given = items(groups=1)
    before = token_likelihood(model, given, batch_tokens=100_000, layout="shared")
    expected = gradients(model, before.logps_R_T.sum())
    calls = []
    hooks = [module.register_forward_hook(lambda *_: calls.append(1)) for module in (model.base_model, model.lm_head)]
    found = token_likelihood(model, given, batch_tokens=100_000, layout="shared", ranks=Busier(lockstep=True))
    # Three passes read a prefix first: three calls of the body before five of body and head.
    assert len(calls) == 3 + 2 * 5
    assert torch.equal(found.logps_R_T, before.logps_R_T)
    again = gradients(model, found.logps_R_T.sum())
    for name, value in expected.items():
        torch.testing.assert_close(again[name], value, atol=1e-5, rtol=1e-5)
    [hook.remove() for hook in hooks]


def test_a_rank_that_works_alone_makes_its_own_passes():
    model, _ = tiny_model("llama")
    ranks = Busier(lockstep=True)
    passes = list(pack(model, items(), batch_tokens=150, layout="shared"))
    assert len(ranks.same_passes(passes[:1])) == 5
    with ranks.alone():
        assert ranks.same_passes(passes) == passes
    assert Busier().same_passes(passes) == passes
