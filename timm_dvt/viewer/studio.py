"""What visitors of the page share: models, one of which computes at a time, and the last comparisons; all bounded."""

import hashlib
import secrets
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from timm_dvt.bars import tqdm
from timm_dvt.errors import UserError
from timm_dvt.registry import VARIANTS
from timm_dvt.viewer.demo import load_denoised, patch_tokens, prepare, sized
from timm_dvt.viewer.examples import EXAMPLES
from timm_dvt.viewer.page import Comparison

COMPARISONS, MODELS = 16, 2  # kept in memory; a comparison is 9 MB with a ViT-S and 17 MB with a ViT-L


class Studio:
    """What all visitors share: the models, one of which computes at a time, and the last comparisons.

    Args:
        model: the variant that is chosen first; loaded at once, and shown the first example for the page's start.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, model: str):
        self.first = model
        self.lock = threading.Lock()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.models: OrderedDict[str, nn.Module] = OrderedDict({model: load_denoised(model).to(self.device)})
        self.comparisons: OrderedDict[str, Comparison] = OrderedDict()
        self.kept: dict[str, Comparison] = {}
        self.keys: OrderedDict[tuple, str] = OrderedDict()  # of the comparisons, by image and variant
        self.seconds = 0.0  # that the last comparison took
        self.names = [v.name for v in VARIANTS.values() if not v.distilled and v.source != "no weights"]
        if model not in self.names:
            self.names.insert(0, model)
        steps = self.steps(next(iter(EXAMPLES.values()))(), model)
        *_, self.first_comparison = tqdm(steps, "first example", unit="state", total=2, leave=False)
        self.kept[self.first_comparison] = self.comparisons.pop(self.first_comparison)  # each visit starts with it

    def steps(self, image: Image.Image, name: str) -> Iterator[np.ndarray | str]:
        """Show an image to a variant: its features (H, W, C) with the denoiser off, as soon as they are there, and
        then the key of what it saw, which nobody can guess.

        What is kept of the same image, whoever sent it, is not computed again and waits for nobody.

        Raises:
            UserError: there is no such variant, or it cannot be loaded.
        """
        if name not in self.names:
            raise UserError(f"{name!r} is not one of the variants")
        content = (hashlib.sha256(image.tobytes()).digest(), image.size, name)
        key = self.keys.get(content, "")
        if key not in self.comparisons and key not in self.kept:
            start = time.perf_counter()
            _, off = self._features(image, name, False)
            yield off
            resized, on = self._features(image, name, True)
            key = secrets.token_urlsafe(16)
            _keep(self.comparisons, key, Comparison(name, self.device, image, resized, off, on), COMPARISONS)
            _keep(self.keys, content, key, 2 * COMPARISONS)
            self.seconds = time.perf_counter() - start
        yield key

    def compare(self, image: Image.Image, name: str) -> str:
        """The key of what a variant saw of an image; see `steps`."""
        *_, key = self.steps(image, name)
        return str(key)

    def find(self, key: str) -> Comparison:
        """The comparison of a key. Raises UserError where it had to make room for others."""
        comparison = self.comparisons.get(key) or self.kept.get(
            key
        )  # no lock: a click must not wait for another's model
        if comparison is None:
            raise UserError("This image is no longer kept, because others came since. Choose it again")
        return comparison

    @torch.inference_mode()
    def _features(self, image: Image.Image, name: str, state: bool) -> tuple[Image.Image, np.ndarray]:
        """An image as the model sees it, and its features. The lock is not held from one state to the next: a visitor
        may be gone before."""
        with self.lock:
            model: Any = self._model(name)
            resized, pixels = prepare(model, image)
            model = sized(model, pixels)
            with model.denoising(state):
                return resized, patch_tokens(model, pixels.to(self.device)).numpy()

    def _model(self, name: str) -> nn.Module:
        if name not in self.models:
            while len(self.models) >= MODELS:  # before the next one is there, or memory would hold one more
                self.models.popitem(last=False)
            try:
                model = load_denoised(name)
            except UserError as e:
                print(f"{name} cannot be loaded: {e}", file=sys.stderr, flush=True)
                raise UserError(f"{name} cannot be loaded by this server; its terminal says why") from e
            _keep(self.models, name, model.to(self.device), MODELS)
        self.models.move_to_end(name)
        return self.models[name]


def _keep(kept: OrderedDict, key: object, value: object, most: int) -> None:
    kept[key] = value
    while len(kept) > most:
        kept.popitem(last=False)
