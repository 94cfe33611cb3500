"""The repository's protocols, piece by piece, against other ways to the same number."""

import math

import numpy as np
import pytest
import timm
import torch
from torch.nn.functional import interpolate, pad

import timm_dvt
from tests.helpers import small_datasets
from training.evaluate.depth import repository as depth
from training.evaluate.detection import repository as detection
from training.evaluate.detection.detector import MapDetector
from training.evaluate.features.extractor import Extractor
from training.evaluate.features.live import LiveFeatures
from training.evaluate.probe import Validations
from training.evaluate.run import Run
from training.evaluate.segmentation import repository as linear_seg
from training.evaluate.segmentation.score import SegmentationScore

ARGS = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 64, "num_heads": 2, "num_classes": 0}


# ---- features


def live(**changes):
    torch.manual_seed(0)
    vit = timm_dvt.add_denoiser(timm.create_model("vit_tiny_patch16_224", **{**ARGS, **changes})).eval()
    return vit, LiveFeatures(Extractor(vit))


def test_live_features_are_the_models_own_at_any_size():
    vit, features = live(dynamic_img_size=True)
    images = torch.randn(2, 3, 44, 69)  # padded to 48 x 72
    padded = pad(images, (1, 2, 2, 2))
    with torch.no_grad(), vit.denoising(False):
        raw = vit.forward_features(padded)
        unnormed = vit.forward_intermediates(padded, indices=1, norm=False, intermediates_only=True)[0]
    with torch.no_grad():
        denoised = vit.forward_features(padded)
    maps, classes = features(images, "raw")
    assert maps.shape == (2, 6, 9, 64) and torch.allclose(maps.flatten(1, 2), raw[:, 1:], atol=1e-4)
    assert torch.allclose(classes, raw[:, 0], atol=1e-4)
    assert torch.allclose(features(images, "denoised")[0].flatten(1, 2), denoised[:, 1:], atol=1e-4)
    bare = features(images, "raw", final_norm=False)[0]
    with vit.denoising(False):
        assert bare.shape == maps.shape and not torch.allclose(bare, maps, atol=0.1)
    assert torch.allclose(vit.norm(bare), maps, atol=1e-4)
    assert torch.allclose(features(images, "denoised", final_norm=False)[0], features(images, "denoised")[0])
    assert unnormed.shape == (2, 64, 6, 9)


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch14_reg4_dinov2",
        "eva02_tiny_patch14_224",
        "vit_tiny_patch16_224",
        "vit_base_patch16_siglip_224",
    ],
)
def test_live_features_of_a_square_are_those_of_the_reader(name):
    torch.manual_seed(0)
    vit = timm_dvt.add_denoiser(timm.create_model(name, depth=1, num_classes=0)).eval()
    size = 3 * vit.patch_embed.patch_size[0]
    extractor = Extractor(vit, size)
    images = torch.rand(1, 3, size, size)
    want = extractor.backbone(images)
    features = LiveFeatures(extractor)
    normed = (images - extractor.reader.mean) / extractor.reader.std
    maps, classes = features(normed, "raw")
    assert torch.allclose(maps, want["raw"], atol=1e-4)
    assert torch.allclose(classes, want["prefix"][:, 0] if want["prefix"].shape[1] else classes[:, :0], atol=1e-4)
    assert torch.allclose(features(normed, "denoised")[0], extractor.denoise(want["raw"], None), atol=1e-4)
    wide = features(torch.randn(1, 3, size, 2 * size), "denoised")[0]
    assert wide.shape == (1, 3, 6, vit.embed_dim) and wide.isfinite().all()


