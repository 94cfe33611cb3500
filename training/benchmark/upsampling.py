"""F between the patches against upsampled maps: which is nearer to exact masks along the borders of objects.

    python -m training.stamps --out stamps --train 1 --val 10
    python -m training.benchmark upsampling --data stamps --model vit_small_patch14_dinov2.focus

For each composite the means of the features of its classes, over all places, are what the places are told apart by (the
nearest in cosine), so nothing is trained and all that differs is how sharply a map follows a border. The share of
places told right is taken within one patch of a border and elsewhere, at SCALE places a patch either way. Beside
F.at(...) stand F, raw - G and raw of the patches, upsampled bilinearly. The cost is in forward passes.
"""

from __future__ import annotations

import sys

import torch
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import interpolate, normalize, one_hot

from timm_dvt.bars import tqdm
from timm_dvt.image_files import load_image
from timm_dvt.loading import load_model, pick_device
from timm_dvt.options import at_least
from training.common.command import command_parser, positive
from training.evaluate.data.datasets import open_dataset
from training.evaluate.segmentation.score import resize_mask
from training.stage1.conditioning import LEAST_VIEWS
from training.stage1.decompose import Stage1Settings, decompose

METHODS = ("F between the patches", "F, bilinear", "raw - G, bilinear", "raw, bilinear")


def classified_right(features: Tensor, labels: Tensor) -> Tensor:
    """Which places (R, R) have features (R, R, C) nearer to their own class's mean than to another's."""
    tokens = normalize(features.flatten(0, 1), dim=-1)
    classes, names = labels.flatten().unique(return_inverse=True)
    members = one_hot(names, len(classes)).float()
    means = normalize(members.T @ tokens, dim=-1)
    return ((tokens @ means.T).argmax(1) == names).view(labels.shape)


def near_borders(labels: Tensor, distance: int) -> Tensor:
    """Which places (R, R) lie within so many places of one of another class."""
    array = labels.numpy()
    edge = (ndimage.maximum_filter(array, 3) != array) | (ndimage.minimum_filter(array, 3) != array)
    return torch.from_numpy(ndimage.distance_transform_edt(~edge) <= distance)


def upsampled(maps: Tensor, resolution: int) -> Tensor:
    """(K, K, C) to (R, R, C), bilinearly."""
    return interpolate(maps.permute(2, 0, 1)[None], (resolution, resolution), mode="bilinear")[0].permute(1, 2, 0)


def main(argv: list[str]) -> int:
    parser = command_parser("benchmark upsampling", __doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="what training.stamps made")
    parser.add_argument("--model", default="vit_small_patch14_dinov2.focus", metavar="NAME")
    parser.add_argument("--no-pretrained", dest="pretrained", action="store_false")
    parser.add_argument("--images", type=positive, default=10, help="(10)")
    parser.add_argument(
        "--views", type=at_least(LEAST_VIEWS), nargs="+", default=[32], metavar="N", help="forward passes an image (32)"
    )
    parser.add_argument("--input-size", type=positive, help="(518 for patch 14)")
    parser.add_argument("--scale", type=positive, default=4, help="places a patch either way (4)")
    args = parser.parse_args(argv)
    split = open_dataset("stamps", args.data, "masks")["val"]
    model = load_model(args.model, pretrained=args.pretrained).to(pick_device("auto"))
    for views in args.views:
        right: dict[str, list[Tensor]] = {method: [] for method in METHODS}
        borders = []
        for index in tqdm(range(min(args.images, len(split))), desc=f"{views} views", unit="image", leave=False):
            image = load_image(split.images[index])
            part = decompose(model, image, Stage1Settings(views=views, seed=index, input_size=args.input_size))
            assert not isinstance(part, dict)
            resolution = args.scale * len(part.raw)
            labels = resize_mask(split.annotation(index), resolution).long()
            borders.append(near_borders(labels, args.scale))
            maps = (part.semantics, part.raw - part.artifacts, part.raw)
            resampled = (part.at(resolution, resolution), *(upsampled(coarse, resolution) for coarse in maps))
            for method, features in zip(METHODS, resampled, strict=True):
                right[method].append(classified_right(features, labels))
        border = torch.stack(borders)
        print(f"{views} views, {len(borders)} images, {args.scale} x {args.scale} places a patch; told right, in %:")
        for method, places in right.items():
            correct = torch.stack(places).float()
            passes = views if method != "raw, bilinear" else 1
            print(
                f"  {method:24s} near borders {100 * correct[border].mean():5.1f}  elsewhere "
                f"{100 * correct[~border].mean():5.1f}  forward passes {passes}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
