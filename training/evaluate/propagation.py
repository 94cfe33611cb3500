"""Video object segmentation by label propagation, without any training: DINO's protocol (Caron et al., ICCV 2021).

Objects are given in the first frame. In each later one, a patch takes the mean label of the patches nearest to it in
features, those of the first frame and of the last few, near the same place:

    label(p) = sum over the 5 most similar q of w_q label(q),   w = softmax(cos(x_p, x_q) / 0.1)

Labels stay soft on the patch grid; upsampled bilinearly, each brought to [0, 1], the largest one is a pixel's. Frames
are resized to a square, as in all of these tasks, where DINO keeps their aspect; the first labels are shares of pixels.

DAVIS' numbers (Perazzi et al., CVPR 2016; Pont-Tuset et al., 2017), in percent: J is the region's IoU, F the boundary's
F-measure, a boundary pixel being right within 0.8% of the frame's diagonal; of an object the mean over frames but the
first and the last, and then the mean over all objects of all videos. J&F is the mean of both. Nothing is random.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from timm_dvt.errors import UserError
from training.evaluate.data.splits import IGNORE, Split
from training.evaluate.features.cached import Features
from training.evaluate.run import Run
from training.evaluate.segmentation.score import upsample

KIND = "videos"
STATES = ("raw", "denoised")
NUMBERS = {"J&F": "J&F", "J": "J", "F": "F"}
MEANING = (
    "J, F, J&F: objects of a video's first frame, found in all others by the nearest patches: regions, boundaries, "
    "mean of both, in percent; more is better."
)
BOUNDARY = 0.008  # of the frame's diagonal
_ROWS = 60  # of patches in DINO's frames: 480 pixels, patches of 8


@dataclass(frozen=True)
class Settings:
    """DINO's protocol.

    Attributes:
        context: frames before the present one whose labels are handed on, beside those of the first.
        neighbors: patches that a patch takes its label from.
        radius: how far from its place they are looked for, in patches of frames that have 60 rows; it is the same part
            of the frame's shorter side here. 0 for everywhere.
        temperature: of the softmax.
        stride: take every so many frames.
        frames: of a video, after that, at most so many; 0 for all.
    """

    context: int = 7
    neighbors: int = 5
    radius: float = 12.0
    temperature: float = 0.1
    stride: int = 1
    frames: int = 0


def run(data: Mapping[str, Features], settings: Settings, run: Run) -> dict[str, float]:
    """J&F, J, F, and J&F/VIDEO/OBJECT of each object, in percent."""
    if min(settings.neighbors, settings.stride) < 1:
        raise UserError(f"neighbors and stride must be 1 or more, got {settings.neighbors}, {settings.stride}")
    features = data["val"]
    scores: dict[str, tuple[float, float]] = {}
    for number in range(len(features)):
        video = features.split.annotation(number)
        frames = video.take(range(0, len(video), settings.stride)[: settings.frames or None])
        if len(frames) < 3:
            raise UserError(
                f"the video {video.name} has {len(frames)} frames (of {len(video)}, stride {settings.stride}): it "
                "takes 3, as the first and the last do not count"
            )
        clip = Features(features.extractor, frames, features.cache, features.batch_size)
        clip.extract()
        scores |= _scores(clip, settings, run)
    region, boundary = (100 * float(np.mean([score[i] for score in scores.values()])) for i in (0, 1))
    objects = {f"J&F/{name}": 100 * sum(score) / 2 for name, score in scores.items()}
    return {"J&F": (region + boundary) / 2, "J": region, "F": boundary, **objects}


def _scores(clip: Features, settings: Settings, run: Run) -> dict[str, tuple[float, float]]:
    """{VIDEO/OBJECT: (J, F)} of one video, each the mean over frames."""
    video: Split = clip.split
    first = video.annotation(0)
    objects = [label for label in first.unique().tolist() if label not in (0, IGNORE)]
    if not objects:
        raise UserError(f"the first frame of the video {video.name} has no object")
    shares = torch.stack([(first == label).float() for label in (0, *objects)])
    labels = adaptive_avg_pool2d(shares, clip.grid).flatten(1).T.to(run.device)
    near = window(clip.grid, tuple(first.shape), settings.radius).to(run.device)
    maps = (each for _, batch in clip.batches(run.state, f"{video.name} ({run.state})") for each in batch)
    scores: dict[int, list[tuple[float, float]]] = {label: [] for label in objects}
    for frame, soft in enumerate(propagate(maps, labels, near, settings), 1):
        if frame == len(video) - 1:
            break
        true = video.annotation(frame).numpy()
        height, width = true.shape
        predicted = hard_labels(soft.T.unflatten(1, (clip.grid, clip.grid)), (height, width)).cpu().numpy()
        counts = true != IGNORE
        for channel, label in enumerate(objects, 1):
            pair = ((predicted == channel) & counts, true == label)
            scores[label].append((region_similarity(*pair), contour_accuracy(*pair)))
    return {f"{video.name}/{label}": tuple(np.mean(pairs, 0).tolist()) for label, pairs in scores.items()}


def window(grid: int, frame: tuple[int, ...], radius: float) -> Tensor:
    """(K*K, K*K) bool: which patches are near which, K being the grid of frames (height, width) made square."""
    if radius == 0:
        return torch.ones(grid**2, grid**2, dtype=torch.bool)
    place = torch.arange(grid)
    reach = [radius / _ROWS * grid * min(frame) / side + 1e-6 for side in frame]
    rows, columns = ((place[:, None] - place[None]).abs() <= most for most in reach)
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(grid**2, grid**2)


def propagate(maps: Iterable[Tensor], labels: Tensor, near: Tensor, settings: Settings) -> Iterator[Tensor]:
    """Soft labels (K*K, N) of every frame after the first.

    Args:
        maps: (K, K, C) features, frame after frame.
        labels: (K*K, N) of the first frame.
        near: (K*K, K*K) as `window` says.
    """
    past: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.context)
    start: tuple[Tensor, Tensor] | None = None
    for features in maps:
        tokens = normalize(features.flatten(0, 1))
        if start is None:
            start = (tokens, labels)
            continue
        context = [start, *past]
        similarity = torch.cat([torch.where(near, tokens @ other.T, -torch.inf) for other, _ in context], 1)
        cosine, index = similarity.topk(min(settings.neighbors, similarity.shape[1]))
        weights = (cosine / settings.temperature).softmax(1)
        present = torch.einsum("pk,pkn->pn", weights, torch.cat([known for _, known in context])[index])
        past.append((tokens, present))
        yield present


def hard_labels(soft: Tensor, size: tuple[int, int]) -> Tensor:
    """The label (h, w) of each pixel of soft ones (N, K, K)."""
    whole = upsample(soft[None], size)[0]
    low, high = whole.amin((1, 2), keepdim=True), whole.amax((1, 2), keepdim=True)
    # A label that is nowhere stays 0, and one that is everywhere alike what it is, as in DINO's code.
    scaled = torch.where(high > low, (whole - low) / (high - low).clamp(min=1e-12), whole)
    return scaled.argmax(0)


def region_similarity(predicted: np.ndarray, true: np.ndarray) -> float:
    """J of masks (h, w) bool: their IoU, 1 where both are empty."""
    union = np.logical_or(predicted, true).sum()
    return float(np.logical_and(predicted, true).sum() / union) if union else 1.0


def contour_accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    """F of masks (h, w) bool: the F-measure of their boundaries, as DAVIS' toolkit has it."""
    most = np.ceil(BOUNDARY * np.hypot(*true.shape))
    first, second = np.argwhere(boundary(predicted)), np.argwhere(boundary(true))
    if not len(first) or not len(second):
        return float(len(first) == len(second))
    precision = (cKDTree(second).query(first)[0] <= most).mean()
    recall = (cKDTree(first).query(second)[0] <= most).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """(h, w) bool: pixels of a mask (h, w) that differ from the next one right, below, or both."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    here = padded[:-1, :-1]
    return (here != padded[:-1, 1:]) | (here != padded[1:, :-1]) | (here != padded[1:, 1:])