@pytest.mark.parametrize(
    "name, more, prefix",
    [
        ("cait_xxs24_224", {"depth": 1}, 1),
        ("xcit_nano_12_p16_224", {"depth": 1}, 1),
        ("levit_128s", {}, 0),
        ("hiera_tiny_224", {"stages": (1, 1, 1, 1)}, 0),
        ("vit_relpos_small_patch16_224", {"depth": 1}, 0),
    ],
)
def test_live_features_of_other_families_are_the_models_own(name, more, prefix):
    torch.manual_seed(0)
    model = timm_dvt.add_denoiser(timm.create_model(name, num_classes=0, **more)).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        denoised = model.forward_features(images)
        with model.denoising(False):
            raw = model.forward_features(images)
    if "relpos" in name:  # timm moves its norm behind the pooling
        raw = model.fc_norm(raw)
    features = LiveFeatures(Extractor(model))
    maps, classes = features(images, "raw")
    assert torch.allclose(maps.flatten(1, 2), raw[:, prefix:], atol=1e-4)
    assert torch.allclose(classes, raw[:, :prefix].flatten(1), atol=1e-4)
    assert torch.allclose(features(images, "denoised")[0].flatten(1, 2), denoised[:, prefix:], atol=1e-4)
    bare = features(images, "raw", final_norm=False)[0]
    if prefix:
        assert not torch.allclose(bare, maps, atol=0.1) and torch.allclose(model.norm(bare), maps, atol=1e-4)


# ---- segmentation


def test_a_training_crop_is_one_size_and_follows_its_draw():
    scene = small_datasets.Scene(3)
    image, mask = torch.from_numpy(scene.image).permute(2, 0, 1) / 255, torch.from_numpy(scene.mask)
    settings = linear_seg.Settings(short=32, longest=128, crop=32)
    padded = 0
    for seed in range(12):
        pixels, labels = linear_seg.training_crop(image, mask, settings, np.random.default_rng(seed))
        again = linear_seg.training_crop(image, mask, settings, np.random.default_rng(seed))
        assert torch.equal(pixels, again[0]) and torch.equal(labels, again[1])
        assert pixels.shape == (3, 32, 32) and labels.shape == (32, 32)
        missing = (pixels == 0).all(0)
        assert (labels[missing] == 255).all()
        padded += bool(missing.any())
    assert 0 < padded < 12


