"""Hostile and damaged files: none of their code runs, and the message names the next step."""

import collections
import io
import json
import math
import os
import pickle
import re
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from cm_diffusers.convert import Options, convert_checkpoint
from cm_diffusers.convert.reading import RestrictedUnpickler, flatten, read_arrays, read_checkpoint
from tests.helpers import foreign_checkpoints as foreign


ADVICE = re.compile(
    r"If you trust where it comes from|Fetch it anew|Is it the right file\?|give the file of the checkpoint"
)


class Payload:
    """An object whose unpickling would create a file."""

    def __init__(self, marker, call=exec):
        self.marker, self.call = marker, call

    def __reduce__(self):
        if self.call is os.system:
            return os.system, (f"touch {self.marker}",)
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


class Custom:
    """An object of a custom class."""


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


def refused(path):
    """The error message for a refused file, which must name the next step."""
    with pytest.raises(ValueError) as error:
        convert_checkpoint(path)
    message = str(error.value)
    assert ADVICE.search(message), message
    assert str(path) in message and len(message) < 1000
    return message


def edm_file(path, **content):
    return foreign.dump(foreign.edm_content(foreign.edm_tensors()) | content, path)


def storage_of(content):
    """`content` in torch.save's legacy format, as bytes for the place of a tensor's storage."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def test_the_payload_works(tmp_path):
    for i, call in enumerate((exec, os.system)):
        pickle.loads(pickle.dumps(Payload(tmp_path / str(i), call)))
        assert (tmp_path / str(i)).exists()


# --- pickles


@pytest.mark.parametrize("call, name", [(exec, "builtins.exec"), (os.system, "posix.system")])
def test_a_payload_is_refused_by_name(call, name, marker, tmp_path):
    message = refused(foreign.dump(Payload(marker, call), tmp_path / "teacher.pkl"))
    assert f"asks for {name}" in message and "Nothing of it was run" in message


def test_a_payload_deep_inside_a_network_is_refused(marker, tmp_path):
    content = foreign.edm_content(foreign.edm_tensors())
    content["ema"].state["_modules"]["model"].state["_modules"]["enc"].state["_hooks"] = [{"a": Payload(marker)}]
    assert "builtins.exec" in refused(foreign.dump(content, tmp_path / "edm.pkl"))


def test_a_payload_beside_the_network_is_refused(marker, tmp_path):
    for i, name in enumerate(("loss_fn", "augment_pipe", "dataset_kwargs")):
        assert "builtins.exec" in refused(edm_file(tmp_path / f"{i}.pkl", **{name: Payload(marker)}))


def test_the_text_of_the_source_is_not_run(marker, tmp_path):
    content = foreign.edm_content(foreign.edm_tensors())
    content["ema"].source = f"open({str(marker)!r}, 'w')"
    content["loss_fn"] = foreign.Persistent("EDMLoss", f"open({str(marker)!r}, 'w')")
    assert convert_checkpoint(foreign.dump(content, tmp_path / "a.pkl")).family == "edm"


def test_a_payload_in_the_bytes_of_a_storage_is_refused(marker, tmp_path):
    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (storage_of(Payload(marker)),)

    message = refused(edm_file(tmp_path / "a.pkl", augment_pipe=Storage()))
    assert "exec" in message


def test_what_stands_for_a_storage_must_be_one(tmp_path):
    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (storage_of({"a": 1}),)

    assert "is something else" in refused(edm_file(tmp_path / "a.pkl", augment_pipe=Storage()))


def test_objects_of_unknown_classes_are_refused_by_name(tmp_path):
    assert "test_reading.Custom" in refused(edm_file(tmp_path / "a.pkl", extra=Custom()))


def test_getattr_gets_nothing(tmp_path):
    """ECT's pickled losses name it; here it would fetch a callable."""

    class Fetch:
        def __reduce__(self):
            return getattr, (collections.OrderedDict, "fromkeys")

    content = read_checkpoint(edm_file(tmp_path / "a.pkl", fetched=Fetch()))
    assert type(content["fetched"]).__name__ == "Stub" and not callable(content["fetched"])


def opcodes(*parts):
    """A handwritten pickle; a text argument is the module and name of a global to load."""
    named = (f"c{part.replace(' ', chr(10))}\n".encode() if isinstance(part, str) else part for part in parts)
    return b"\x80\x02" + b"".join(named) + b"."


