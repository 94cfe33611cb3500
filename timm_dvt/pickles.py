"""Reading files of torch.save without running anything in them: torch's weights-only unpickler with a list of our own.

A checkpoint of the authors' training scripts holds, beside its weights, the optimizer's state, whose learning rates
are numpy scalars. torch refuses those unless numpy's functions are put on a list that the whole process shares. Here
the unpickler is a private copy of torch's, so that what it allows is allowed to nobody else, in no thread, at no time;
and what a file finds under numpy's names is not numpy's, but the functions below, which make one number or fail.
"""

import functools
import importlib.util
import os
import re
import struct
import tarfile
import zipfile
from pickle import UnpicklingError
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.serialization

# What numpy writes for a float64 scalar: scalar(dtype("f8", False, True) with this state, 8 bytes).
_FLOAT64 = ("f8", False, True)
_FLOAT64_STATE = (3, "<", None, None, None, -1, -1, 0)


class RefusedError(Exception):
    """A file that holds more than weights; the message ends a sentence that begins with "it holds"."""


class _Float64:
    """Stands for numpy.dtype: float64, little-endian, and no other."""

    __slots__ = ()

    def __new__(cls, *args):
        if args != _FLOAT64:
            raise RefusedError("a numpy dtype other than float64")
        return super().__new__(cls)

    def __setstate__(self, state):
        if state != _FLOAT64_STATE:
            raise RefusedError("a numpy dtype other than plain little-endian float64")


def _scalar(dtype, data):
    """Stands for numpy's scalar: the Python float of 8 bytes. numpy's own would take any object with dtype("O")."""
    if type(dtype) is not _Float64 or type(data) is not bytes or len(data) != 8:
        raise RefusedError("a numpy scalar that is no float64")
    return struct.unpack("<d", data)[0]


def _encode(text, encoding):
    """Stands for _codecs.encode, by which pickles of protocol 2 write bytes; no other codec is looked up."""
    if type(text) is not str or encoding != "latin1":
        raise RefusedError("a call of _codecs.encode with another codec than latin1")
    return text.encode("latin1")


OURS = {
    "numpy.core.multiarray.scalar": _scalar,  # written under numpy 1
    "numpy._core.multiarray.scalar": _scalar,  # under numpy 2
    "numpy.dtype": _Float64,
    "_codecs.encode": _encode,
}


def read_pickle(path: str) -> Any:
    """The content of a file of torch.save, tensors on the CPU; numpy's float64 scalars become Python floats.

    Raises:
        RefusedError: it holds more than tensors, plain containers and such numbers.
        Exception: of any other kind, from torch or zipfile: it is damaged.
    """
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\3\4"  # as torch decides
    if not is_zip and tarfile.is_tarfile(path):
        raise RefusedError("a tar archive, torch's oldest format, which torch cannot read safely")
    sizes = _records(path) if is_zip else None
    unpickler = _unpickler()

    class Unpickler(unpickler.Unpickler):  # type: ignore[name-defined]
        """Below torch 2.10 a storage that claims to be larger than its record would be read beyond its end."""

        @property
        def persistent_load(self):
            return self._load_storage

        @persistent_load.setter
        def persistent_load(self, load):
            def check(saved_id):
                _, kind, key, _, count, *_ = saved_id
                dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
                if sizes is not None and sizes.get(f"data/{key}") != count * dtype.itemsize:
                    raise RefusedError(f"a storage, {key}, of another size than it says")
                return load(saved_id)

            self._load_storage = check

    private = SimpleNamespace(Unpickler=Unpickler, load=unpickler.load)
    # torch.load as it is, but for which module it takes the weights-only unpickler from.
    torchs = torch.serialization.load
    load = FunctionType(
        torchs.__code__,
        {**torchs.__globals__, "_weights_only_unpickler": private},
        torchs.__name__,
        torchs.__defaults__,
        torchs.__closure__,
    )
    load.__kwdefaults__ = torchs.__kwdefaults__
    try:
        return load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as e:  # whose text recommends to read the file without any check
        name = re.search(r"GLOBAL (\S+) (?:was not|whose)", str(e))
        raise RefusedError(name[1] if name else "what no state dict does") from e


def _records(path: str) -> dict[str, int]:
    """Sizes of a zip archive's records, by name within its folder.

    Raises:
        RefusedError: it is a TorchScript archive, which torch below 2.6 would run, or unpacks to more than it is.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    sizes = {entry.filename.partition("/")[2]: entry.file_size for entry in entries}
    if "constants.pkl" in {*sizes, *torch._C.PyTorchFileReader(path).get_all_records()}:
        raise RefusedError("a TorchScript archive, which is a program")
    # torch.save writes each record once, and does not compress.
    if len(sizes) < len(entries) or sum(entry.file_size for entry in entries) > os.path.getsize(path):
        raise RefusedError("records that are larger than the file, or there twice")
    return sizes


@functools.cache
def _unpickler() -> ModuleType:
    """A private copy of torch's weights-only unpickler: of torch's names its own and OrderedDict, and those above."""
    spec = importlib.util.find_spec("torch._weights_only_unpickler")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torchs = module._get_allowed_globals().items()
    allowed = {name: value for name, value in torchs if name.startswith("torch.") or name == "collections.OrderedDict"}
    allowed.update(OURS)
    module._get_allowed_globals = lambda: allowed
    module._get_user_allowed_globals = lambda: OURS
    return module
