"""Gradients of a sum become those of a mean, in place, whoever has none."""

import torch

from blt_titan.training.gradients import divide_gradients


def test_gradients_are_divided_in_place():
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in (2, 3, 1)]
    gradients = [torch.tensor([2.0, 6.0]), torch.tensor([-4.0, 0.0, 8.0])]
    parameters[0].grad, parameters[1].grad = gradients
    divide_gradients(parameters, torch.tensor(4))
    assert gradients[0].tolist() == [0.5, 1.5]
    assert gradients[1].tolist() == [-1.0, 0.0, 2.0]
    assert parameters[2].grad is None


def test_a_step_without_targets_is_seen():
    """Nothing over nothing: what is not finite stops the run where it is looked for."""
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.zeros(2)
    divide_gradients([parameter], torch.tensor(0))
    assert parameter.grad.isnan().all()