def test_a_test_image_is_predicted_window_by_window_and_resized_logits_are_averaged():
    settings = linear_seg.Settings(short=24, longest=200, crop=24, stride=16)
    _, features = live()
    head = linear_seg.LinearHead(64, 5, batch_norm=True).eval()
    image = torch.rand(3, 20, 40)

    def logits(images):
        return head(features(images, "raw")[0], tuple(images.shape[-2:]))

    found = linear_seg.predict(image, logits, settings, 3)
    resized = interpolate(image[None], (24, 48), mode="bilinear", align_corners=False)
    normed = (resized - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    parts = [logits(normed[..., left : left + 24]).detach() for left in (0, 16, 24)]
    want = torch.zeros(1, 5, 24, 48)
    want[..., :16] = parts[0][..., :16]
    want[..., 16:24] = (parts[0][..., 16:] + parts[1][..., :8]) / 2
    want[..., 24:40] = (parts[1][..., 8:] + parts[2][..., :16]) / 2
    want[..., 40:] = parts[2][..., 16:]
    assert torch.allclose(found, want, atol=1e-3)


def test_class_numbers_agree_with_scikit_learn():
    from sklearn.metrics import jaccard_score, recall_score

    true, predicted = torch.randint(0, 4, (30, 30), dtype=torch.uint8), torch.randint(0, 5, (30, 30))
    score = SegmentationScore(5)
    score.add(predicted, true)
    numbers = score.class_numbers(list("abcde"))
    arguments = {"y_true": true.flatten(), "y_pred": predicted.flatten(), "labels": range(4), "average": None}
    for name, iou, recall in zip("abcd", jaccard_score(**arguments), recall_score(**arguments)):
        assert numbers[f"IoU/{name}"] == pytest.approx(100 * iou)
        assert numbers[f"Acc/{name}"] == pytest.approx(100 * recall)
    assert "IoU/e" not in numbers


def test_the_best_validation_counts_and_survives_a_kill(tmp_path):
    found = iter([{"a": 1.0, "b": 5.0}, {"a": 3.0, "b": 4.0}, {"a": 2.0, "b": 9.0}])
    run = Run("raw", checkpoint=tmp_path / "x.safetensors")
    head = torch.nn.Linear(1, 1)
    first = Validations(head, run, 10, lambda: next(found))
    first(10)
    first(20)
    again = Validations(head, run, 10, lambda: next(found))
    again(30)
    assert again.best("a") == {"a": 3.0, "b": 4.0, "a/last": 2.0, "best_step": 20.0}
    assert again.best("b")["best_step"] == 30


# ---- depth


def test_depths_are_a_linearly_normalized_mixture_of_bin_edges():
    head = depth.DepthHead(6, depth.Settings(bins=5, least=1.0, most=9.0))
    assert head.depths.tolist() == [1, 3, 5, 7, 9]
    maps, token = torch.randn(1, 2, 3, 4), torch.randn(1, 2)
    with torch.no_grad():
        found = head(maps, token)
    assert found.shape == (1, 1, 8, 12)
    logits = head.linear.weight[:, :, 0, 0] @ torch.cat([maps[0, 0, 0], token[0]]) + head.linear.bias
    weights = torch.relu(logits.detach()) + 0.1
    assert found[0, 0, 0, 0].item() == pytest.approx(float((weights * head.depths).sum() / weights.sum()), rel=1e-5)


def test_scale_invariant_loss_by_its_definition():
    predicted, true = 1 + torch.rand(2, 6, 5), 1 + torch.rand(2, 6, 5)
    true[0, 2:] = 0
    g = ((predicted.double() + 1e-3) / (true.double() + 1e-3)).log()[true > 0].numpy()
    want = math.sqrt(g.var(ddof=1) + 0.15 * g.mean() ** 2)
    assert depth.scale_invariant_loss(predicted, true).item() == pytest.approx(want, rel=1e-4)
    warming = depth.scale_invariant_loss(predicted, true, warming=True).item()
    assert warming == pytest.approx(math.sqrt(0.15) * abs(g.mean()), rel=1e-4)
    assert depth.scale_invariant_loss(predicted, 0 * true).item() == 0


def test_gradient_loss_by_a_loop():
    predicted, true = (1 + torch.rand(2, 14, 15)).double(), (1 + torch.rand(2, 14, 15)).double()
    true[1, 3:5, 4:9] = 0
    total = 0.0
    for stride in (1, 2, 4, 6):
        d, t = predicted[:, ::stride, ::stride], true[:, ::stride, ::stride]
        known, part = 0, 0.0
        for n in range(2):
            for y in range(d.shape[1]):
                for x in range(d.shape[2]):
                    known += int(t[n, y, x] > 0)
                    for y2, x2 in ((y + 2, x), (y, x + 2)):
                        if y2 < d.shape[1] and x2 < d.shape[2] and t[n, y, x] > 0 and t[n, y2, x2] > 0:
                            one = math.log(d[n, y, x] + 1e-3) - math.log(t[n, y, x] + 1e-3)
                            two = math.log(d[n, y2, x2] + 1e-3) - math.log(t[n, y2, x2] + 1e-3)
                            part += abs(one - two)
        total += part / known
    assert depth.gradient_loss(predicted, true).item() == pytest.approx(total, rel=1e-6)


def test_training_depths_lose_nyus_border_and_are_416_x_544():
    image, true = torch.rand(3, 480, 640), torch.full((480, 640), 2.0)
    true[:45], true[472:], true[:, :43], true[:, 608:] = 9, 9, 9, 9  # NYUCrop: rows 45 to 471, columns 43 to 607
    for seed in range(4):
        pixels, kept = depth.training_crop(image, true, depth.Settings(), np.random.default_rng(seed))
        assert pixels.shape == (3, 416, 544) and kept.shape == (416, 544)
        assert set(kept.unique().tolist()) <= {0.0, 2.0}


def test_a_test_depth_is_the_mean_of_both_ways_round():
    settings = depth.Settings(least=1.0, most=3.0)
    image = torch.rand(3, 8, 12)
    seen = []

    def depths(images):  # (2, 1, 4, 6): left to right, and out of range
        seen.append(images)
        return torch.linspace(0, 5, 6).expand(2, 1, 4, 6)

    found = depth.predict(image, depths, settings)
    row = interpolate(torch.linspace(0, 5, 6).clamp(1, 3)[None, None], 12, mode="linear")[0, 0]
    assert torch.allclose(found, ((row + row.flip(0)) / 2).expand(8, 12), atol=1e-5)
    assert torch.equal(seen[0][1], seen[0][0].flip(-1))


# ---- detection


def test_boxes_follow_their_image_through_scaling_mirroring_and_padding():
    class One:
        def image(self, index):
            return torch.stack([pixels] * 3)

        def annotation(self, index):
            return detection.Boxes(torch.tensor([[0.25, 0.5, 0.5, 0.75]]), torch.tensor([1]), torch.tensor([False]))

    pixels = torch.zeros(20, 40)
    pixels[10:15, 10:20] = 1
    for flipped in (False, True):
        image, boxes = detection.prepare(One(), 0, detection.Settings(size=80), flipped)
        assert image.shape == (3, 64, 96)  # 40 x 80, padded to multiples of 32
        x0, y0, x1, y1 = boxes.boxes[0].int().tolist()
        inside = torch.zeros(64, 96, dtype=torch.bool)
        inside[y0:y1, x0:x1] = True
        bright = image[0] > (0.5 - 0.485) / 0.229
        assert torch.equal(inside, bright) and (x1 - x0, y1 - y0) == (20, 10)


def test_a_box_in_pixels_is_where_the_padded_map_has_it():
    offset = detection._offset(torch.zeros(1, 3, 512, 384), 14)
    assert offset.tolist() == [4, 3, 4, 3]  # 384 to 392, 512 to 518


@pytest.mark.parametrize("left_out", [0, 1, 2])
@pytest.mark.parametrize("rows, columns", [(8, 8), (37, 28), (5, 7)])
def test_anchors_sit_on_the_cells_that_they_belong_to(rows, columns, left_out):
    head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8 * 49, 16))
    sizes = {"width": 8, "hidden": 16, "proposals": 16, "candidates": (20, 20, 20, 20)}
    detector = MapDetector(8, 2, (2, 4, 8, 16, 32)[left_out:], head, **sizes).eval()
    with torch.no_grad():
        levels = list(detector.rcnn.backbone(torch.randn(1, 8, rows, columns)).values())
        detector(torch.randn(1, rows, columns, 8))
    images = type("Images", (), {"image_sizes": [(16 * rows, 16 * columns)]})()
    (anchors,) = detector.rcnn.rpn.anchor_generator(images, levels)
    start = 0
    strides, sides = (4, 8, 16, 32, 64)[left_out:], (32, 64, 128, 256, 512)[left_out:]
    for level, stride, side in zip(levels, strides, sides, strict=True):
        count = 3 * level.shape[-2] * level.shape[-1]
        own = anchors[start : start + count].view(level.shape[-2], level.shape[-1], 3, 4)
        centers = (own[..., :2] + own[..., 2:]) / 2
        assert torch.allclose(centers[0, :, 0, 0], stride * torch.arange(float(level.shape[-1])), atol=0.6)
        square = own[0, 0, 1]
        assert (square[2:] - square[:2]).tolist() == [side, side]
        start += count
    assert start == len(anchors)
    assert detector.rcnn.roi_heads.box_roi_pool.scales == [1 / stride for stride in strides[:-1]]
