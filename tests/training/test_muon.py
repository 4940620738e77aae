"""The batched Muon makes the update of torch's, with a number of operations that does not grow."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from arctrm.training.muon import Muon
from arctrm.training.state import pack_optimiser, unpack_optimiser

SHAPES = [(16, 16), (48, 16), (16, 48), (16, 16), (8, 40), (48, 16), (1, 12)]
"""Squares, both ways of a shape, one way only, a row."""


def matrices(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def draw_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def train(optimiser, seeds):
    parameters = optimiser.param_groups[0]["params"]
    for seed in seeds:
        draw_gradients(parameters, seed)
        optimiser.step()
    return parameters


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(shapes):
    optimiser = Muon(matrices(shapes), lr=0.02)
    train(optimiser, [0])
    with Operations() as counted:
        optimiser.step()
    return counted.count


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_updates_are_those_of_torchs_muon(weight_decay):
    rates = {"lr": 0.02, "weight_decay": weight_decay, "momentum": 0.9}
    expected = train(torch.optim.Muon(matrices(), **rates), range(4))
    got = train(Muon(matrices(), **rates), range(4))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)  # 8 bits of an update of up to 0.02 x 4


def test_in_float32_a_stack_is_what_its_matrices_are_one_by_one():
    together = train(Muon(matrices(), lr=0.02, dtype=torch.float32), range(4))
    for index, got in enumerate(together):
        draws = matrices()
        alone = Muon([draws[index]], lr=0.02, dtype=torch.float32)
        for seed in range(4):
            draw_gradients(draws, seed)
            alone.step()
        torch.testing.assert_close(draws[index], got)


def test_the_number_of_operations_depends_on_shapes_and_not_on_matrices():
    few = operations([(16, 16), (16, 48), (48, 16)])
    assert operations([(16, 16), (16, 48), (48, 16)] * 9) == few
    assert few < 2 * 40
    assert operations([(16, 16)] * 3) < few


def test_a_rate_in_a_tensor_is_the_same_rate():
    rate = torch.tensor(0.5)
    optimiser = Muon(matrices(), lr=rate)
    rate.fill_(0.02)
    got = train(optimiser, [0])
    expected = train(Muon(matrices(), lr=0.02), [0])
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_gradient_a_matrix_stays():
    parameters = matrices()
    before = parameters[1].detach().clone()
    optimiser = Muon(parameters, lr=0.02)
    draw_gradients(parameters, 0)
    parameters[1].grad = None
    optimiser.step()
    assert torch.equal(parameters[1], before)
    assert parameters[1] not in optimiser.state


def test_it_goes_on_from_a_checkpoint_of_torchs_muon():
    first = torch.optim.Muon(matrices(), lr=0.02)
    train(first, range(3))
    resumed = Muon([nn.Parameter(p.detach().clone()) for p in train(first, [])], lr=0.02)
    unpack_optimiser("muon", resumed, pack_optimiser("muon", first))
    for a, b in zip(train(first, [3, 4]), train(resumed, [3, 4]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
