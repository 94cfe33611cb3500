"""Images as stage 3 sees them: random crops that seed and place in the run decide, or whole, as square batches."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from timm_dvt.bars import tqdm
from timm_dvt.errors import ImageError, UserError
from timm_dvt.image_files import Source, load_image
from training.common.views import Views, render_views, sample_views, whole_view

AUGMENTS = ("crop", "flip")  # random crops and flips, or whole images with random flips
AREA = (0.4, 1.0)  # of a crop: from most of what stage 1 crops to the whole image, which the denoiser was trained on


class CropReader:
    """Reads images of a list. One that cannot be read is named once, and the next in the list takes its place."""

    def __init__(self, sources: Sequence[Source], size: int, seed: int, augment: str = "crop") -> None:
        """
        Args:
            sources: at least one image.
            size: side of the square result in pixels.
            seed: of the crops. augment: of `AUGMENTS`, what `random` does.
        """
        self.sources, self.size, self.seed, self.augment = list(sources), size, seed, augment
        self._named: set[int] = set()

    def __len__(self) -> int:
        return len(self.sources)

    def random(self, places: Sequence[int], first: int) -> Tensor:
        """Crops (B, 3, size, size) in [0, 1] of the images at these places.

        Args:
            places: of the list. first: the number of the first of them in the run, which decides the crops.

        Raises:
            ValueError: not one image of the list can be read.
        """
        return torch.cat([self._crop(place, first + i) for i, place in enumerate(places)])

    def whole(self, places: Sequence[int]) -> Tensor:
        """The whole images (B, 3, size, size) in [0, 1] at these places. Raises as `random`."""
        return torch.cat([render_views(self._image(place), whole_view(), self.size) for place in places])

    def _crop(self, place: int, number: int) -> Tensor:
        image = self._image(place)
        # A seed of its own for every sample of a run; images, unlike features, may be flipped: the teacher sees it.
        seed = (self.seed << 40) + number
        view = sample_views(1, (image.shape[1], image.shape[2]), seed, area=AREA)
        if self.augment == "flip":
            view = Views(whole_view().boxes, view.flips)
        return render_views(image, view, self.size)

    def _image(self, place: int) -> Tensor:
        for step in range(len(self.sources)):
            at = (place + step) % len(self.sources)
            try:
                return load_image(self.sources[at].path)
            except ImageError as error:
                if at not in self._named:
                    self._named.add(at)
                    tqdm.write(f"left out {self.sources[at].path}: {error}", file=sys.stderr)
        raise UserError(f"none of the {len(self.sources)} images can be read")
