"""Faster R-CNN on the map of a plain ViT: ViTDet's simple feature pyramid and torchvision's heads.

Boxes are in patches from the map's upper left corner. Inside, a patch is 16 units wide, so that the pyramid's levels
have the strides 4, 8, 16, 32 and 64 that the heads expect, whatever the patch size and however odd the grid. A pyramid
may begin at twice or once the patch grid instead of four times: most of its cost is at the finest level, which serves
objects of a patch or two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d, build_sincos2d_pos_embed
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.ops import MultiScaleRoIAlign

UNIT = 16  # of a patch
STRIDES = (4, 8, 16, 32, 64)  # of all levels; a pyramid of fewer has the last of them


class SimplePyramid(nn.Module):
    """Maps (B, C, H, W) to five of `out_channels`, at 4, 2, 1, 1/2 and 1/4 of the patch grid (ViTDet, Sec. 3).

    Of fewer `levels` than five the finest are left out; three at least, from the patch grid on.
    """

    def __init__(self, channels: int, width: int, levels: int = 5) -> None:
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
        scales = [up, twice, nn.Identity(), nn.MaxPool2d(2, ceil_mode=True)]
        inputs = (quarter, half, channels, channels)
        left_out = len(STRIDES) - levels
        self.scales = nn.ModuleList(scales[left_out:])
        self.outputs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(entering, width, 1, bias=False),
                LayerNorm2d(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                LayerNorm2d(width),
            )
            for entering in inputs[left_out:]
        )

    def forward(self, maps: Tensor) -> dict[str, Tensor]:
        levels = [output(scale(maps)) for scale, output in zip(self.scales, self.outputs)]
        levels.append(nn.functional.max_pool2d(levels[-1], 1, 2))
        return {str(i): level for i, level in enumerate(levels)}


class LevelAnchors(AnchorGenerator):
    """Anchors at the levels' own strides: torchvision divides sizes in whole numbers, and misses those of odd grids."""

    def __init__(self, sides: Sequence[int]) -> None:
        super().__init__(tuple((side,) for side in sides), ((0.5, 1.0, 2.0),) * len(sides))

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        first = feature_maps[0]
        self.set_cell_anchors(first.dtype, first.device)
        strides = [[torch.tensor(stride, device=first.device)] * 2 for stride in STRIDES[-len(feature_maps) :]]
        grids = [[level.shape[-2], level.shape[-1]] for level in feature_maps]
        return [torch.cat(self.grid_anchors(grids, strides))] * len(image_list.image_sizes)


class MapDetector(nn.Module):
    """Faster R-CNN that starts from patch maps instead of images."""

    def __init__(
        self,
        channels: int,
        classes: int,
        anchors: Sequence[float],
        box_head: nn.Module,
        *,
        width: int,
        hidden: int,
        proposals: int,
        candidates: tuple[int, int, int, int],
        convolutions: int = 2,
        sampling: int = 2,
    ) -> None:
        """
        Args:
            channels: of the maps. classes: without a background.
            anchors: sides of the square ones in patches, one a level of the pyramid, which has as many: 5, 4 or 3.
            box_head: (N, width, 7, 7) -> (N, hidden).
            width: channels of the pyramid.
            proposals: sampled an image to train the box head; anchors sampled are half as many.
            candidates: proposals of a level that go into non-maximum suppression, and that come out in all, in
                training; the same in the test.
            convolutions: of the region proposal network.
            sampling: points of RoIAlign a bin and side; 0 for as many as the bin is wide.
        """
        super().__init__()
        into, out, test_into, test_out = candidates
        generator = LevelAnchors([round(UNIT * side) for side in anchors])
        self.rcnn = FasterRCNN(
            SimplePyramid(channels, width, len(anchors)),
            num_classes=None,
            rpn_anchor_generator=generator,
            rpn_head=RPNHead(width, generator.num_anchors_per_location()[0], conv_depth=convolutions),
            box_roi_pool=MultiScaleRoIAlign([str(i) for i in range(len(anchors) - 1)], 7, sampling),
            box_head=box_head,
            box_predictor=FastRCNNPredictor(hidden, classes + 1),
            rpn_pre_nms_top_n_train=into,
            rpn_post_nms_top_n_train=out,
            rpn_pre_nms_top_n_test=test_into,
            rpn_post_nms_top_n_test=test_out,
            rpn_batch_size_per_image=proposals // 2,
            box_batch_size_per_image=proposals,
        )

    def forward(self, maps: Tensor, targets: list[dict[str, Tensor]] | None = None):
        """Losses {name: value} of maps (B, H, W, C) with targets in training, else a list of detections.

        Targets and detections hold "boxes" (N, 4) in patches and "labels" (N,) from 1; detections "scores" (N,) too.
        """
        size = (UNIT * maps.shape[1], UNIT * maps.shape[2])
        levels = self.rcnn.backbone(maps.permute(0, 3, 1, 2))
        # The networks take from the images their number and size alone.
        images = ImageList(maps.new_zeros(()).expand(len(maps), 3, *size), [size] * len(maps))
        if targets is not None:
            targets = [{**target, "boxes": UNIT * target["boxes"]} for target in targets]
        proposals, first = self.rcnn.rpn(images, levels, targets)
        detections, second = self.rcnn.roi_heads(levels, proposals, images.image_sizes, targets)
        if self.training:
            return {**first, **second}
        return [{**detected, "boxes": detected["boxes"] / UNIT} for detected in detections]


def fixed_positions(grid: int, channels: int) -> Tensor:
    """Sinusoidal position embeddings (K, K, C); channels that 4 does not divide stay 0 at the end."""
    positions = torch.zeros(grid, grid, channels)
    even = channels // 4 * 4
    positions[..., :even] = build_sincos2d_pos_embed([grid, grid], even).reshape(grid, grid, even)
    return positions
