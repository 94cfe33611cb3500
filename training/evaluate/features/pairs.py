"""Stage 1's own outputs as features: the maps of pairs, in place of what a model gives (Tabs. 1 and 5).

A pair is raw = F + G + residual (Eq. 5). Its states, in the order of Tab. 5:

    raw            (a) the backbone's features of the whole image
    view-average   (b) F of pairs that were solved without G (`LinearSettings.artifacts` False), in place of all below
    F              (c) the semantics
    F+residual     (d) with what F and G leave of raw
    raw-G          the same number: only what is tied to places is taken away
    mean           (F + raw - G) / 2, between the two
    G              the artifacts, for mic and position

The linear solver's residual is what a pair leaves; h of the field is not kept, and what its pairs leave stands for it.
Images are matched with pairs by the content of their files; those without a pair are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from timm_dvt.errors import UserError
from timm_dvt.image_files import read_file
from training.evaluate.data.splits import Split
from training.evaluate.features.extractor import Extractor
from training.pairs.folder import read_index, read_pair, read_settings
from training.pairs.mixtures import MIXTURES

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]  # of raw, F and G
STATES: dict[str, Mix] = {
    "raw": lambda raw, semantics, artifacts: raw,
    "view-average": MIXTURES["F"],
    "F": MIXTURES["F"],
    "F+residual": MIXTURES["raw-G"],
    "raw-G": MIXTURES["raw-G"],
    "mean": MIXTURES["mean"],
    "G": lambda raw, semantics, artifacts: artifacts,
}
SAME = {"raw-G": "F+residual"}  # which need not be evaluated twice


def input_size_of(folders: Sequence[Path]) -> int | None:
    """The side that pairs were made at, which need not be the model's default; None where no pairs say so."""
    try:
        return read_settings(folders[0]).get("input_size") if folders else None
    except (OSError, ValueError):  # PairFeatures says what is wrong
        return None


def pair_data(
    folders: Sequence[Path], splits: Mapping[str, Split], extractor: Extractor, batch_size: int
) -> list[tuple[dict[str, PairFeatures], tuple[str, ...]]]:
    """For each folder its features by part, and the states to take of it: those that no folder before it has.

    Raises:
        ValueError: as `PairFeatures`; or folders of pairs of different images, or with nothing new.
    """
    groups: list[tuple[dict[str, PairFeatures], tuple[str, ...]]] = []
    taken: set[str] = set()
    for folder in folders:
        data = {part: PairFeatures(folder, split, extractor, batch_size) for part, split in splits.items()}
        if groups and any(data[part].split.images != groups[0][0][part].split.images for part in data):
            raise UserError(f"--pairs {folders[0]} and {folder} hold pairs of different images: no rows to compare")
        states = tuple(state for state in next(iter(data.values())).states if state not in taken)
        if not states:
            raise UserError(f"--pairs {folder} holds what a folder before it holds: {', '.join(sorted(taken))}")
        taken.update(states)
        groups.append((data, states))
    return groups


class PairFeatures:
    """The maps of a split's pairs, read as `training.evaluate.features.cached.Features` are.

    Attributes:
        split: the images that have a pair, and their annotations.
        extractor: of the model that the pairs are of.
        grid, channels, batch_size: as of Features.
        keys: {"pairs": a hash of all that decides the numbers}.
        states: those of `STATES` that the pairs have.
    """

    def __init__(self, folder: Path, split: Split, extractor: Extractor, batch_size: int = 16) -> None:
        """
        Args:
            folder: what training.denoise_images wrote.

        Raises:
            ValueError: there are no pairs, they are not of this model's weights and grid, or the split has none.
        """
        try:
            settings, entries = read_settings(folder), read_index(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"--pairs {folder} holds no pairs: {error}") from error
        self.extractor, self.batch_size = extractor, batch_size
        self.grid, self.channels = int(settings["grid"]), int(settings["channels"])
        with_artifacts = settings.get("linear", {}).get("artifacts", True)
        self.states = tuple(
            state for state in STATES if state == "raw" or (state == "view-average") is not bool(with_artifacts)
        )
        made = (extractor.reader.grid, extractor.reader.channels)
        if made != (self.grid, self.channels):
            raise UserError(
                f"--pairs {folder} holds maps of {self.grid} x {self.grid} patches and {self.channels} channels, the "
                f"model gives {made[0]} x {made[0]} and {made[1]}: they are of another model or size (see --input-size)"
            )
        if settings.get("weights", known := extractor.describe()["weights"]) != known:
            kind = "" if settings.get("pretrained", True) else f", random ones of --seed {settings.get('seed', 0)}"
            raise UserError(
                f"--pairs {folder} was made with the weights of {settings.get('model')!r}{kind}, which are not those "
                "of --model"
            )
        by_content = {entry.sha256: folder / entry.file for entry in entries}
        matches = [(i, by_content.get(read_file(path)[1].sha256)) for i, path in enumerate(split.images)]
        chosen = [i for i, file in matches if file is not None]
        self._files = [file for _, file in matches if file is not None]
        if not chosen:
            raise UserError(
                f"--pairs {folder} holds no pair of an image of {split.name}: run training.denoise_images on those "
                f"images too, into the same folder (they are in {split.images[0].parent})"
            )
        self.split = split.take(chosen)
        names = "\n".join([repr(sorted(settings.items())), *(file.name for file in self._files)])
        self.keys = {"pairs": sha256(names.encode()).hexdigest()[:20]}

    def __len__(self) -> int:
        return len(self._files)

    def extract(self) -> None:
        """Nothing to do: stage 1 did it."""

    def maps(self, indices: Sequence[int], state: str) -> Tensor:
        """(B, K, K, C) float32 on the model's device, for a state of `STATES`."""
        layer = self.extractor.reader.depth - 1
        features = []
        for i in indices:
            parts = read_pair(self._files[i], layer, ("raw", "clean", "artifacts"))
            features.append(STATES[state](*(part.float() for part in parts.values())))
        return torch.stack(features).to(self.extractor.reader.device)

    def batches(self, state: str, label: str = "images") -> Iterator[tuple[list[int], Tensor]]:
        """All images in order, as (indices, (B, K, K, C))."""
        for start in range(0, len(self), self.batch_size):
            indices = list(range(start, min(start + self.batch_size, len(self))))
            yield indices, self.maps(indices, state)
