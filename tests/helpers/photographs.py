"""A folder of small pictures of many shapes, some of which are broken, and a model for them."""

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

import timm_dvt

MODEL = "test_vit.r160_in1k"
BROKEN = ("empty.png", "half.jpg", "text.jpg")


def write_pictures(folder: Path, count: int, side: int = 64) -> Path:
    """Smooth random pictures, wide and high by turns, the odd ones in a folder below."""
    draw = np.random.default_rng(0)
    for i in range(count):
        path = folder / ("sub" if i % 2 else ".") / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(draw.integers(0, 256, (4, 4, 3), np.uint8))
        small.resize((side, side * 3 // 4) if i % 3 else (side // 2, side), Image.Resampling.BICUBIC).save(path)
    return folder


def write_broken(folder: Path) -> None:
    """Files that are named as images and are none."""
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
    picture.save(folder / "half.jpg")
    (folder / "half.jpg").write_bytes((folder / "half.jpg").read_bytes()[:900])
    (folder / "text.jpg").write_text("no image")
    (folder / "empty.png").write_bytes(b"")


def denoised_folder(folder: Path) -> Path:
    """A small model of 2 blocks with a denoiser that changes much, as a folder that timm loads."""
    torch.manual_seed(0)
    arguments = {"depth": 2, "img_size": 64, "embed_dim": 64, "num_heads": 1, "dynamic_img_size": True}
    model = timm_dvt.add_denoiser(timm.create_model("vit_tiny_patch16_224", **arguments))
    torch.nn.init.normal_(model.denoiser.pos_embed)
    return timm_dvt.save_pretrained(model, folder, model_args=arguments)
