import pytest
import torch

from popi.pretraining.muon import Muon, orthogonal


def train(make_optimizer, steps=20):
    torch.manual_seed(0)
    weights = [torch.randn(shape, requires_grad=True) for shape in ((24, 16), (16, 24), (24, 16), (16, 16))]
    optimizer = make_optimizer(weights)
    for step in range(steps):
        torch.manual_seed(step)
        loss = sum((weight * torch.randn_like(weight)).sum() + weight.pow(2).sum() for weight in weights)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights


def test_updates_equal_those_of_torch_up_to_rounding_in_bfloat16():
    initial = train(lambda weights: Muon(weights, lr=0.01), steps=0)
    ours = train(lambda weights: Muon(weights, lr=0.01, weight_decay=0.02))
    theirs = train(
        lambda weights: torch.optim.Muon(weights, lr=0.01, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    )
    for mine, other, start in zip(ours, theirs, initial, strict=True):
        assert (mine - other).norm() < 0.03 * (mine - start).norm()


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 12, 12)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    result = orthogonal(matrices)
    values = torch.linalg.svdvals(result)
    assert ((values > 0.5) & (values < 1.3)).all()
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    diagonal = left.mT @ result @ right.mT
    assert (diagonal - torch.diag_embed(diagonal.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3


def test_a_matrix_without_a_gradient_is_unchanged():
    unused, moved = torch.ones(4, 4, requires_grad=True), torch.ones(4, 4, requires_grad=True)
    optimizer = Muon([unused, moved], lr=0.1)
    moved.sum().backward()
    optimizer.step()
    assert torch.equal(unused, torch.ones(4, 4))
    assert not torch.equal(moved, torch.ones(4, 4))
