"""Reading files of torch.save without running anything in them: a reader of the few instructions that weights need.

The standard library's pickletools takes a pickle apart without acting on it. What is done with each instruction stands
below: tensors, numbers, texts and plain containers are made, and every name that a file may use is in `NAMES`. So no
list of torch's that the whole process shares is read or written, and what only looks like a file of weights is refused
before it costs anything: a key that takes for ever to hash, a tensor that is larger than its bytes.
"""

import math
import os
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from io import BufferedReader, BytesIO
from typing import Any, NamedTuple

import torch

from timm_dvt.errors import UserError
from timm_dvt.weights.limits import MAX_TENSORS

MOST_INSTRUCTIONS = 1 << 20  # several training checkpoints of the largest ViT; seconds
MOST_SHARING = 16  # how often the bytes of a file may be used: layers share weights, but nobody's share one number
LARGEST_KEY = 1 << 60  # larger whole numbers can be chosen to collide in a dict

# What numpy writes for a float64 scalar: scalar(dtype("f8", False, True) with this state, 8 bytes).
_FLOAT64 = ("f8", False, True)
_FLOAT64_STATE = (3, "<", None, None, None, -1, -1, 0)


class RefusedError(Exception):
    """A file that holds more than weights; the message ends a sentence that begins with "it holds"."""


class Call(NamedTuple):
    """A function that a file may call by a name."""

    function: Callable[..., Any]


class Storage(NamedTuple):
    """The kind of a storage, by its name in torch; with what it holds once it is read."""

    dtype: torch.dtype
    flat: torch.Tensor | None = None


class _Float64:
    """Stands for a numpy.dtype: float64, little-endian, and no other."""

    def __init__(self, *args):
        if args != _FLOAT64:
            raise RefusedError("a numpy dtype other than float64")

    def check(self, state):
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


def _ordered(pairs=()):
    return OrderedDict((_key(key), value) for key, value in pairs)


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    """A view of a storage. Raises RefusedError for one beyond it, or that repeats its numbers without end."""
    numbers = (offset, *size, *stride)
    if type(storage) is not Storage or storage.flat is None or metadata or not len(size) == len(stride) <= 8:
        raise RefusedError("a tensor that is no plain one")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise RefusedError("a tensor of a size or place that is no whole number")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if count else -1
    if count > len(storage.flat) or last >= len(storage.flat):
        raise RefusedError("a tensor that is larger than its storage")
    return storage.flat.as_strided(tuple(size), tuple(stride), offset)


