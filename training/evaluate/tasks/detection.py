"""Object detection on frozen maps: Tabs. 3 and S2; ViTDet's simple feature pyramid and torchvision's Faster R-CNN.

The pyramid makes maps at 4, 2, 1 and 1/2 times the patch grid from the last map alone, each by transposed
convolutions or pooling, a 1 x 1 and a 3 x 3 convolution with LayerNorm, and one more by pooling for the largest
anchors. Denoised maps get fixed sinusoidal position embeddings added again, which Tab. S2 finds to help them and
not the raw ones. AdamW at 1e-4, weight decay 0.1, 100 steps of warm-up, 24,000 steps of 16 images, a tenth of the rate
from 20,000 and again from 22,000 on, two convolutions in the region proposal network: as in the authors' repository
(evaluation/configs/vitb_voc2012_vitdet_pe_config.py), whose box head has four convolutions where torchvision's has
none. Trained on VOC 07+12 trainval, tested on VOC 07 test; mAP at an IoU of 0.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from timm.layers import LayerNorm2d, build_sincos2d_pos_embed
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from training.evaluate.average_precision import Detections, voc_map
from training.evaluate.features import Features
from training.evaluate.probe import train
from training.evaluate.runner import Run
from training.evaluate.splits import Boxes
from training.loop.schedule import stepped

KIND = "boxes"
STATES = ("raw", "denoised")
FIXED_PE = ("denoised", "both", "none")
EMBEDDINGS = ("sincos", "artifacts")


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


STAMPS = Settings(steps=400, batch_size=8, lr=1e-3, width=48, hidden=128, proposals=64, candidates=100)


class SimplePyramid(nn.Module):
    """Maps (B, C, K, K) to five of `out_channels`, at 4, 2, 1, 1/2 and 1/4 of the patch grid (ViTDet, Sec. 3)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.out_channels = width
        half, quarter = max(1, channels // 2), max(1, channels // 4)
        up = nn.Sequential(
            nn.ConvTranspose2d(channels, half, 2, 2),
            LayerNorm2d(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, 2),
        )
        twice = nn.ConvTranspose2d(channels, half, 2, 2)
        self.scales = nn.ModuleList([up, twice, nn.Identity(), nn.MaxPool2d(2, ceil_mode=True)])
        self.outputs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, width, 1, bias=False),
                LayerNorm2d(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                LayerNorm2d(width),
            )
            for inputs in (quarter, half, channels, channels)
        )

    def forward(self, maps: Tensor) -> dict[str, Tensor]:
        levels = [output(scale(maps)) for scale, output in zip(self.scales, self.outputs)]
        levels.append(nn.functional.max_pool2d(levels[-1], 1, 2))
        return {str(i): level for i, level in enumerate(levels)}


