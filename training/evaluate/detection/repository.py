"""Object detection as the authors' repository has it: Tabs. 3 and S2.

evaluation/configs/vitb_voc2012_vitdet{,_pe}_config.py, on mmdetection's faster_rcnn_r50_fpn: images keep their aspect,
the long side at 512, flipped one time in two in training, ImageNet's mean and standard deviation, padded to multiples
of 32 and to the largest of the batch, and for patch 14 to multiples of the patch. ViTDet's pyramid, anchors with sides
of 32 to 512 px, two convolutions in the region proposal network, a box head of four convolutions with LayerNorm and one
linear layer. Denoised maps get fixed sinusoidal position embeddings of 37 x 37 patches, resampled to theirs (the _pe
config). Trained on VOC 07+12 trainval, tested on VOC 07 test: the published mAP is mAP_11, VOC07's mean of 11 points.

Where theirs differs: mmdetection's losses of boxes are L1 (torchvision's are L1 with a rounded tip, beta 1/9), its
RoIAlign is shifted by half a pixel, and it takes the pyramid's strides for 4 to 64 px with patch 14 too, where they are
3.5 to 56 and the map begins 3 px outside of the image; here boxes and maps agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from timm.layers import LayerNorm2d, resample_abs_pos_embed
from torch import Tensor
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead

from timm_dvt.bars import tqdm
from timm_dvt.errors import UserError
from training.evaluate.data.augment import normalize
from training.evaluate.data.splits import Boxes, Split
from training.evaluate.detection.average_precision import Detections, voc_map
from training.evaluate.detection.detector import MapDetector, fixed_positions
from training.evaluate.detection.fast import FIXED_PE
from training.evaluate.features.cached import Features
from training.evaluate.features.live import LiveFeatures
from training.evaluate.probe import train
from training.evaluate.run import Run
from training.evaluate.segmentation.windows import pad_below, patch_padding, resize_image, scaled_size
from training.loop.schedule import stepped

KIND = "boxes"
STATES = ("raw", "denoised")
POSITIONS = 37  # patches a side of the table that fixed positions are resampled from
MULTIPLE = 32  # of pixels that images are padded to


@dataclass(frozen=True)
class Settings:
    """The repository's.

    Attributes:
        decay_from: fractions of the steps from which the rate is a tenth, a hundredth (20,000 and 22,000).
        fixed_pe: to which maps fixed position embeddings are added: "denoised", "both" or "none".
        size: long side of images in pixels.
        anchors: sides of the square anchors in pixels, one a level of the pyramid.
        width: channels of the pyramid.
        hidden: of the box head.
        proposals: sampled an image to train the box head; anchors sampled are half as many.
        candidates: proposals of a level that go into non-maximum suppression, and that come out in all, in training;
            the same in the test.
    """

    steps: int = 24_000
    batch_size: int = 16
    lr: float = 1e-4
    weight_decay: float = 0.1
    warmup: int = 100
    decay_from: tuple[float, ...] = (20 / 24, 22 / 24)
    fixed_pe: str = "denoised"
    size: int = 512
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)
    width: int = 256
    hidden: int = 1024
    proposals: int = 512
    candidates: tuple[int, ...] = (2000, 1000, 1000, 1000)


def run(data: Mapping[str, Features], settings: Settings, run: Run) -> dict[str, float]:
    """mAP (area) and mAP_11 (2007's 11 points, the published one), in percent."""
    if settings.fixed_pe not in FIXED_PE:
        raise UserError(f"fixed_pe must be one of {FIXED_PE}, got {settings.fixed_pe!r}")
    training, val = data["train"].split, data["val"].split
    live = LiveFeatures(data["val"].extractor)
    positions = fixed_positions(POSITIONS, live.channels).flatten(0, 1)[None].to(run.device)

    def read(indices: Sequence[int], draws: Sequence[np.random.Generator], step: int) -> tuple[Tensor, list[Boxes]]:
        flips = [draw.random() < 0.5 for draw in draws]
        images = [prepare(training, i, settings, flipped) for i, flipped in zip(indices, flips)]
        largest = (max(image.shape[-2] for image, _ in images), max(image.shape[-1] for image, _ in images))
        return torch.stack([pad_below(image, largest, 0) for image, _ in images]), [boxes for _, boxes in images]

    def maps(images: Tensor) -> Tensor:
        features, _ = live(images, run.state)
        if settings.fixed_pe in ("both", run.state):
            grid = [features.shape[1], features.shape[2]]
            features = features + resample_abs_pos_embed(positions, grid, num_prefix_tokens=0).unflatten(1, grid)
        return features

    def loss(batch: tuple[Tensor, list[Boxes]]) -> Tensor:
        images, boxes = batch
        offset = _offset(images, live.patch)
        targets = [
            {
                "boxes": ((kept.boxes + offset) / live.patch)[~kept.difficult].to(run.device),
                "labels": kept.classes[~kept.difficult].to(run.device) + 1,
            }
            for kept in boxes
        ]
        return torch.stack(list(detector(maps(images), targets).values())).sum()

    torch.manual_seed(run.seed)
    head = FastRCNNConvFCHead((settings.width, 7, 7), [settings.width] * 4, [settings.hidden], norm_layer=LayerNorm2d)
    detector = MapDetector(
        live.channels,
        len(val.classes),
        [side / live.patch for side in settings.anchors],
        head,
        width=settings.width,
        hidden=settings.hidden,
        proposals=settings.proposals,
        candidates=settings.candidates,  # type: ignore[arg-type]
        sampling=0,
    ).to(run.device)
    train(
        detector,
        loss,
        len(training),
        run,
        settings,
        settings.steps,
        stepped(settings.decay_from),
        "detection",
        read=read,
    )
    detections: list[Detections] = []
    with torch.no_grad():
        for index in tqdm(range(len(val)), desc=f"detection ({run.state})", unit="image", leave=False):
            image, _ = prepare(val, index, settings, False)
            (detected,) = detector(maps(image[None]))
            size = scaled_size(_size(val.image(index)), settings.size, settings.size)
            scale = torch.tensor([size[1], size[0], size[1], size[0]])
            boxes = (detected["boxes"].cpu() * live.patch - _offset(image, live.patch)) / scale
            detections.append(Detections(boxes.clamp(0, 1), detected["labels"].cpu() - 1, detected["scores"].cpu()))
    return voc_map(detections, [val.annotation(i) for i in range(len(val))], len(val.classes))


def prepare(split: Split, index: int, settings: Settings, flipped: bool) -> tuple[Tensor, Boxes]:
    """An image as the backbone takes it, (3, h, w) normalized and padded, and its boxes in pixels of that."""
    image, boxes = split.image(index), split.annotation(index)
    size = scaled_size(_size(image), settings.size, settings.size)
    image = resize_image(image, size)
    corners = boxes.boxes
    if flipped:
        image = image.flip(-1)
        corners = torch.stack([1 - corners[:, 2], corners[:, 1], 1 - corners[:, 0], corners[:, 3]], 1)
    padded = (size[0] + -size[0] % MULTIPLE, size[1] + -size[1] % MULTIPLE)
    scale = torch.tensor([size[1], size[0], size[1], size[0]])
    return pad_below(normalize(image), padded, 0), boxes._replace(boxes=corners * scale)


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def _offset(images: Tensor, patch: int) -> Tensor:
    """By how many pixels (x, y, x, y) an image lies from the corner of the map, which begins with half the padding."""
    left, _, top, _ = patch_padding(_size(images), patch)
    return torch.tensor([left, top, left, top])
