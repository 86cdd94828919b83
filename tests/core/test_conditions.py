"""Conditions: their rows are picked, moved, dropped and joined, whatever they hold."""

import pytest
import torch

from cm_diffusers.core.conditions import NOTHING, Condition, Rewired, call_network, keywords_for, of_classes
from cm_diffusers.core.denoisers import EDMDenoiser, Guided


LABELS, TEXT = torch.arange(4), torch.arange(24.0).reshape(4, 2, 3)
BOTH = Condition({"class_labels": LABELS, "text": TEXT}, {"text": torch.full((2, 3), -1.0)})


def same(condition, **entries):
    assert condition.entries.keys() == entries.keys()
    return all(torch.equal(condition.entries[name], entry) for name, entry in entries.items())


def test_rows_are_picked_as_tensors_are_indexed():
    for index in (slice(1, 3), [3, 0], torch.tensor([True, False, True, True])):
        assert same(BOTH.rows(index), class_labels=LABELS[index], text=TEXT[index])
        assert BOTH.rows(index).nulls is BOTH.nulls


def test_rows_are_dropped_to_the_null_where_there_is_one_and_nothing_else_is_touched():
    mask = torch.tensor([True, False, False, True])
    expected = TEXT.clone()
    expected[mask] = -1
    assert same(BOTH.dropped(mask), class_labels=LABELS, text=expected)
    assert same(BOTH.dropped(), class_labels=LABELS, text=torch.full_like(TEXT, -1))
    assert same(BOTH, class_labels=LABELS, text=torch.arange(24.0).reshape(4, 2, 3))
    with pytest.raises(ValueError, match="no null"):
        of_classes(LABELS).dropped(mask)


def test_conditions_are_joined_moved_and_extended():
    joined = BOTH.joined(BOTH.dropped(), BOTH.rows([1]))
    assert joined.entries["class_labels"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 1] and len(joined.entries["text"]) == 9
    assert same(of_classes(LABELS).also(text=TEXT), class_labels=LABELS, text=TEXT)
    moved = BOTH.to("meta")
    assert {part.device.type for part in (*moved.entries.values(), *moved.nulls.values())} == {"meta"}
    assert same(NOTHING.joined(NOTHING).rows([0]).to("cpu"))


@pytest.mark.parametrize(
    "entries, nulls, message",
    [
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, {}, "same number of rows"),
        ({"a": torch.zeros(2, 3)}, {"a": torch.zeros(2)}, r"shape of a row, \(3,\); got \(2,\)"),
        ({"a": torch.zeros(2)}, {"b": torch.zeros(())}, "no entry 'b'"),
    ],
)
def test_what_does_not_fit_together_is_refused(entries, nulls, message):
    with pytest.raises(ValueError, match=message):
        Condition(entries, nulls)


class Wrapped(torch.nn.Module):
    """Like the wrapper of a network for several processes."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class OwnWay(torch.nn.Module):
    def adapt_condition(self, condition):
        return {"everything": sum(entry.sum() for entry in condition.entries.values())}

    def forward(self, x, everything):
        return x + everything


def test_networks_are_told_by_the_names_of_the_entries_or_in_their_own_way():
    assert call_network(lambda x, class_labels, text: (x, class_labels, text), 1, condition=BOTH) == (1, LABELS, TEXT)
    assert call_network(lambda x: x, 5) == call_network(lambda x: x, 5, condition=NOTHING) == 5
    network = OwnWay()
    for told in (network, Wrapped(network), Rewired(network, network), Rewired(Wrapped(network), network)):
        assert call_network(told, 1.0, condition=BOTH) == 1 + LABELS.sum() + TEXT.sum()


def test_bare_labels_are_refused_with_what_to_do():
    with pytest.raises(TypeError, match="of_classes"):
        keywords_for(lambda: None, LABELS)


def test_guidance_knows_nothing_of_what_it_guides():
    class Network(torch.nn.Module):
        def forward(self, x, label, text, class_labels):
            output = x * (1 + text.sum((1, 2)))[:, None] + class_labels[:, None]
            return type("Output", (), {"sample": output})

    denoiser, x, sigma = (
        EDMDenoiser(Network(), 0.5),
        torch.randn(4, 7).double(),
        torch.tensor([0.1, 1, 5, 80]).double(),
    )
    null = Condition({"class_labels": LABELS, "text": torch.full_like(TEXT, -1)})
    guided = Guided(denoiser, 3.0, {"text": torch.full((2, 3), -1.0)})(x, sigma, Condition(BOTH.entries))
    given, none = denoiser(x, sigma, BOTH), denoiser(x, sigma, null)
    torch.testing.assert_close(guided, none + 3 * (given - none), rtol=1e-12, atol=1e-12)
