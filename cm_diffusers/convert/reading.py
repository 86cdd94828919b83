"""Reading checkpoints of other projects without running any of their code.

- `.pt` and `.pth` go through torch's `weights_only` reader, `.safetensors` through safetensors.
- EDM and its descendants pickle whole modules together with their source text. An unpickler with a short list of
  allowed names rebuilds their tensors. It refuses every other name and runs no source text.
"""

import collections
import io
import math
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # start of torch.save files before it wrote zip files
STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
CONTAINERS = ("ModuleDict", "ModuleList", "Sequential")
SCALARS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "b1": "<?"}  # numpy's codes to those of struct
HELP = (
    "Nothing of it was run. If you trust where it comes from, load it with the code that wrote it, on a machine"
    " without valuable data. Save its weights by torch.save(network.state_dict(), 'weights.pt') and convert that file."
)


class Stub:
    """An inert stand-in for an object: its constructor's arguments and its state."""

    def __init__(self, *args: Any):
        self.args, self.state = args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Module(Stub):
    """An inert stand-in for a torch module: `state` is its `__dict__`, `kind` the name of its class."""

    kind = "container"


def read_checkpoint(path: Path | str) -> Any:
    """Read the content of `path`: tensors on the CPU, numbers, text, containers, and stand-ins for modules.

    Raises:
        ValueError: the file is missing, damaged, of another kind, or asks to run code.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the file of the checkpoint in that folder.")
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}.") from None
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if start.startswith(b"PK\x03\x04"):
            return _read_zip(path)
        if start.startswith(TORCH_LEGACY) or start[257:262] == b"ustar":
            return torch.load(path, map_location="cpu", weights_only=True)
        if start.startswith(b"\x80"):
            with open(path, "rb") as file:
                return RestrictedUnpickler(file).load()
    except Refused as error:
        raise ValueError(f"{path} is refused: {error} {HELP}") from None
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))  # of torch's reader
        reason = f"it asks for {asked[1]}, which weights never need" if asked else _first_sentence(error)
        raise ValueError(f"{path} is refused: {reason}. {HELP}") from None
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a valid .safetensors file: {error}. Fetch it anew or save it again."
        ) from None
    except Exception as error:  # a hostile or torn file can fail anywhere in the readers
        reason = f"{type(error).__name__}: {_first_sentence(error)}"
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason}). Fetch it anew.") from None
    raise ValueError(f"{path} is neither a torch.save file, nor a pickle, nor .safetensors. Is it the right file?")


def _first_sentence(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")


class Refused(Exception):
    """The file asks for something that no checkpoint needs."""


def _read_zip(path: Path) -> Any:
    """Read a torch.save file: weights, or modules in a training state of EDM."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        root = names[0].split("/")[0]
        known = {f"{root}/{name}" for name in ("data.pkl", "version", "byteorder", ".format_version")}
        known |= {f"{root}/{name}" for name in (".storage_alignment", ".data/serialization_id")}
        extra = [n for n in names if n not in known and not n.removeprefix(f"{root}/data/").isdecimal()]
        if extra or f"{root}/data.pkl" not in names:
            what = f"it holds {extra[0]!r}" if extra else "it holds no data.pkl"
            raise Refused(f"{what}, so it is not a plain torch.save file.")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            return RestrictedUnpickler(io.BytesIO(archive.read(f"{root}/data.pkl")), archive, root).load()


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that builds tensors, plain containers and stand-ins, and refuses every other name.

    It calls its own bound methods in place of functions, because a pickle can set attributes of functions and classes.

    Args:
        file: the open pickle.
        archive, root: zip file of torch.save around the pickle, and its top folder `root`; members hold the storages.
    """

    def __init__(self, file: Any, archive: zipfile.ZipFile | None = None, root: str = ""):
        super().__init__(file)
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        """The replacement for `module`.`name`.

        Raises:
            Refused: the name is not on the list of allowed names.
        """
        allowed = {
            "collections.OrderedDict": collections.OrderedDict,
            "builtins.getattr": Stub,  # ECT's loss object stores one of its methods
            "builtins.set": set,
            "__builtin__.set": set,
            "_codecs.encode": self._bytes,
            "dnnlib.util.EasyDict": dict,
            "torch_utils.persistence._reconstruct_persistent_obj": self._module,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch.storage._load_from_bytes": self._storage,
            "numpy.dtype": Stub,
            "numpy.core.multiarray.scalar": self._scalar,
            "numpy._core.multiarray.scalar": self._scalar,
        }
        allowed |= {f"torch.nn.modules.container.{kind}": Module for kind in CONTAINERS}
        allowed |= {f"torch.{storage}": storage for storage in STORAGES}
        if f"{module}.{name}" not in allowed:
            raise Refused(f"it asks for {module}.{name}, which weights never need.")
        return allowed[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """The storage that `pid` names, as a flat tensor (n,).

        Raises:
            Refused: `pid` names something outside the zip file, or a compressed member.
        """
        kind, storage, key, _, numel = pid
        if kind != "storage" or self._archive is None:
            raise Refused("it refers to something outside itself.")
        member = self._archive.getinfo(f"{self._root}/data/{key}")
        if member.compress_type != zipfile.ZIP_STORED:
            raise Refused(f"its member {member.filename!r} is compressed; torch.save never compresses.")
        return _flat(self._archive.read(member), STORAGES[storage])

    def _module(self, meta: dict) -> Module:
        module = Module()
        module.kind, module.state = str(meta["class_name"]), meta["state"]
        return module

    def _parameter(self, data: torch.Tensor, *_: Any) -> torch.Tensor:
        return data

    def _storage(self, data: bytes) -> torch.Tensor:
        storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(storage, (torch.UntypedStorage, torch.storage.TypedStorage)):
            raise Refused("a tensor's storage is something else than numbers.")
        return torch.empty(0, dtype=storage.dtype).set_(storage)

    def _tensor(self, numbers: torch.Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
        """A tensor from the flat `numbers` of its storage; it can't have more entries than the storage."""
        if not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)) or len(size) != len(stride):
            raise Refused("a tensor has an impossible shape.")
        if math.prod(size) > numbers.numel():
            raise Refused(f"a tensor of shape {tuple(size)} claims more numbers than the file holds.")
        return numbers.as_strided(size, stride, offset).clone()

    def _bytes(self, text: str, encoding: str) -> bytes:
        """Decode bytes as written by pickle protocol 2, which torch.save uses."""
        if encoding != "latin1":
            raise Refused(f"it holds text in the encoding {encoding!r}.")
        return text.encode("latin1")

    def _scalar(self, dtype: Stub, data: bytes) -> float | int | bool:
        return struct.unpack(SCALARS[dtype.args[0]], data)[0]


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler that builds plain containers and stand-ins for numpy arrays, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for `module`.`name`.

        Raises:
            Refused: the name has nothing to do with numpy arrays.
        """
        makers = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
        if f"{module}.{name}" not in (*makers, "numpy.ndarray", "numpy.dtype"):
            raise Refused(f"it asks for {module}.{name}, which arrays never need.")
        return Stub


def read_arrays(pickled: bytes) -> dict[str, Any]:
    """Read a pickled dictionary of plain values and byte arrays, such as a CIFAR-10 batch.

    Args:
        pickled: content of the pickle file. Its arrays become uint8 tensors of the same shape.

    Raises:
        ValueError: the pickle is damaged, of another kind, or asks to run code.
    """
    try:
        values = ArrayUnpickler(io.BytesIO(pickled), encoding="bytes").load()  # the texts of Python 2 stay bytes
        return {
            key.decode() if isinstance(key, bytes) else key: _array(value) if isinstance(value, Stub) else value
            for key, value in values.items()
        }
    except Refused as error:
        raise ValueError(f"it is refused: {error} Nothing of it was run.") from None
    except Exception as error:  # a hostile or torn file can fail anywhere in the reader
        raise ValueError(f"it is damaged ({type(error).__name__}: {_first_sentence(error)}).") from None


def _array(stub: Stub) -> torch.Tensor:
    _, shape, dtype, by_columns, data = stub.state
    if dtype.args[0] not in ("u1", b"u1"):
        raise Refused(f"it holds an array of {dtype.args[0]!r}, not of bytes.")
    numbers = _flat(data, torch.uint8)
    return numbers.reshape(shape[::-1]).permute(*reversed(range(len(shape)))) if by_columns else numbers.reshape(shape)


def _flat(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def flatten(module: Module) -> dict[str, torch.Tensor]:
    """The tensors (of any shape) of the stand-in `module`, under the names of `state_dict()`.

    Raises:
        ValueError: `module` or a part of it is not a module, or contains itself.
    """
    tensors, waiting, seen = {}, [("", module)], set()
    while waiting:
        prefix, module = waiting.pop()
        if not isinstance(module, Module) or not isinstance(module.state, dict) or id(module) in seen:
            name = prefix.rstrip(".")
            entry = f"The entry {name!r} of the network" if name else "The network"
            raise ValueError(f"{entry} is not a module, or contains itself. {HELP}")
        seen.add(id(module))
        parts = {}
        for group in ("_parameters", "_buffers", "_modules"):
            parts |= dict(module.state.get(group) or {})
        tensors |= {f"{prefix}{name}": part for name, part in parts.items() if torch.is_tensor(part)}
        waiting += [(f"{prefix}{name}.", p) for name, p in parts.items() if not (p is None or torch.is_tensor(p))]
    return tensors
