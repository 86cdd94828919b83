import pytest
import torch

from cm_diffusers.evaluation import agreement, label_agreement, labels_told_apart
from tests.helpers.gaussians import normals


def column(*values):
    return torch.tensor(values)[:, None]


REAL, LABELS = column(0.0, 1.0, 2.0, 10.0, 11.0), torch.tensor([0, 0, 2, 2, 1])


def test_neighbours_on_a_line_by_hand():
    made = column(0.1, 0.6, 10.6)
    # three neighbours: 0 0 2 -> 0; 1 0 2 -> 0; 11 10 2 -> 2 2 1 -> 2
    assert label_agreement(REAL, LABELS, made, torch.tensor([0, 0, 2]), k=3) == 1
    assert label_agreement(REAL, LABELS, made, torch.tensor([0, 2, 1]), k=3) == pytest.approx(1 / 3)
    # one neighbour each: the nearest to 10.6 is 11
    assert label_agreement(REAL, LABELS, made, torch.tensor([0, 0, 1]), k=1) == 1
    # between two different neighbours the nearest decides: 10 is nearer to 10.4
    assert label_agreement(REAL, LABELS, column(10.4, 10.6), torch.tensor([2, 1]), k=2) == 1


def test_a_real_image_is_no_neighbour_of_its_own():
    # nearest others: 1 -> 0, 0 -> 0, 1 -> 0, 11 -> 1, 10 -> 2; the labels are 0 0 2 2 1
    assert labels_told_apart(REAL, LABELS, k=1) == pytest.approx(2 / 5)


def test_two_gaussians_are_told_apart_as_often_as_the_closed_form_says(monkeypatch):
    """With many neighbours the rule becomes Bayes' rule, which errs with probability Phi(-distance / 2)."""
    monkeypatch.setattr(agreement, "BLOCK", 100_000)  # several blocks
    n, distance = 4000, 2.0
    labels = torch.arange(2 * n) % 2
    real = normals(2 * n, 1) + distance * labels[:, None]
    made = normals(2 * n, 1, seed=1) + distance * labels[:, None]
    expected = 0.5 * (1 + torch.tensor(distance / 2 / 2**0.5).erf().item())
    assert label_agreement(real, labels, made, labels, k=101) == pytest.approx(expected, abs=0.012)
    assert labels_told_apart(real, labels, k=101) == pytest.approx(expected, abs=0.012)
    assert label_agreement(real, labels, made, 1 - labels, k=101) == pytest.approx(1 - expected, abs=0.012)


def test_classes_that_no_real_image_has_are_never_found():
    assert label_agreement(REAL, LABELS, REAL, torch.full((5,), 7), k=1) == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"real_labels": LABELS.float()}, r"real_labels must be integers \(5,\), one per image; got torch.float32"),
        ({"made_labels": LABELS[:3]}, r"made_labels must be integers \(5,\), one per image; got torch.int64 \(3,\)"),
        ({"k": 6}, r"N and M >= 6"),
        ({"made": REAL * torch.inf}, "features of 5 of 5 images are not finite"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"real": REAL, "real_labels": LABELS, "made": REAL, "made_labels": LABELS, "k": 1}
    with pytest.raises(ValueError, match=message):
        label_agreement(**{**arguments, **change})
