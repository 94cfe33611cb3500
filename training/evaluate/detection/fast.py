"""Object detection on frozen maps: Tabs. 3 and S2; ViTDet's simple feature pyramid and torchvision's Faster R-CNN.

The pyramid makes maps at 4, 2, 1 and 1/2 times the patch grid from the last map alone, each by transposed
convolutions or pooling, a 1 x 1 and a 3 x 3 convolution with LayerNorm, and one more by pooling for the largest
anchors. Denoised maps get fixed sinusoidal position embeddings added again, which Tab. S2 finds to help them and
not the raw ones. AdamW at 1e-4, weight decay 0.1, 100 steps of warm-up, 24,000 steps of 16 images, a tenth of the rate
from 20,000 and again from 22,000 on, two convolutions in the region proposal network: as in the authors' repository
(evaluation/configs/vitb_voc2012_vitdet_pe_config.py), whose box head has four convolutions where torchvision's has
none, and which keeps the images' aspect and flips them (repository.py, --protocol repository). Trained on
VOC 07+12 trainval, tested on VOC 07 test; mAP at an IoU of 0.5, the area under the curve. What the paper publishes is
mAP_11, VOC07's mean of 11 points, which is what mmdetection computes for VOC 07 test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from timm_dvt.errors import UserError
from training.evaluate.data.splits import Boxes
from training.evaluate.detection.average_precision import Detections, voc_map
from training.evaluate.detection.detector import MapDetector, fixed_positions
from training.evaluate.features.cached import Features
from training.evaluate.probe import train
from training.evaluate.run import Run
from training.loop.schedule import stepped

KIND = "boxes"
STATES = ("raw", "denoised")
NUMBERS = {"mAP_11": "mAP, 11 points"}
MEANING = "mAP: detection of objects by a small head on the patches, in percent; more is better."
FIXED_PE = ("denoised", "both", "none")
EMBEDDINGS = ("sincos", "artifacts")
FINEST = (4, 2, 1)


@dataclass(frozen=True)
class Settings:
    """The paper's, its repository's where it says nothing.

    Attributes:
        decay_from: fractions of the steps from which the rate is a tenth, a hundredth (20,000 and 22,000).
        fixed_pe: to which maps fixed position embeddings are added: "denoised", "both" or "none".
        embedding: "sincos", sinusoidal ones, or "artifacts": what the denoiser removes, in the mean over the training
            images. They hold the backbone's own position signal, at its own scale.
        width: channels of the pyramid.
        hidden: of the box head.
        proposals: sampled an image to train the box head; anchors sampled are half as many.
        candidates: proposals of a level that go into non-maximum suppression, and that come out of it in all.
        finest: level of the pyramid, times the patch grid: 4 (ViTDet's), 2 or 1; with anchors of 1, 2 or 4 patches.
    """

    steps: int = 24_000
    batch_size: int = 16
    lr: float = 1e-4
    weight_decay: float = 0.1
    warmup: int = 100
    decay_from: tuple[float, ...] = (20 / 24, 22 / 24)
    fixed_pe: str = "denoised"
    embedding: str = "sincos"
    width: int = 256
    hidden: int = 1024
    proposals: int = 512
    candidates: int = 2000
    finest: int = 4


# On two cores nine tenths of a step would go to the two finest levels, which serve objects of less than four patches.
SMALL = Settings(steps=2_000, batch_size=8, lr=1e-3, width=48, hidden=128, proposals=64, candidates=100, finest=1)


class Detector(MapDetector):
    """Faster R-CNN on square maps of K x K patches, with boxes in pixels of the input."""

    def __init__(self, channels: int, classes: int, grid: int, input_size: int, settings: Settings) -> None:
        width, some = settings.width, settings.candidates
        super().__init__(
            channels,
            classes,
            # One size a level, from a patch to half a square map, as ViTDet's 32 to 512 px at 1024 px.
            anchors=(1, 2, 4, 8, 16)[FINEST.index(settings.finest) :],
            box_head=TwoMLPHead(width * 49, settings.hidden),
            width=width,
            hidden=settings.hidden,
            proposals=settings.proposals,
            candidates=(some, some, max(1, some // 2), max(1, some // 2)),  # torchvision's own proportion
        )
        self.patch = input_size / grid

    def forward(self, maps: Tensor, targets: list[dict[str, Tensor]] | None = None):
        """Losses {name: value} of maps (B, K, K, C) with targets in training, else a list of detections."""
        if targets is not None:
            targets = [{**target, "boxes": target["boxes"] / self.patch} for target in targets]
        outputs = super().forward(maps, targets)
        if self.training:
            return outputs
        return [{**detected, "boxes": detected["boxes"] * self.patch} for detected in outputs]


def run(data: Mapping[str, Features], settings: Settings, run: Run) -> dict[str, float]:
    """mAP (area) and mAP_11 (2007's 11 points), in percent."""
    if settings.fixed_pe not in FIXED_PE:
        raise UserError(f"fixed_pe must be one of {FIXED_PE}, got {settings.fixed_pe!r}")
    if settings.embedding not in EMBEDDINGS:
        raise UserError(f"embedding must be one of {EMBEDDINGS}, got {settings.embedding!r}")
    if settings.finest not in FINEST:
        raise UserError(f"finest must be one of {FINEST}, got {settings.finest!r}")
    training, val = data["train"], data["val"]
    training.extract()
    val.extract()
    classes, size = len(val.split.classes), training.extractor.reader.input_size
    position = torch.zeros((), device=run.device)
    if settings.fixed_pe in ("both", run.state):
        learned = settings.embedding == "artifacts"
        position = mean_artifacts(training) if learned else fixed_positions(training.grid, training.channels)
        position = position.to(run.device)

    def read(features: Features, indices: list[int]) -> Tensor:
        return features.maps(indices, run.state) + position

    def loss(indices: list[int]) -> Tensor:
        targets = [_target(training.split.annotation(i), size, run.device) for i in indices]
        return sum(detector(read(training, indices), targets).values())

    torch.manual_seed(run.seed)
    detector = Detector(training.channels, classes, training.grid, size, settings).to(run.device)
    train(detector, loss, len(training), run, settings, settings.steps, stepped(settings.decay_from), "detection")
    detections: list[Detections] = []
    true: list[Boxes] = []
    with torch.no_grad():
        for indices, _ in val.batches(run.state, f"detection ({run.state})"):
            for detected in detector(read(val, indices)):
                boxes = detected["boxes"].cpu() / size
                detections.append(Detections(boxes, detected["labels"].cpu() - 1, detected["scores"].cpu()))
            true.extend(val.split.annotation(i) for i in indices)
    return voc_map(detections, true, classes)


def mean_artifacts(features: Features) -> Tensor:
    """What the denoiser removes, raw - denoised, in the mean over a split: (K, K, C)."""
    if "denoised" not in features.extractor.states:
        raise UserError("embedding=artifacts needs a model with a denoiser")
    total = torch.zeros(features.grid, features.grid, features.channels, dtype=torch.float64)
    for _, maps in features.batches("artifacts", "mean artifacts"):
        total += maps.cpu().double().sum(0)
    return (total / len(features)).float()


def _target(boxes: Boxes, size: int, device: torch.device) -> dict[str, Tensor]:
    """What Faster R-CNN learns from: the objects that are not difficult, in pixels, classes from 1."""
    kept = ~boxes.difficult
    return {"boxes": (boxes.boxes[kept] * size).to(device), "labels": (boxes.classes[kept] + 1).to(device)}
