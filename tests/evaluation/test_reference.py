import sys

import pytest
import torch

from cm_diffusers.core.draws import permutation
from cm_diffusers.evaluation import (
    Moments,
    check_samples,
    density_coverage,
    frechet_distance,
    kernel_distance,
    load_extractor,
    measure,
    precision_recall,
    reference,
    reference_features,
)


class Flat(torch.nn.Module):
    """Flatten images and count them in `seen`."""

    seen = 0

    def forward(self, images):
        self.seen += len(images)
        return images.flatten(1)


def images(n=60, seed=0):
    return torch.randint(0, 256, (n, 1, 2, 3), generator=torch.Generator().manual_seed(seed)) / 255


def test_features_are_computed_once_and_read_again(tmp_path):
    extractor = load_extractor(Flat())
    first = reference_features(images(), extractor, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    again = reference_features(list(images().split(7)), extractor, tmp_path / "cache")
    assert extractor.network.seen == 60
    assert torch.equal(first.features, images().flatten(1)) and torch.equal(again.features, first.features)
    assert again.facts == first.facts and first.facts["images"] == 60 and first.facts["shape"] == [1, 2, 3]
    assert torch.equal(again.moments.covariance, first.moments.covariance)
    torch.testing.assert_close(first.moments.covariance, images().flatten(1).double().T.cov())
    assert path.suffix == ".safetensors"


def test_other_images_another_order_and_another_extractor_are_computed_anew(tmp_path):
    reference_features(images(), load_extractor(Flat()), tmp_path)
    reference_features(images(seed=1), load_extractor(Flat()), tmp_path)
    reference_features(images().flip(0), load_extractor(Flat()), tmp_path)
    reference_features(images(), load_extractor(torch.nn.Flatten()), tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    turned = images().reshape(60, 1, 3, 2)  # the same bytes
    found = reference_features(turned, load_extractor(Flat()), tmp_path)
    assert found.facts["shape"] == [1, 3, 2] and len(list(tmp_path.iterdir())) == 5


def test_the_features_of_another_dataset_under_this_name_are_refused(tmp_path):
    extractor = load_extractor(Flat())
    for seed in (0, 1):
        reference_features(images(seed=seed), extractor, tmp_path / str(seed))
    (mine,), (theirs,) = ((tmp_path / name).iterdir() for name in "01")
    mine.write_bytes(theirs.read_bytes())
    with pytest.raises(ValueError, match=f"{mine.name} holds .* another dataset or extractor: data_hash"):
        reference_features(images(), extractor, tmp_path / "0")
    mine.write_bytes(theirs.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{mine.name} is damaged"):
        reference_features(images(), extractor, tmp_path / "0")


def test_of_many_images_some_are_kept_and_all_are_counted(monkeypatch):
    monkeypatch.setattr(reference, "KEPT", 20)
    found = reference_features(list(images().split(7)), load_extractor(Flat()))
    rows = images().flatten(1)
    assert found.features.shape == (20, 6) and len(found.features.unique(dim=0)) == 20
    places = [int((row == rows).all(1).nonzero()) for row in found.features]
    assert places == sorted(places) and places != list(range(20))  # not the first ones
    assert found.moments.count == 60
    torch.testing.assert_close(found.moments.mean, rows.double().mean(0))


def test_a_cached_reference_counts_all_images_though_it_keeps_some(monkeypatch, tmp_path):
    monkeypatch.setattr(reference, "KEPT", 20)
    for _ in range(2):
        found = reference_features(images(), load_extractor(Flat()), tmp_path)
        assert found.moments.count == 60 and len(found.features) == 20
        torch.testing.assert_close(found.moments.covariance, images().flatten(1).double().T.cov())


def test_images_that_can_not_be_a_reference_are_refused():
    with pytest.raises(ValueError, match="not an iterator"):
        reference_features(iter([images()]), load_extractor(Flat()))
    with pytest.raises(ValueError, match="no images"):
        reference_features([], load_extractor(Flat()))
    with pytest.raises(ValueError, match="differ in shape"):
        reference_features([images(), torch.zeros(1, 1, 3, 3)], load_extractor(Flat()))


def test_all_metrics_are_measured_by_their_names():
    found = reference_features(images(), load_extractor(Flat()))
    made = images(50, seed=2).flatten(1)
    real = found.features
    results = measure(made, found)
    assert results["frechet_distance"] == pytest.approx(frechet_distance(real, made), rel=1e-12)
    value, deviation = kernel_distance(made, real, subset_size=25)
    assert (results["kernel_distance"], results["kernel_distance_std"]) == (value, deviation)
    few = real[permutation(60, "neighbours")[:50]]
    assert (results["precision"], results["recall"]) == precision_recall(few, made)
    assert (results["density"], results["coverage"]) == density_coverage(few, made)
    assert "fid" not in results
    with pytest.raises(ValueError, match="6 images are too few for the covariance of 6 features"):
        measure(made[:6], found)
    with pytest.raises(ValueError, match="not finite"):
        measure(made / 0, found)


@pytest.mark.parametrize("samples, size", [(50, 25), (1999, 999), (2000, 1000), (2400, 1000)])
def test_kernel_distances_are_of_subsets_of_a_thousand_or_of_half_of_fewer_samples(monkeypatch, samples, size):
    sizes, module = [], sys.modules[measure.__module__]  # the module has the function's name
    monkeypatch.setattr(module, "kernel_distance", lambda *args, **kwargs: (sizes.append(kwargs["subset_size"]), 0.0))
    monkeypatch.setattr(module, "neighbour_metrics", lambda *args: (0.0,) * 4)
    real = images(3000).flatten(1)
    measure(images(samples, seed=2).flatten(1), reference.Reference(Moments(real), real, {"extractor": "x"}))
    assert sizes == [size]


def test_samples_and_a_reference_of_too_few_images_are_seen_beforehand():
    few, many = (reference_features(images(n), load_extractor(Flat())) for n in (6, 7))
    for count, found in ((100, few), (6, many)):
        with pytest.raises(ValueError, match="6 images are too few for the covariance of 6 features"):
            check_samples(count, found)
    check_samples(7, many)


@pytest.mark.parametrize(
    "name, samples, called", [("inception", 50, True), ("inception", 49, False), ("x", 50, False)]
)
def test_only_distances_of_enough_samples_by_the_inception_are_called_fid(monkeypatch, name, samples, called):
    monkeypatch.setattr(sys.modules[measure.__module__], "FID_SAMPLES", 50)  # the module has the function's name
    real = images().flatten(1)
    found = reference.Reference(Moments(real), real, {"extractor": name})
    results = measure(images(samples, seed=2).flatten(1), found)
    assert ("fid" in results) == called
    assert not called or results["fid"] == results["frechet_distance"]
