"""A small saved model as the content of its files, for tests that damage it."""

from pathlib import Path

import timm
import torch

import timm_dvt

SMALL = {"depth": 1, "img_size": 32}
ERRORS = (Exception,)  # what may come out of loading; a crash, a hang or a SystemExit is none of these


def small_files(folder: Path) -> dict[str, bytes]:
    """The content of a small saved model's two files."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, embed_dim=32, num_heads=2)
    arguments = {**SMALL, "embed_dim": 32, "num_heads": 2}
    timm_dvt.save_pretrained(timm_dvt.add_denoiser(model), folder, model_args=arguments)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder: Path, files: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def load(folder: Path, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()
