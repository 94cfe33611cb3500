"""Folders of synthetic pairs for tests of stage 2: random clean maps, and artifacts that all images share."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from timm_dvt.image_files import Fingerprint, Source
from training.pairs.folder import PairFolder, pair_file

MODEL = ["--model", "test_vit", "--no-pretrained"]  # 6 blocks of 64 channels, patches of 16 pixels


def make_maps(image: int, grid: int = 4, channels: int = 64, layers=(5,), crops: int = 0) -> dict:
    draw = torch.Generator().manual_seed(0)
    shared = {layer: torch.randn(grid, grid, channels, generator=draw) for layer in range(6)}
    draw = torch.Generator().manual_seed(100 + image)
    maps = {}
    for layer in layers:
        clean = torch.randn(grid, grid, 4, generator=draw) @ torch.randn(4, channels, generator=draw)
        artifacts = shared[layer] + 0.1 * torch.randn(grid, grid, channels, generator=draw)
        maps[layer] = {"raw": clean + artifacts, "clean": clean, "artifacts": artifacts}
        if crops:
            cleans = torch.randn(crops, grid, grid, 4, generator=draw) @ torch.randn(4, channels, generator=draw)
            maps[layer] |= {"crops.raw": cleans + artifacts, "crops.clean": cleans}
    return maps


def write_pairs(folder: Path, count: int = 12, grid: int = 4, layers=(5,), crops: int = 0, **settings) -> Path:
    """Pairs as training.denoise_images would leave them for `test_vit` with random weights of seed 0."""
    known = {
        **({"crops": crops} if crops else {}),
        "model": "test_vit",
        "pretrained": False,
        "seed": 0,
        "grid": grid,
        "channels": 64,
        "layers": list(layers),
        "input_size": 16 * grid,
        "stride": 16,
    }
    with PairFolder(folder, {**known, **settings}) as pairs:
        for image in range(count):
            content = Fingerprint(f"{image:064x}", 0, 0)
            maps = make_maps(image, grid, layers=layers, crops=crops)
            pairs.save(Source(f"{image}.png", folder), content, maps, {})
    return folder


def pair_path(folder: Path, image: int) -> Path:
    return folder / pair_file(f"{image}.png", f"{image:064x}")


def change_pair(path: Path, **maps) -> None:
    """Put other maps into a pair: `change_pair(path, raw=...)` for block 5."""
    save_file({**load_file(path), **{f"5.{part}": value for part, value in maps.items()}}, path, {"pair": "{}"})
