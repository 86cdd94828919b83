import pytest
import torch

from cm_diffusers.core.distances import ict_huber_c, l2, pseudo_huber


def test_l2_is_the_squared_norm_of_each_sample():
    a, b = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    expected = torch.stack([((x - y) ** 2).sum() for x, y in zip(a, b)])
    torch.testing.assert_close(l2(a, b), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("c", [0.0, 0.03, 2.0])
def test_pseudo_huber_is_its_formula(c):
    a, b = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    expected = (l2(a, b) + c**2).sqrt() - c
    torch.testing.assert_close(pseudo_huber(a, b, c), expected, rtol=1e-13, atol=0)


def test_pseudo_huber_does_not_cancel_where_the_arguments_are_close():
    a = torch.zeros(1, 4)
    b = torch.full((1, 4), 1e-6)
    assert pseudo_huber(a, b, 0.03).item() == pytest.approx(4e-12 / 0.06, rel=1e-5)


@pytest.mark.parametrize("c", [0.0, 0.03])
def test_gradient_of_pseudo_huber_is_zero_where_the_arguments_are_equal(c):
    a = torch.randn(3, 2, 4).requires_grad_()
    pseudo_huber(a, a.detach().clone(), c).sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))


@pytest.mark.parametrize("c", [0.0, 0.03])
def test_gradient_of_pseudo_huber(c):
    a, b = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    a.requires_grad_()
    pseudo_huber(a, b, c).sum().backward()
    expected = (a - b) / (l2(a, b) + c**2).sqrt()[:, None, None]
    torch.testing.assert_close(a.grad, expected.detach(), rtol=1e-12, atol=1e-14)


def test_huber_c_of_ict():
    golden = {784: 0.01512, 1024: 0.01728, 3072: 0.02992984, 12288: 0.05985968, 16384: 0.06912, 196608: 0.23943870}
    assert [ict_huber_c(d) for d in golden] == pytest.approx([*golden.values()], rel=1e-6)