@pytest.mark.parametrize(
    "data",
    [
        # attributes set on the stand-ins of functions and classes
        opcodes("torch._utils _rebuild_parameter", b"N}X\x01\x00\x00\x00aNs\x86b"),
        opcodes("torch.nn.modules.container ModuleDict", b"N}X\x0c\x00\x00\x00__setstate__Ns\x86b"),
        opcodes("collections OrderedDict", b"N}X\x08\x00\x00\x00__init__Ns\x86b"),
        opcodes(b"X\x01\x00\x00\x00aQ"),  # a persistent id
        opcodes(b"\x82\x01"),  # a code of copyreg's registry
        opcodes("os system", b"X\x02\x00\x00\x00id\x85R"),
        opcodes("builtins eval", b"X\x01\x00\x00\x001\x85R"),
        opcodes("torch.hub load", b"0"),
        opcodes("numpy.core.multiarray _reconstruct", b"0"),
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x04\x8c\x08builtins\x8c\x04set.__reduce__\x93.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",  # the announced length of the bytes
        b"\x80\x04" + b"(" * 100_000 + b".",
        b"\x80\x04}",
        b"\x80\x04",
    ],
)
def test_opcodes_do_no_harm(data, tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(data)
    refused(path)
    for part in (RestrictedUnpickler, collections.OrderedDict):
        assert "a" not in vars(part)
    check = convert_checkpoint(edm_file(tmp_path / "b.pkl"))  # reading still works
    assert check.family == "edm"


class Rebuilt:
    """A tensor of any shape over a storage of four numbers."""

    def __init__(self, offset, size, stride):
        self.how = offset, size, stride

    def __reduce__(self):
        storage = torch.storage.TypedStorage(wrap_storage=torch.arange(4.0).untyped_storage(), dtype=torch.float32)
        return torch._utils._rebuild_tensor_v2, (storage, *self.how, False, collections.OrderedDict())


def test_tensors_are_rebuilt_as_they_were(tmp_path):
    path = foreign.dump({"a": Rebuilt(1, (3,), (1,)), "b": Rebuilt(0, (2, 2), (1, 2))}, tmp_path / "a.pkl")
    content = read_checkpoint(path)
    assert content["a"].tolist() == [1, 2, 3] and content["b"].tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (2, 1, 3)])
def test_any_tensor_comes_out_of_both_readers_as_torch_has_it(dtype, shape, tmp_path):
    tensor = (3 * torch.randn(shape)).to(dtype)
    content = {"a": tensor, "t": tensor.T if tensor.ndim == 2 else tensor, "module": foreign.Persistent("Layer")}
    for path in (foreign.dump(content, tmp_path / "a.pkl"), foreign.save(content, tmp_path / "a.pt")):
        found = read_checkpoint(path)
        assert torch.equal(found["a"], tensor) and torch.equal(found["t"], content["t"])
        assert found["a"].dtype == dtype and found["module"].kind == "Layer"


@pytest.mark.parametrize("protocol", [2, 4])
def test_numbers_of_numpy_come_out_as_plain_ones(protocol, tmp_path):
    values = {"f8": 0.1, "f4": 1.5, "i8": -(2**40) - 3, "i4": 2**20 + 7, "b1": True}
    content = {kind: np.dtype(kind).type(value) for kind, value in values.items()}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    found = read_checkpoint(tmp_path / "a.pkl")
    assert found == values and [type(found[kind]) for kind in values] == [type(value) for value in values.values()]


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (5,)])
def test_arrays_of_bytes_are_read_in_the_order_that_they_lie_in(shape, protocol):
    array = np.arange(math.prod(shape), dtype=np.uint8).reshape(shape)
    content = {"rows": array, "columns": np.asfortranarray(array), b"name": b"batch"}
    found = read_arrays(pickle.dumps(content, protocol))
    assert found["rows"].tolist() == found["columns"].tolist() == array.tolist() and found["name"] == b"batch"


