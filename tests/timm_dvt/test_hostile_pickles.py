"""Pickles that hide behind the names a training checkpoint may use: refused, whatever they name, call or claim."""

import os
import resource
import tarfile
import warnings
import zipfile

import pytest
import timm
import torch

import timm_dvt
from tests.helpers import authors, reference
from tests.helpers.authors import string

ARRAY = "numpy._core.multiarray"
FLOAT64 = b"(K\x03" + string("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"  # the state of such a dtype


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def data(text: str, codec: str = "latin1") -> bytes:
    return call(named("_codecs", "encode"), string(text), string(codec))


def dtype(kind: str = "f8", state: bytes = FLOAT64) -> bytes:
    return call(named("numpy", "dtype"), string(kind), b"\x89", b"\x88") + state + b"b"


def scalar(*arguments: bytes, module: str = ARRAY) -> bytes:
    return call(named(module, "scalar"), *arguments)


EIGHT = data("\0" * 8)
SHELL = call(named("os", "system"), string("touch pwned"))
HUGE = b"\x8a\x05\x00\x00\x00\x00\x10"  # 2 ** 36
CASES = {
    # what numpy's own scalar and dtype would do with it
    "object": scalar(dtype("O"), EIGHT),
    "object holding a call": scalar(dtype("O"), SHELL),
    "object of numpy 1": scalar(dtype("O8"), SHELL, module="numpy.core.multiarray"),
    "object under float64's name": scalar(dtype("f8", FLOAT64.replace(b"N", string("O"), 1)), EIGHT),
    "float64 holding a call": scalar(dtype(), SHELL),
    "nested pickle": scalar(dtype(), call(named("pickle", "loads"), EIGHT)),
    "structure": scalar(dtype("f8", FLOAT64.replace(b"NNN", b"N" + string("a") + b"}", 1)), EIGHT),
    "structure of objects": scalar(dtype("f8,O"), EIGHT),
    "sub-array": scalar(dtype("(1000000000,)f8"), EIGHT),
    "void of 64 GB": scalar(dtype(f"V{1 << 36}"), EIGHT),
    "text of 64 GB": scalar(call(named("numpy", "dtype"), string(f"U{1 << 34}"), b"\x89", b"\x88"), EIGHT),
    "other byte order": scalar(dtype("f8", FLOAT64.replace(b"<", b">")), EIGHT),
    "float32": scalar(dtype("f4"), data("\0" * 4)),
    "dtype without its arguments": scalar(call(named("numpy", "dtype"), string("f8")), EIGHT),
    "dtype of a callable": scalar(call(named("numpy", "dtype"), named("_codecs", "encode"), b"\x89", b"\x88"), EIGHT),
    "dtype of a dict": scalar(call(named("numpy", "dtype"), b"}", b"\x89", b"\x88"), EIGHT),
    "dtype made without a call": scalar(named("numpy", "dtype") + b"(" + string("O") + b"\x89\x88t\x81", EIGHT),
    "too few bytes": scalar(dtype(), data("\0" * 7)),
    "too many bytes": scalar(dtype(), data("\0" * 9)),
    "no bytes": scalar(dtype()),
    "text for bytes": scalar(dtype(), string("\0" * 8)),
    "no dtype": scalar(b"N", EIGHT),
    "the class for the dtype": scalar(named("numpy", "dtype"), EIGHT),
    # codecs
    "another codec": data("Uryyb", "rot13"),
    "a codec that looks for a module": data("x", "os"),
    "a compressor": call(named("_codecs", "encode"), EIGHT, string("zlib")),
    "an error handler": call(named("_codecs", "encode"), string("é"), string("latin1"), string("namereplace")),
    "no text": call(named("_codecs", "encode"), HUGE, string("latin1")),
    "not latin1": data("€"),
    "decode": call(named("_codecs", "decode"), EIGHT, string("latin1")),
    "lookup": call(named("_codecs", "lookup"), string("rot13")),
    # from an allowed name to another
    "attribute of scalar": call(named(ARRAY, "scalar.__globals__.get"), string("os")),
    "attribute of dtype": named("numpy", "dtype.__subclasses__"),
    "dotted module": named("numpy.dtype", "newbyteorder"),
    "reconstruct": call(named(ARRAY, "_reconstruct"), named("numpy", "ndarray"), b"K\x00\x85", EIGHT),
    "frombuffer": call(named(ARRAY, "frombuffer"), EIGHT),
    "numpy.load": call(named("numpy", "load"), string("x.npy"), b"N", b"\x88"),
    "f2py": call(named("numpy.testing", "runstring"), string("1"), b"}"),
    "result called": call(scalar(dtype(), EIGHT), string("x")),
    "attributes of encode": named("_codecs", "encode") + b"}" + string("__doc__") + b"N" + b"s" + b"b",
    "attributes of dtype": named("numpy", "dtype") + b"}" + string("__new__") + b"N" + b"s" + b"b",
    "attributes of the number": scalar(dtype(), EIGHT) + b"}" + string("x") + b"N" + b"s" + b"b",
    "item of the dtype": dtype() + string("x") + b"N" + b"s",
    # torch's own names that no state dict needs
    "bytes by the billion": call(named("builtins", "bytearray"), HUGE),
    "builtins of Python 2": call(named("__builtin__", "bytearray"), b"K\x05"),
    "a counter": call(named("collections", "Counter"), string("x")),
    "getattr": call(named("builtins", "getattr"), named("numpy", "dtype"), string("mro")),
    "eval": call(named("__builtin__", "eval"), string("1")),
    "system": SHELL,
    "system without a name": string("os") + string("system") + b"\x93" + b"(" + string("touch pwned") + b"tR",
    "inst": b"(" + string("touch pwned") + b"ios\nsystem\n",
}


@pytest.fixture(scope="module")
def model():
    return timm_dvt.add_denoiser(timm.create_model("test_vit"), grid_size=3)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("case", CASES)
def test_a_pickle_that_hides_behind_an_allowed_name_is_refused(case, form, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = good(tmp_path / "file.pth", form)
    timm_dvt.load_denoiser(model, path)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    authors.change(path, string("PLACE"), CASES[case])
    with pytest.raises(timm_dvt.CheckpointError, match="file.pth"):
        timm_dvt.load_denoiser(model, path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert os.listdir(tmp_path) == ["file.pth"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 << 20  # KB


def good(path, form="zip"):
    content = authors.training_checkpoint("denoiser", reference.published_state(64, 3))
    return authors.save(content | {"more": "PLACE"}, path, form)


def test_the_parts_the_cases_are_made_of_are_accepted(model, tmp_path):
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        path = good(tmp_path / "file.pth")
        authors.change(path, string("PLACE"), scalar(dtype(), EIGHT, module=module))
        timm_dvt.load_denoiser(model, path)


def refused(path, model, why):
    with pytest.raises(timm_dvt.CheckpointError, match=f"{path.name}: refused.*It holds.*{why}"):
        timm_dvt.load_denoiser(model, path)


def test_a_storage_is_not_read_beyond_its_end(model, tmp_path):
    path = good(tmp_path / "file.pth")
    records = authors.read(path)
    key = next(name for name, content in records.items() if name.startswith("data/") and len(content) > 1024)
    authors.write(path, records | {key: records[key][:-4]})
    refused(path, model, f"a storage, {key[5:]}, of another size")


@pytest.mark.parametrize("how", ["compressed", "twice", "one place for all"])
def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(how, model, tmp_path):
    path = good(tmp_path / "file.pth")
    records = authors.read(path)
    if how == "compressed":
        authors.write(path, records | {"more": bytes(1 << 26)}, zipfile.ZIP_DEFLATED)
    elif how == "twice":
        with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            archive.writestr("archive/data.pkl", records["data.pkl"])
    else:
        with zipfile.ZipFile(path, "a") as archive:
            large = max(archive.infolist(), key=lambda entry: entry.file_size)
            for i in range(3):
                archive.filelist.append(other := zipfile.ZipInfo(f"archive/{i}"))
                other.header_offset, other.file_size = large.header_offset, large.file_size
                other.compress_size, other.CRC = large.compress_size, large.CRC
            archive._didModify = True
    refused(path, model, "records that are larger than the file, or there twice")


def test_of_two_central_directories_the_last_alone_is_read(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = good(tmp_path / "file.pth")
    timm_dvt.load_denoiser(model, path)
    wanted, harmless = model.denoiser.pos_embed.detach().clone(), path.read_bytes()
    authors.write(path, authors.read(path) | {"data.pkl": b"\x80\x02cposix\nmkdir\nX\x05\x00\x00\x00thing\x85R."})
    harmful = path.read_bytes()
    path.write_bytes(harmless + harmful)
    refused(path, model, "posix.mkdir")
    path.write_bytes(harmful + harmless)
    torch.nn.init.zeros_(model.denoiser.pos_embed)
    timm_dvt.load_denoiser(model, path)
    assert torch.equal(model.denoiser.pos_embed, wanted)
    assert os.listdir(tmp_path) == ["file.pth"]


def test_a_program_is_refused(model, tmp_path):
    path = tmp_path / "file.pth"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    refused(path, model, "a TorchScript archive")


def test_torchs_oldest_format_is_refused(model, tmp_path):
    path = tmp_path / "file.pth"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("storages", "tensors", "pickle"):
            (tmp_path / name).write_bytes(b"\x80\x02K\x00.")
            archive.add(tmp_path / name, name)
    refused(path, model, "a tar archive")
