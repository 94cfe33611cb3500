"""Pairs that are solved when a training asks for them, and never written: stage 1 inside the reader of stage 2."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from training.common.backbone import FeatureReader
from training.common.images import Source, decode_image, read_file
from training.pairs.folder import PRECISIONS, pair_file
from training.pairs.reader import PairError, PairReader, PairSet
from training.stage1.decompose import Stage1Settings, decompose
from training.stage1.many import IMAGE_ERRORS, image_seed, pair_maps


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
    pairs = PairSet(where, tuple(sorted(by_file)), reader.layers, grid, reader.channels, dict(made_with))
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
        self._one_at_a_time = threading.Lock()

    def _load(self, position: int) -> list[list[Tensor]]:
        source = self.sources[self.pairs.files[position]]
        with self._one_at_a_time:
            try:
                data, content = read_file(source.path)
                seed = image_seed(self.settings.seed, content.sha256)
                image = decode_image(data).to(next(self.model.parameters()).device)
                found = decompose(self.model, image, replace(self.settings, seed=seed))
            except IMAGE_ERRORS as error:
                raise PairError(f"{source.path}: {error}") from error
        assert isinstance(found, dict)  # settings.layers is filled in
        maps = {layer: pair_maps(part) for layer, part in found.items()}
        half = PRECISIONS["half"]
        return [[maps[layer][part].to(half) for layer in self.pairs.layers] for part in self.parts]
