"""Checkpoints as the authors' training scripts write them, and the same in other formats of torch and numpy."""

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

STEP = 7
LR = float(np.linspace(0, 2e-4, 100)[STEP])  # of the warm-up


def training_checkpoint(key: str, state: dict[str, torch.Tensor]) -> dict:
    """Weights under `key` beside an AdamW that has made a step, at a rate out of a numpy array, as a schedule's is.

    The optimizer is that of the smaller tensors, so that files of real shapes are a third of the size.
    """
    parameters = [nn.Parameter(tensor.clone()) for tensor in state.values() if tensor.numel() < 1 << 16]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.999), weight_decay=np.float64(1e-5))
    schedule = np.concatenate((np.zeros(0), np.linspace(0, 2e-4, 100)))
    for group in optimizer.param_groups:
        group["lr"] = schedule[STEP]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert type(optimizer.param_groups[0]["lr"]) is np.float64
    return {key: state, "optimizer": optimizer.state_dict(), "step": STEP}


def save(content: object, path: Path, form: str, numpy: str = "numpy._core") -> Path:
    """torch.save as a "zip", a "first zip" of torch 1.5 or a "legacy" file; with numpy's name in version 1 or 2."""
    torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    change(path, b"numpy._core.multiarray\n", f"{numpy}.multiarray\n".encode())
    if form == "first zip":  # nothing about the order of bytes, and addresses for keys
        records = {name: data for name, data in read(path).items() if name.startswith("data") or name == "version"}
        rename = {name: f"data/9{name[5:]:0>14}" for name in records if name.startswith("data/")}
        for name, new in rename.items():
            old, key = (string(text) for text in (name[5:], new[5:]))
            records["data.pkl"] = records["data.pkl"].replace(old, key)
        write(path, {rename.get(name, name): data for name, data in records.items()})
    return path


def change(path: Path, old: bytes, new: bytes) -> None:
    """Replace bytes in the pickle of a file of torch.save."""
    if zipfile.is_zipfile(path):
        records = read(path)
        write(path, records | {"data.pkl": records["data.pkl"].replace(old, new)})
    else:
        path.write_bytes(path.read_bytes().replace(old, new))


def read(path: Path) -> dict[str, bytes]:
    """The records of a zip file of torch.save, by their names within its folder."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write(path: Path, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """A zip file of these records."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    path.write_bytes(buffer.getvalue())


def string(text: str) -> bytes:
    """A text as pickles of protocol 2 hold it."""
    data = text.encode()
    return b"X" + len(data).to_bytes(4, "little") + data
