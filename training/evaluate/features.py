"""Frozen features of a split: the backbone runs over an image once, whatever reads the features afterwards.

One forward pass gives all states of a model: raw patch tokens (final norm applied), denoised ones, and the
class token. On disk they lie in half precision, `SHARD` images a safetensors file:

    CACHE/KEY/settings.json             what the key was made from, for people
    CACHE/KEY/000003.safetensors        "raw", "denoised": (n, K, K, C); "prefix": (n, prefix, C)

The key covers all that decides the numbers: weights, sizes, precision, the images and their files' sizes and
times. A shard is there whole or not at all, so a killed run goes on at the shard it died in, and two runs at
once do some work twice but no harm. Without a cache the backbone runs whenever features are read; they are
rounded to half precision then too, so that both ways give the same numbers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate
from tqdm import tqdm

from timm_dvt.model import Denoised
from timm_dvt.saving import write_whole
from timm_dvt.version import __version__
from training.backbone import FeatureReader
from training.evaluate.splits import Split
from training.evaluate.tables import write_json
from training.models import weights_digest

SHARD = 64
# Pillow decodes without the interpreter's lock, so threads keep a GPU fed.
_READERS = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
RESIDENT = 1 << 30  # bytes of one state of a split, up to which it is held in memory


class Extractor:
    """A model's patch tokens in all its states from one forward pass.

    Attributes:
        states: "raw" and, for a model with a denoiser, "denoised".
        reader: of the raw features of the last block.
        model: the model itself.
    """

    def __init__(self, model: nn.Module, input_size: int | None = None, dtype: str = "float32") -> None:
        """
        Args:
            model: a timm VisionTransformer or Eva, with a denoiser or without, on its device.
            input_size: side of the square that images are resized to; None is the model's own default.
            dtype: of the forward pass: "float32" or "bfloat16".

        Raises:
            TypeError, ValueError: as FeatureReader.
        """
        self.model: Any = model.eval().requires_grad_(False)
        own = getattr(self.model, "patch_embed", None)
        size = input_size or (own.img_size[0] if own is not None and own.img_size else None)
        self.reader = FeatureReader(model, input_size=size, dtype=dtype)
        self.dtype = dtype
        self.denoiser = _last_denoiser(self.model)
        self.states = ("raw",) if self.denoiser is None else ("raw", "denoised")

    def resize(self, image: Tensor) -> Tensor:
        """(3, h, w) to (3, S, S), antialiased."""
        size = self.reader.input_size
        if image.shape[-2:] == (size, size):
            return image
        return interpolate(image[None], (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """States of images (B, 3, S, S) in [0, 1]: {state: (B, K, K, C), "prefix": (B, prefix, C)} float32."""
        prefix, maps = self.reader.tokens(images)
        (raw,) = maps.values()
        found = {"raw": raw, "prefix": prefix}
        if self.denoiser is not None:
            dtype = self.model.patch_embed.proj.weight.dtype
            grid = (self.reader.grid, self.reader.grid)
            found["denoised"] = self.denoiser(raw.flatten(1, 2).to(dtype), grid).float().unflatten(1, grid)
        return found

    def describe(self) -> dict[str, Any]:
        """All of the model that decides features."""
        return {
            "weights": _digest_once(self.model),
            "class": type(self.model).__name__,
            "grid": self.reader.grid,
            "input_size": self.reader.input_size,
            "normalise": [self.reader.mean.flatten().tolist(), self.reader.std.flatten().tolist()],
            "dtype": self.dtype,
            "version": __version__,
        }


class Features:
    """One split's features, from the cache or computed on the spot.

    Attributes:
        split: the images and their annotations.
        extractor: of the model.
        grid, channels: K and C.
        key: a hash of all that decides the numbers, `description`.
    """

    def __init__(self, extractor: Extractor, split: Split, cache: Path | None, batch_size: int = 16) -> None:
        """
        Args:
            extractor: of the model.
            split: the images.
            cache: folder of features; None to run the backbone whenever features are read.
            batch_size: images in one forward pass.
        """
        self.extractor, self.split, self.batch_size = extractor, split, batch_size
        self.grid, self.channels = extractor.reader.grid, extractor.reader.channels
        self.description = self._describe()
        self.key = sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()[:20]
        self.folder = None if cache is None else cache / self.key
        self._resident: dict[str, Tensor | None] = {}
        self._open = lru_cache(maxsize=256)(self._open_shard)

    def __len__(self) -> int:
        return len(self.split)

    def maps(self, indices: Sequence[int], state: str) -> Tensor:
        """Patch features (B, K, K, C) float32, on the CPU from the cache, else on the model's device.

        Args:
            indices: of images of the split.
            state: "raw", "denoised" or "artifacts", which is raw - denoised (as F + G = raw in Tab. 1).
        """
        if state == "artifacts":
            both = self._read(indices, ("raw", "denoised"))
            return both["raw"] - both["denoised"]
        return self._read(indices, (state,))[state]

    def class_tokens(self, indices: Sequence[int]) -> Tensor:
        """Class tokens (B, C); (B, 0) of a model without prefix tokens."""
        prefix = self._read(indices, ("prefix",))["prefix"]
        return prefix[:, 0] if prefix.shape[1] else prefix.flatten(1)

    def batches(self, state: str, label: str = "images") -> Iterator[tuple[list[int], Tensor]]:
        """All images in order, as (indices, (B, K, K, C)), with a progress bar."""
        with tqdm(total=len(self), desc=label, unit="image", leave=False) as bar:
            for start in range(0, len(self), self.batch_size):
                indices = list(range(start, min(start + self.batch_size, len(self))))
                yield indices, self.maps(indices, state)
                bar.update(len(indices))

    def images(self, indices: Sequence[int]) -> Tensor:
        """(B, 3, S, S) in [0, 1], resized to the square that the model sees."""
        return torch.stack(list(_READERS.map(lambda i: self.extractor.resize(self.split.image(i)), indices)))

    def extract(self) -> None:
        """Fill the cache, or go on filling it. Nothing to do without one.

        Raises:
            ValueError: the disk has no room for the features, or half precision cannot hold them.
        """
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [i for i in range(-(-len(self) // SHARD)) if not self._shard(i).exists()]
        if not missing:
            return
        values = self.grid**2 * self.channels * len(self.extractor.states)
        needed, free = 2 * values * SHARD * len(missing), shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"the features of {self.split.name} need {needed / 1e9:.1f} GB in {self.folder}, which has "
                f"{free / 1e9:.1f} GB: name another --cache, take --limit images, or --cache off"
            )
        write_json(self.folder / "settings.json", self.description)
        with tqdm(total=len(missing) * SHARD, desc=f"features of {self.split.name}", unit="image") as bar:
            for shard in missing:
                indices = range(shard * SHARD, min((shard + 1) * SHARD, len(self)))
                parts = []
                for start in range(0, len(indices), self.batch_size):
                    parts.append(self._compute(indices[start:start + self.batch_size]))
                    bar.update(len(parts[-1]["raw"]))
                tensors = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
                write_whole(self._shard(shard), partial(save_file, tensors))

    def _read(self, indices: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
        if self.folder is None:
            computed = self._compute(indices)
            return {name: computed[name].float() for name in names}
        return {name: self._cached(name, indices).float() for name in names}

    def _cached(self, name: str, indices: Sequence[int]) -> Tensor:
        """From the cache, which is held in memory if it is small."""
        if name not in self._resident:
            shards = range(-(-len(self) // SHARD))
            small = 2 * self.grid**2 * self.channels * len(self) <= RESIDENT
            tensors = torch.cat([self._open(i).get_tensor(name) for i in shards]) if small else None
            self._resident[name] = tensors
        resident = self._resident[name]
        if resident is not None:
            return resident[list(indices)]
        return torch.stack([self._open(i // SHARD).get_slice(name)[i % SHARD] for i in indices])

    def _compute(self, indices: Sequence[int]) -> dict[str, Tensor]:
        found = {name: x.half() for name, x in self.extractor(self.images(indices)).items()}
        if not all(bool(x.isfinite().all()) for x in found.values()):
            raise ValueError(
                f"features of {self.split.name} (images {indices[0]} to {indices[-1]}) are not finite in half "
                "precision, whose largest value is 65504"
            )
        return found

    def _shard(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:06d}.safetensors"

    def _open_shard(self, number: int) -> Any:
        if not self._shard(number).exists():
            self.extract()
        return safe_open(self._shard(number), "pt")

    def _describe(self) -> dict[str, Any]:
        files = sha256()
        for path in self.split.images:
            status = path.stat()
            files.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
        return {
            **self.extractor.describe(),
            "split": self.split.name,
            "images": len(self.split),
            "files": files.hexdigest(),
        }


def _last_denoiser(model: Any) -> nn.Module | None:
    """The denoiser of the last block's features; a model may have others, of earlier blocks."""
    return model.denoisers().get(model.final_block) if issubclass(type(model), Denoised) else None


@lru_cache(maxsize=8)
def _digest_once(model: nn.Module) -> str:
    return weights_digest(model)
