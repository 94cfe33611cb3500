"""Frozen features of a split: the backbone runs over an image once, whatever reads the features afterwards.

One forward pass gives the raw patch tokens (final norm applied) and the class token; the denoiser makes the denoised
ones of the raw ones and, where it levels flat patches, of the images. On disk they lie in half precision, `SHARD`
images a safetensors file:

    CACHE/KEY/settings.json             what the key was made from, for people
    CACHE/KEY/000003.safetensors        the backbone's: "raw" (n, K, K, C), "prefix" (n, prefix, C)
    CACHE/OTHER/000003.safetensors      a denoiser's: "denoised" (n, K, K, C)

A key covers all that decides the numbers: weights, sizes, precision, the images and their files' sizes and times.
Denoisers of one backbone share its features: to compare several, the backbone runs once. A shard is there whole or not
at all, so a killed run goes on at the shard it died in, and two runs at once do some work twice but no harm. Without a
cache, or before `extract` has filled it, the backbone runs whenever features are read; they are rounded to half
precision then too, so that both ways give the same numbers.
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
from torch import Tensor

from timm_dvt.bars import tqdm
from timm_dvt.errors import UserError
from timm_dvt.weights.files import write_whole
from training.evaluate.data.annotations import files_digest
from training.evaluate.data.splits import Split
from training.evaluate.features.extractor import Extractor, digest_once
from training.evaluate.tables import write_json

SHARD = 64
# Pillow decodes without the interpreter's lock, so threads keep a GPU fed.
_READERS = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
RESIDENT = 1 << 30  # bytes of one state of a split, up to which it is held in memory


class Features:
    """One split's features, from the cache or computed on the spot.

    Attributes:
        split: the images and their annotations.
        extractor: of the model.
        grid, channels: K and C.
        keys: by state, a hash of all that decides its numbers, `descriptions`.
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
        self.descriptions = self._describe()
        self.keys = {
            state: sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
            for state, facts in self.descriptions.items()
        }
        self.cache = cache
        self._resident: dict[str, Tensor | None] = {}
        self._complete: set[str] = set()  # states that the cache holds whole
        self._open = lru_cache(maxsize=256)(self._open_shard)

    def __len__(self) -> int:
        return len(self.split)

    def maps(self, indices: Sequence[int], state: str) -> Tensor:
        """Patch features (B, K, K, C) float32, on the model's device, wherever they come from.

        Args:
            indices: of images of the split.
            state: "raw", "denoised" or "artifacts", which is raw - denoised (as F + G = raw in Tab. 1).
        """
        if state == "artifacts":
            both = self._read(indices, ("raw", "denoised"))
            return both["raw"] - both["denoised"]
        return self._read(indices, (state,))[state]

    def class_tokens(self, indices: Sequence[int]) -> Tensor:
        """Class tokens (B, C), on the model's device; (B, 0) of a model without prefix tokens."""
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
        if self.cache is None:
            return
        for state in self.extractor.states:
            self._extract(state, self.cache / self.keys[state])

    def _extract(self, state: str, folder: Path) -> None:
        """Fill the cache of one state; that of "denoised" is made of that of "raw"."""
        folder.mkdir(parents=True, exist_ok=True)
        missing = self._missing(state)
        if not missing:
            return
        needed, free = 2 * self.grid**2 * self.channels * SHARD * len(missing), shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"the {state} features of {self.split.name} need {needed / 1e9:.1f} GB in {folder}, which has "
                f"{free / 1e9:.1f} GB: name another --cache, take --limit images, or --cache off"
            )
        write_json(folder / "settings.json", self.descriptions[state])
        with tqdm(total=len(missing) * SHARD, desc=f"{state} features of {self.split.name}", unit="image") as bar:
            for shard in missing:
                indices = range(shard * SHARD, min((shard + 1) * SHARD, len(self)))
                parts = []
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    if state == "raw":
                        parts.append(self._backbone(self.images(batch), batch))
                    else:
                        images = self.images(batch) if self.extractor.levels else None
                        parts.append({state: self._denoise(self._cached("raw", batch), images, batch)})
                    bar.update(len(batch))
                tensors = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
                write_whole(self._shard(state, shard), partial(save_file, tensors))

    def _missing(self, state: str) -> list[int]:
        return [i for i in range(-(-len(self) // SHARD)) if not self._shard(state, i).exists()]

    def _read(self, indices: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
        """Of "raw", "prefix" and "denoised" those named, float32, on the model's device: of the cache, or computed."""
        device = self.extractor.reader.device
        cached = {state for state in self.extractor.states if self._is_cached(state)}  # asked once: others fill it, too
        cached |= {"prefix"} if "raw" in cached else set()
        stored = {name: self._cached(name, indices).to(device).float() for name in names if name in cached}
        if len(stored) == len(names):
            return stored
        images = self.images(indices) if self.extractor.levels or "raw" not in cached else None
        computed = stored
        if images is not None and "raw" not in cached:
            computed = stored | {name: x.float() for name, x in self._backbone(images, indices).items()}
        if "denoised" in names and "denoised" not in stored:
            raw = computed["raw"] if "raw" in computed else self._cached("raw", indices)
            computed["denoised"] = self._denoise(raw, images, indices).float()
        return {name: computed[name] for name in names}

    def _is_cached(self, state: str) -> bool:
        if self.cache is not None and state not in self._complete and not self._missing(state):
            self._complete.add(state)
        return state in self._complete

    def _cached(self, name: str, indices: Sequence[int]) -> Tensor:
        """From the cache, which is held in memory if it is small."""
        if name not in self._resident:
            shards = range(-(-len(self) // SHARD))
            small = 2 * self.grid**2 * self.channels * len(self) <= RESIDENT
            tensors = torch.cat([self._open(name, i).get_tensor(name) for i in shards]) if small else None
            self._resident[name] = tensors
        resident = self._resident[name]
        if resident is not None:
            return resident[list(indices)]
        return torch.stack([self._open(name, i // SHARD).get_slice(name)[i % SHARD] for i in indices])

    def _backbone(self, images: Tensor, indices: Sequence[int]) -> dict[str, Tensor]:
        tokens = self.extractor.backbone(images)
        return {name: self._half(x, indices) for name, x in tokens.items()}

    def _denoise(self, raw: Tensor, images: Tensor | None, indices: Sequence[int]) -> Tensor:
        return self._half(self.extractor.denoise(raw, images), indices)

    def _half(self, features: Tensor, indices: Sequence[int]) -> Tensor:
        half = features.half()
        if not bool(half.isfinite().all()):
            raise UserError(
                f"features of {self.split.name} (images {indices[0]} to {indices[-1]}) are not finite in half "
                "precision, whose largest value is 65504"
            )
        return half

    def _shard(self, name: str, number: int) -> Path:
        assert self.cache is not None
        return self.cache / self.keys["raw" if name == "prefix" else name] / f"{number:06d}.safetensors"

    def _open_shard(self, name: str, number: int) -> Any:
        return safe_open(self._shard(name, number), "pt")

    def _describe(self) -> dict[str, dict[str, Any]]:
        raw = {
            **self.extractor.describe(),
            "split": self.split.name,
            "images": len(self.split),
            "files": files_digest(self.split.images),
        }
        if "denoised" not in self.extractor.states:
            return {"raw": raw}
        return {"raw": raw, "denoised": {**raw, "denoiser": digest_once(self.extractor.model, "denoiser")}}