class Detector(nn.Module):
    """Faster R-CNN that starts from maps instead of images."""

    def __init__(self, channels: int, classes: int, grid: int, input_size: int, settings: Settings) -> None:
        super().__init__()
        patch = input_size / grid
        # One size a level: half a square image down to two patches, as ViTDet's 32 to 512 px at 1024 px.
        sizes = tuple((int(2 * patch * scale),) for scale in (0.5, 1, 2, 4, 8))
        levels = [str(i) for i in range(4)]
        self.input_size = input_size
        width = settings.width
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        self.rcnn = FasterRCNN(
            SimplePyramid(channels, width),
            num_classes=None,
            min_size=input_size,
            max_size=input_size,
            rpn_anchor_generator=anchors,
            rpn_head=RPNHead(width, anchors.num_anchors_per_location()[0], conv_depth=2),
            box_roi_pool=MultiScaleRoIAlign(levels, 7, 2),
            box_head=TwoMLPHead(width * 49, settings.hidden),
            box_predictor=_Predictor(settings.hidden, classes + 1),
            rpn_pre_nms_top_n_train=settings.candidates,
            rpn_post_nms_top_n_train=settings.candidates,
            rpn_pre_nms_top_n_test=max(1, settings.candidates // 2),  # torchvision's own proportion
            rpn_post_nms_top_n_test=max(1, settings.candidates // 2),
            rpn_batch_size_per_image=settings.proposals // 2,
            box_batch_size_per_image=settings.proposals,
        )

    def forward(self, maps: Tensor, targets: list[dict[str, Tensor]] | None = None):
        """Losses {name: value} of maps (B, K, K, C) with targets in training, else a list of detections."""
        levels = self.rcnn.backbone(maps.permute(0, 3, 1, 2))
        size = self.input_size
        # The networks take from the images their number and size alone.
        pixels = maps.new_zeros(()).expand(len(maps), 3, size, size)
        images = ImageList(pixels, [(size, size)] * len(maps))
        proposals, first = self.rcnn.rpn(images, levels, targets)
        detections, second = self.rcnn.roi_heads(levels, proposals, images.image_sizes, targets)
        return {**first, **second} if self.training else detections


class _Predictor(nn.Module):
    """Class scores, background first, and box corrections."""

    def __init__(self, hidden: int, classes: int) -> None:
        super().__init__()
        self.score = nn.Linear(hidden, classes)
        self.correction = nn.Linear(hidden, 4 * classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.score(x), self.correction(x)


def run(data: Mapping[str, Features], settings: Settings, run: Run) -> dict[str, float]:
    """mAP (area) and mAP_11 (2007's 11 points), in percent."""
    if settings.fixed_pe not in FIXED_PE:
        raise ValueError(f"fixed_pe must be one of {FIXED_PE}, got {settings.fixed_pe!r}")
    if settings.embedding not in EMBEDDINGS:
        raise ValueError(f"embedding must be one of {EMBEDDINGS}, got {settings.embedding!r}")
    training, val = data["train"], data["val"]
    training.extract()
    val.extract()
    classes, size = len(val.split.classes), training.extractor.reader.input_size
    position = torch.zeros(())
    if settings.fixed_pe in ("both", run.state):
        learned = settings.embedding == "artifacts"
        position = mean_artifacts(training) if learned else fixed_positions(training.grid, training.channels)

    def read(features: Features, indices: list[int]) -> Tensor:
        return (features.maps(indices, run.state) + position.to(run.device)).to(run.device)

    def loss(indices: list[int]) -> Tensor:
        targets = [_target(training.split.annotation(i), size, run.device) for i in indices]
        return sum(detector(read(training, indices), targets).values())

    torch.manual_seed(run.seed)
    detector = Detector(training.channels, classes, training.grid, size, settings).to(run.device)
    train(
        detector, loss, len(training), run, settings,
        steps=settings.steps, decay=stepped(settings.decay_from), label="detection",
    )  # fmt: skip
    found: list[Detections] = []
    true: list[Boxes] = []
    with torch.no_grad():
        for indices, _ in val.batches(run.state, f"detection ({run.state})"):
            for detected in detector(read(val, indices)):
                boxes = detected["boxes"].cpu() / size
                found.append(Detections(boxes, detected["labels"].cpu() - 1, detected["scores"].cpu()))
            true.extend(val.split.annotation(i) for i in indices)
    return voc_map(found, true, classes)


def fixed_positions(grid: int, channels: int) -> Tensor:
    """Sinusoidal position embeddings (K, K, C); channels that 4 does not divide stay 0 at the end."""
    positions = torch.zeros(grid, grid, channels)
    even = channels // 4 * 4
    positions[..., :even] = build_sincos2d_pos_embed([grid, grid], even).reshape(grid, grid, even)
    return positions


def mean_artifacts(features: Features) -> Tensor:
    """What the denoiser removes, raw - denoised, in the mean over a split: (K, K, C)."""
    if "denoised" not in features.extractor.states:
        raise ValueError("embedding=artifacts needs a model with a denoiser")
    total = torch.zeros(features.grid, features.grid, features.channels, dtype=torch.float64)
    for _, maps in features.batches("artifacts", "mean artifacts"):
        total += maps.double().sum(0).cpu()
    return (total / len(features)).float()


def _target(boxes: Boxes, size: int, device: torch.device) -> dict[str, Tensor]:
    """What Faster R-CNN learns from: the objects that are not difficult, in pixels, classes from 1."""
    kept = ~boxes.difficult
    return {"boxes": (boxes.boxes[kept] * size).to(device), "labels": (boxes.classes[kept] + 1).to(device)}
