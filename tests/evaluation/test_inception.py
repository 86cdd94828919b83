"""The FID Inception, against numbers from torch-fidelity 0.4.0 with the weights of `state`."""

import hashlib
import urllib.error

import pytest
import torch

from cm_diffusers.core.draws import derive_seed
from cm_diffusers.evaluation import inception, load_extractor
from cm_diffusers.evaluation.inception import FIDInception, load_published, resize_as_tensorflow


GOLDEN = [[0.034717, 0.143848, 0.041211, 0.036195], [0.038562, 0.149028, 0.037633, 0.036071]]  # every 512th feature
MEANS = [0.21338588, 0.21652918]


def keyed(key, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(derive_seed(key)))


@pytest.fixture(scope="module")
def state():
    """Weights with the published names, as a function of the names, on the scale of trained weights."""
    weights = {}
    for key, value in FIDInception().state_dict().items():
        value = keyed(key, value.shape)
        if key.endswith("num_batches_tracked"):  # the published file lacks these
            continue
        elif key.endswith("conv.weight"):
            value *= (2 / value[0].numel()) ** 0.5
        elif key.endswith("running_var"):
            value = 1 + value.square() / 10
        elif key.endswith("bn.weight"):
            value = 1 + value / 10
        else:
            value /= 10
        weights[key] = value
    return weights | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


@pytest.fixture(scope="module")
def published(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    torch.save(state, path)
    return path


def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (4, 3, 40, 24), generator=generator, dtype=torch.uint8)[:2] / 255


def test_features_are_those_of_torch_fidelity(published, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(inception, "SHA256", hashlib.sha256(published.read_bytes()).hexdigest()[:8])
        extractor = load_extractor("inception", weights=str(published))
    features = extractor(images())
    assert features.shape == (2, 2048) and features.dtype == torch.float32
    torch.testing.assert_close(features[:, ::512], torch.tensor(GOLDEN), rtol=1e-4, atol=0)
    torch.testing.assert_close(features.mean(1), torch.tensor(MEANS), rtol=1e-5, atol=0)
    grey = images()[:, :1]
    assert torch.equal(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match="1 or 3 channels; got 4"):
        extractor(torch.zeros(2, 4, 8, 8))


def test_resizing_reads_pixel_i_at_i_times_the_ratio():
    ramp = torch.arange(4.0)[None, None, :, None].expand(1, 1, 4, 6)
    expected = torch.arange(10.0) * 0.4  # constant beyond the last pixel
    assert torch.allclose(resize_as_tensorflow(ramp, 10)[0, 0, :, 3], expected.clamp(max=3))
    assert torch.allclose(resize_as_tensorflow(torch.ones(1, 3, 500, 400), 299), torch.ones(299))


def test_other_weights_than_the_published_ones_are_refused(published, state, tmp_path):
    with pytest.raises(ValueError, match="is not the published file: its SHA-256 begins with .*, not 6726825d"):
        load_extractor("inception", weights=str(published))
    with pytest.raises(ValueError, match="can't be read: No such file"):
        load_extractor("inception", weights=str(tmp_path / "none.pth"))
    del state["Mixed_7c.branch1x1.conv.weight"]
    with pytest.raises(ValueError, match=r"missing \['Mixed_7c.branch1x1.conv.weight'\]"):
        load_published(FIDInception(), state | {"new": torch.zeros(1)})


def test_no_network_is_said(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="can't be downloaded .*no network.*another extractor"):
        load_extractor("inception")
