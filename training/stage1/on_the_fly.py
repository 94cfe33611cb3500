"""Pairs that are solved when a training asks for them, and never written: stage 1 inside the reader of stage 2."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from timm_dvt.errors import UserError
from timm_dvt.image_files import Source, decode_image, read_file
from training.common.backbone import FeatureReader
from training.pairs.file import in_precision
from training.pairs.folder import pair_file, stored_part
from training.pairs.reader import PairReader, PairSet
from training.stage1.decompose import Stage1Settings, decompose
from training.stage1.images import IMAGE_ERRORS, image_seed, pair_maps

_logger = logging.getLogger(__name__)


def pairs_of_images(
    sources: Sequence[Source], where: Path, model: nn.Module, settings: Stage1Settings, made_with: Mapping[str, Any]
) -> tuple[PairSet, dict[str, Source]]:
    """The set of pairs that images would have on disk, to be read by a `SolvingReader`, and the image of each.

    Args:
        sources: images that can be read. where: stands for the folder of pairs in messages.
        made_with: what its settings.json would say.

    Raises:
        ImageError: a file cannot be read.
    """
    by_file = {pair_file(source.name, read_file(source.path)[1].sha256): source for source in sources}
    reader = FeatureReader(model, settings.layers, input_size=settings.input_size, stride=settings.stride)
    grid = (reader.grid, reader.grid)
    files = tuple(sorted(by_file))
    pairs = PairSet(where, files, reader.layers, grid, reader.channels, dict(made_with), settings.crops)
    return pairs, by_file


class SolvingReader(PairReader):
    """Reads pairs by solving them: the same maps that a folder of pairs would hold, in half precision.

    A pair is solved again whenever it is asked for and was not kept, with the views that the seed and the image decide.
    """

    def __init__(
        self,
        pairs: PairSet,
        parts: Sequence[str],
        sources: Mapping[str, Source],
        model: nn.Module,
        settings: Stage1Settings,
    ) -> None:
        """
        Args:
            pairs, parts: as of a PairReader. sources: the images of `pairs.files`.
            model: the backbone on its device. settings: of stage 1, layers filled in.
        """
        super().__init__(pairs, parts)
        self.sources, self.model, self.settings = sources, model, settings
        self._one_at_a_time, self._left_out = threading.Lock(), dict[Source, str]()

    def _load(self, position: int) -> list[list[Tensor]]:
        crop, place = divmod(position, len(self.pairs.files))
        maps = self._solve(place)
        for other in range(1 + self.pairs.crops):  # they came at one price
            if other != crop:
                self._keep(place + other * len(self.pairs.files), self._of_crop(maps, other))
        return self._of_crop(maps, crop)

    def _of_crop(self, maps: Mapping[int, Mapping[str, Tensor]], crop: int) -> list[list[Tensor]]:
        """Maps (K, K, C) by part and layer, of the whole image (0) or of its crop number `crop`."""

        def of(layer: int, part: str) -> Tensor:
            key = stored_part(part, crop)
            return maps[layer][key] if key == part else maps[layer][key][crop - 1]

        return [[of(layer, part) for layer in self.pairs.layers] for part in self.parts]

    def _solve(self, place: int) -> dict[int, dict[str, Tensor]]:
        """All that a pair's file would hold; of an image that cannot be decomposed, what the next one's would."""
        with self._one_at_a_time:
            for file in (*self.pairs.files[place:], *self.pairs.files[:place]):
                source = self.sources[file]
                if source in self._left_out:
                    continue
                try:
                    return self._decomposed(source)
                except IMAGE_ERRORS as error:  # the next one stands for it, as its place was drawn already
                    self._left_out[source] = f"{source.path}: {error}"
                    _logger.warning("left out %s", self._left_out[source])
        *_, last = self._left_out.values()
        raise UserError(f"none of the {len(self._left_out)} images can be decomposed; the last: {last}")

    def _decomposed(self, source: Source) -> dict[int, dict[str, Tensor]]:
        data, content = read_file(source.path)
        seed = image_seed(self.settings.seed, content.sha256)
        image = decode_image(data).to(next(self.model.parameters()).device)
        parts = decompose(self.model, image, replace(self.settings, seed=seed))
        assert isinstance(parts, dict)  # settings.layers is filled in
        return in_precision({layer: pair_maps(part) for layer, part in parts.items()}, "half")