_DTYPES = ("float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")
DTYPES = {name: getattr(torch, name) for name in _DTYPES}
STORAGES = {"Half": "float16", "BFloat16": "bfloat16", "Float": "float32", "Double": "float64", "Byte": "uint8"}
STORAGES |= {"Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64", "Bool": "bool"}
OURS: dict[str, Callable[..., Any]] = {
    "numpy.core.multiarray.scalar": _scalar,  # written under numpy 1
    "numpy._core.multiarray.scalar": _scalar,  # under numpy 2
    "numpy.dtype": _Float64,
    "_codecs.encode": _encode,
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, requires_grad, hooks, state: tensor,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": torch.device,
}
NAMES: dict[str, Any] = {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
NAMES |= {f"torch.{name}Storage": Storage(DTYPES[dtype]) for name, dtype in STORAGES.items()}


def read_pickle(path: str) -> Any:
    """The content of a file of torch.save, tensors on the CPU; numpy's float64 scalars become Python floats.

    Raises:
        RefusedError: it holds more than tensors, plain containers and such numbers.
        Exception: of any other kind: it is damaged.
    """
    with open(path, "rb") as file:
        start = file.read(512)
        file.seek(0)
        if start.startswith(b"PK\3\4"):  # as torch decides
            return _read_zip(file)
        if start[257:262] == b"ustar":
            raise RefusedError("a tar archive, torch's oldest format, which nothing can read safely")
        return _read_legacy(file)


def _read_zip(file: BufferedReader) -> Any:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        if "constants.pkl" in entries:
            raise RefusedError("a TorchScript archive, which is a program")
        # torch.save writes each record once, and does not compress.
        if len(entries) < len(archive.filelist) or sum(e.file_size for e in archive.filelist) > _size(file):
            raise RefusedError("records that are larger than the file, or there twice")
        swap = "byteorder" in entries and archive.read(entries["byteorder"]) == b"big"
        read: dict[str, bytearray] = {}

        def storage(key: str, dtype: torch.dtype, count: int) -> torch.Tensor:
            entry = entries.get(f"data/{key}")
            if entry is None or entry.file_size != count * dtype.itemsize:
                raise RefusedError(f"a storage, {key}, of another size than it says")
            if key not in read:
                read[key] = bytearray(archive.read(entry))
                if swap and count:
                    torch.frombuffer(read[key], dtype=dtype).untyped_storage().byteswap(dtype)
            return torch.frombuffer(read[key], dtype=dtype) if count else torch.empty(0, dtype=dtype)

        return _Reader(storage, _size(file)).load(BytesIO(archive.read(entries["data.pkl"])))


def _read_legacy(file: BufferedReader) -> Any:
    """A file as torch wrote it before 1.6: four pickles, a list of storages' names, and what those hold."""
    storages: dict[str, torch.Tensor] = {}
    unclaimed = _size(file)

    def storage(key: str, dtype: torch.dtype, count: int) -> torch.Tensor:
        nonlocal unclaimed
        if key not in storages:
            unclaimed -= count * dtype.itemsize
            if unclaimed < 0:
                raise RefusedError(f"a storage, {key}, of another size than it says")
            storages[key] = torch.empty(count, dtype=dtype)
        if (storages[key].dtype, len(storages[key])) != (dtype, count):
            raise RefusedError(f"a storage, {key}, of two kinds")
        return storages[key]

    load = _Reader(storage, _size(file)).load
    if (load(file), load(file)) != (0x1950A86A20F9469CFC6C, 1001):
        raise UserError("it does not begin as torch's files do")
    load(file)  # about the machine that wrote it
    content = load(file)
    keys = [str(_key(key)) for key in load(file)]
    if set(keys) != storages.keys() or len(keys) > len(storages):
        raise UserError("its storages are not those that its tensors have")
    for key in keys:
        if int.from_bytes(file.read(8), "little") != len(storages[key]):
            raise RefusedError(f"a storage, {key}, of another size than it says")
        room = storages[key].view(torch.uint8).numpy().data
        if len(room) and file.readinto(room) < len(room):
            raise EOFError("it ends in the middle of a tensor")
    return content


def _size(file: BufferedReader) -> int:
    return os.fstat(file.fileno()).st_size


def _key(value: Any) -> str | int:
    """A key of a dict: text or a number. To hash a tuple of tuples can take for ever, or end the process."""
    if type(value) is str or (type(value) is int and abs(value) < LARGEST_KEY):
        return value
    raise RefusedError("a key that is neither text nor a whole number")


class _Reader:
    """Reads pickles of one file; `storage` gives the numbers of (name, dtype, count), `size` are the file's bytes."""

    def __init__(self, storage: Callable[[str, torch.dtype, int], torch.Tensor], size: int):
        self.storage = storage
        self.instructions = self.tensors = 0
        self.room = MOST_SHARING * size

    def load(self, file: Any) -> Any:
        """What the next pickle of the file holds."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def pop(count: int | None) -> list[Any]:
            start = marks.pop() if count is None else len(stack) - count
            items, stack[start:] = stack[start:], []
            return items

        argument: Any
        for instruction, argument, _ in pickletools.genops(file):
            self.instructions += 1
            if self.instructions > MOST_INSTRUCTIONS:
                raise RefusedError("more instructions than the weights of any model")
            match instruction.name:
                case (
                    "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINSTRING" | "NONE"
                ):
                    stack.append(argument)
                case "NEWTRUE" | "NEWFALSE" as name:
                    stack.append(name == "NEWTRUE")
                case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE" as name:
                    stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
                case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                    stack.append(tuple(pop(int(name[5:]) if name[5:] else None)))
                case "APPEND" | "APPENDS" as name:
                    items = pop(1 if name == "APPEND" else None)
                    _check(stack[-1], list).extend(items)
                case "SETITEM" | "SETITEMS" as name:
                    items = pop(2 if name == "SETITEM" else None)
                    entries = _check(stack[-1], dict, OrderedDict)
                    if len(items) > 2 * MAX_TENSORS or len(entries) > MAX_TENSORS:
                        raise RefusedError("more entries than the weights of any model")
                    entries.update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))
                case "MARK":
                    marks.append(len(stack))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    name = argument.replace(" ", ".")
                    if name not in NAMES and name not in OURS:
                        raise RefusedError(name)
                    stack.append(NAMES[name] if name in NAMES else Call(OURS[name]))
                case "REDUCE":
                    call, arguments = pop(2)
                    stack.append(self.count(_check(call, Call).function(*_check(arguments, tuple))))
                case "BUILD":
                    made, state = stack[-2], stack.pop()
                    if type(_check(made, _Float64, OrderedDict)) is _Float64:
                        made.check(state)  # an OrderedDict's are versions of modules, and of no use here
                case "BINPERSID":
                    stack.append(self.find_storage(*_check(stack.pop(), tuple)))
                case "PROTO" | "STOP":
                    pass
                case _:
                    raise RefusedError("what no state dict does")
        return stack.pop()

    def count(self, made: Any) -> Any:
        """The same; RefusedError where the file makes more of its bytes than any model does."""
        if isinstance(made, torch.Tensor):
            self.tensors += 1
            self.room -= made.nbytes
        if self.tensors > MAX_TENSORS or self.room < 0:
            raise RefusedError("more tensors than any model has, or far larger ones than the file")
        return made

    def find_storage(self, _: Any, kind: Any, key: Any, device: Any, count: Any, view: Any = None) -> Storage:
        if type(kind) is not Storage or type(key) is not str or type(count) is not int or count < 0 or view is not None:
            raise RefusedError("a storage of another kind than weights have")
        return Storage(kind.dtype, self.storage(key, kind.dtype, count))


def _check(value: Any, *types: type) -> Any:
    if type(value) not in types:
        raise RefusedError("what no state dict does")
    return value
