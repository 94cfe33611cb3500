"""What the visitors of the page share: models, one of which computes at a time, and the last looks; all bounded."""

import hashlib
import secrets
import threading
from collections import OrderedDict

import torch
from PIL import Image
from torch import nn

from timm_dvt.errors import UserError
from timm_dvt.images import PHOTOGRAPHS, read_image
from timm_dvt.registry import VARIANTS
from timm_dvt.viewer.demo import load_denoised, measure, prepare
from timm_dvt.viewer.page import Look

LOOKS, MODELS = 16, 2  # kept in memory; a look is 9 MB with a ViT-S and 17 MB with a ViT-L


class Studio:
    """What all visitors share: the models, one of which computes at a time, and the last looks.

    Args:
        model: the variant that is chosen first; loaded at once, and shown the first photograph for the page's start.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, model: str):
        self.first = model
        self.lock = threading.Lock()
        self.models: OrderedDict[str, nn.Module] = OrderedDict()
        self.looks: OrderedDict[str, Look] = OrderedDict()
        self.kept: dict[str, Look] = {}
        self.keys: OrderedDict[tuple, str] = OrderedDict()  # of the looks, by image and variant
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.names = [v.name for v in VARIANTS.values() if not v.distilled and v.source != "no weights"]
        if model not in self.names:
            self.names.insert(0, model)
        self.first_look = self.example(0, model, "first example")
        self.kept[self.first_look] = self.looks.pop(self.first_look)  # each visit starts with it

    def example(self, number: int, name: str, label: str = "") -> str:
        """The key of a look at one of the package's photographs, computed once for all visitors; see `look`."""
        key = f"{PHOTOGRAPHS[number].stem}-{self.names.index(name)}"
        if key not in self.looks and key not in self.kept:
            self.look(read_image(PHOTOGRAPHS[number]), name, key, label)
        return key

    def look(self, image: Image.Image, name: str, key: str | None = None, label: str = "") -> str:
        """Show an image to a variant; returns the key of what it saw, which nobody can guess.

        Args:
            key: one that may be guessed. label: of a progress bar on stderr; none without.

        Raises:
            UserError: there is no such variant, or it cannot be loaded.
        """
        if name not in self.names:
            raise UserError(f"{name!r} is not one of the variants")
        key = key or secrets.token_urlsafe(16)
        with self.lock:
            model = self._model(name)
            resized, pixels = prepare(model, image)
            off, on = (one.features.numpy() for one in measure(model, pixels.to(self.device), 0, label))
            _keep(self.looks, key, Look(name, self.device, image, resized, off, on), LOOKS)
        return key

    def look_once(self, image: Image.Image, name: str) -> str:
        """As `look`; what is kept of the same image, whoever sent it, is not computed again and waits for nobody."""
        content = (hashlib.sha256(image.tobytes()).digest(), image.size, name)
        key = self.keys.get(content)
        if key is None or key not in self.looks:
            key = self.look(image, name)
            _keep(self.keys, content, key, LOOKS)
        return key

    def find(self, key: str) -> Look:
        """The look of a key. Raises UserError where it had to make room for others."""
        found = self.looks.get(key) or self.kept.get(key)  # no lock: a click must not wait for another's model
        if found is None:
            raise UserError("This image is no longer kept, because others came since. Choose it again")
        return found

    def _model(self, name: str) -> nn.Module:
        if name not in self.models:
            while len(self.models) >= MODELS:  # before the next one is there, or memory would hold one more
                self.models.popitem(last=False)
            _keep(self.models, name, load_denoised(name).to(self.device), MODELS)
        self.models.move_to_end(name)
        return self.models[name]


def _keep(kept: OrderedDict, key: object, value: object, most: int) -> None:
    kept[key] = value
    while len(kept) > most:
        kept.popitem(last=False)