@pytest.mark.parametrize(
    "offset, size, stride",
    [
        (0, (5,), (1,)),
        (2, (3,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (10**6, 10**6), (0, 0)),
        (0, (3, 4), (0, 1)),
        (-1, (2,), (1,)),
        (0, (-2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (1.0,), (1,)),
    ],
)
def test_tensors_beyond_their_storage_are_refused(offset, size, stride, tmp_path):
    message = refused(foreign.dump({"a": Rebuilt(offset, size, stride)}, tmp_path / "a.pkl"))
    assert 0 not in stride or "more numbers than the file holds" in message


def test_a_network_that_contains_itself_is_refused(tmp_path):
    network = foreign.edm_content(foreign.edm_tensors())["ema"]
    loop = {"_modules": {}}
    network.state["_modules"]["model"].state["_modules"]["a"] = foreign.Persistent("Layer", **loop)
    network.state["_modules"]["model"].state["_modules"]["b"] = network.state["_modules"]["model"].state["_modules"][
        "a"
    ]
    content = read_checkpoint(foreign.dump({"ema": network}, tmp_path / "a.pkl"))
    with pytest.raises(ValueError, match="is not a module"):
        flatten(content["ema"])


# --- files of torch.save


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("content", [lambda payload: payload, lambda payload: {"a": [payload]}])
def test_a_payload_in_a_torch_file_is_refused(new, content, marker, tmp_path):
    path = foreign.save(content(Payload(marker)), tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    assert "exec" in refused(path)


def test_a_torch_file_with_another_member_is_refused(marker, tmp_path):
    path, _ = foreign.write("simo", tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("ct_mnist/payload.pkl", pickle.dumps(Payload(marker)))
    assert "payload.pkl" in refused(path)


def test_a_torch_script_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "a.pt")
    refused(tmp_path / "a.pt")


def test_a_legacy_archive_is_refused(marker, tmp_path):
    path = tmp_path / "a.pt"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(Payload(marker))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    refused(path)


def test_a_compressed_storage_is_refused(tmp_path):
    """A small file that would unpack to a large one."""
    content = {"net": foreign.Persistent("Layer", _buffers={"a": torch.zeros(1000)})}
    path, bomb = foreign.save(content, tmp_path / "a.pt"), tmp_path / "b.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refused(bomb)


def test_metadata_of_a_distributed_checkpoint_is_refused(marker, tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    refused(tmp_path / ".metadata")


def test_a_file_that_accelerate_would_run_is_refused(marker, tmp_path):
    refused(foreign.save(Payload(marker), tmp_path / "custom_checkpoint_0.pkl"))


# --- files of other kinds


def test_a_folder_is_refused(marker, tmp_path):
    (tmp_path / "unet").mkdir()
    foreign.save(Payload(marker), tmp_path / "unet" / "diffusion_pytorch_model.bin")
    refused(tmp_path / "unet")
    refused(tmp_path / "unet" / "diffusion_pytorch_model.bin")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.pt can't be read: No such file"):
        convert_checkpoint(tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.yaml", b"!!python/object/apply:os.system ['touch marker']"),
        ("a.json", b"[" * 10**6),
        ("a.pt", b""),
        ("a.pt", b"<html>404</html>"),
        ("a.pkl", b"PK\x03\x04"),
        ("a.pt", b"PK\x05\x06" + bytes(18)),
    ],
)
def test_files_of_other_kinds_are_refused(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    refused(tmp_path / name)


def test_an_array_of_objects_is_refused(marker, tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([Payload(marker)], dtype=object))
    refused(tmp_path / "a.npz")


@pytest.mark.parametrize("case", ["ddpmpp", "simo"])
def test_torn_files_are_refused(case, tmp_path):
    path, _ = foreign.write(case, tmp_path)
    data = path.read_bytes()
    for length in (1, 10, 300, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        refused(path)


# safetensors


def safetensors(path, header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(start, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header, body, length",
    [
        ({}, b"", 2**63),
        ({}, b"", 2**30),
        (b"[" * 10**6, b"", None),
        (b"{", b"", None),
        ({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4), None),  # overlapping
        ({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6), None),
        ({"a": entry(4, 0)}, bytes(4), None),
        ({"a": entry(-4, 0)}, bytes(4), None),
        ({"a": entry(0, 4, (2,))}, bytes(4), None),
        ({"a": entry(0, 4, (2**63, 2**63))}, bytes(4), None),
        ({"a": entry(0, 400, (100,))}, bytes(4), None),
        ({"a": entry(0, 4, dtype="F33")}, bytes(4), None),
        ({"a": entry(0, 4)}, bytes(8), None),  # bytes after the tensors
    ],
)
def test_hostile_safetensors_are_refused(header, body, length, tmp_path):
    refused(safetensors(tmp_path / "a.safetensors", header, body, length))


def test_safetensors_of_the_wrong_names_are_no_family(tmp_path):
    with pytest.raises(ValueError, match="belongs to no known family"):
        convert_checkpoint(safetensors(tmp_path / "a.safetensors", {"a": entry(0, 4)}, bytes(4)), Options())
