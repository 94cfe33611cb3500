"""The numbers of each task against cases worked out by hand, loops over the definitions and other libraries."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from torch.nn.functional import interpolate

from timm_dvt.viewer.colors import map_correlation
from training.evaluate import attentive_probe
from training.evaluate.data.splits import Boxes
from training.evaluate.depth import linear as depth
from training.evaluate.detection import fast as detection
from training.evaluate.detection.average_precision import Detections, voc_map
from training.evaluate.detection.detector import SimplePyramid, fixed_positions
from training.evaluate.discovery import is_correct, lost
from training.evaluate.position import share as position
from training.evaluate.segmentation import knn as knn_seg
from training.evaluate.segmentation import linear as linear_seg
from training.evaluate.segmentation.score import SegmentationScore

# ---- segmentation


def test_miou_macc_aacc_by_hand_with_ignored_pixels():
    score = SegmentationScore(4)
    true = torch.tensor([[0, 0, 1], [1, 255, 255]], dtype=torch.uint8)
    score.add(torch.tensor([[0, 1, 1], [1, 0, 3]]), true)
    # class 0: 1 of 2 found, IoU 1/2; class 1: both found and one too many, IoU 2/3; 2 and 3 occur nowhere counted.
    numbers = score.numbers()
    assert numbers["mIoU"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    assert numbers["mAcc"] == pytest.approx(100 * (1 / 2 + 1) / 2)
    assert numbers["aAcc"] == pytest.approx(75)


def test_miou_agrees_with_scikit_learn_over_several_images():
    score, predictions, truths = SegmentationScore(5), [], []
    for _ in range(3):
        predictions.append(torch.randint(0, 5, (9, 7)))
        truths.append(torch.randint(0, 5, (9, 7)))
        score.add(predictions[-1], truths[-1])
    want = jaccard_score(torch.stack(truths).flatten(), torch.stack(predictions).flatten(), average="macro")
    assert score.numbers()["mIoU"] == pytest.approx(100 * want)


def test_a_linear_layer_on_resized_maps_is_the_layer_on_the_maps_resized_afterwards():
    head = linear_seg.LinearHead(8, 3, batch_norm=False)
    maps = torch.randn(2, 5, 5, 8)
    resized = interpolate(maps.permute(0, 3, 1, 2), (20, 30), mode="bilinear", align_corners=False)
    assert torch.allclose(head(maps, (20, 30)), head.linear(resized), atol=1e-5)


def test_class_weights_count_each_patchs_pixels():
    mask = torch.zeros(4, 4, dtype=torch.uint8)
    mask[0, 0], mask[3, 3], mask[2:, :2] = 1, 255, 2
    want = [[3, 4, 0, 3], [1, 0, 0, 0], [0, 0, 4, 0]]
    assert knn_seg.class_weights(mask, 2, 3).tolist() == want


def test_k_nearest_neighbors_vote_and_cosines_break_ties():
    bank = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [-1.0, 0.0]]))
    labels = torch.tensor([0, 0, 1, 1, 2])
    queries = torch.tensor([[5.0, 0.1], [0.1, 2.0], [1.0, 0.9]])
    assert knn_seg.nearest_class(queries, bank, labels, 3, 3).tolist() == [0, 1, 0]
    assert knn_seg.nearest_class(queries, bank, labels, 4, 3).tolist() == [0, 1, 0]  # two votes each: cosines decide
    assert knn_seg.nearest_class(queries, bank, labels, 99, 3).shape == (3,)


def test_k_nearest_neighbors_agree_with_scikit_learn_where_votes_differ():
    from sklearn.neighbors import KNeighborsClassifier

    bank = torch.nn.functional.normalize(torch.randn(60, 6))
    labels = torch.randint(0, 2, (60,))
    queries = torch.nn.functional.normalize(torch.randn(40, 6))
    reference = KNeighborsClassifier(7, metric="cosine", algorithm="brute").fit(bank.numpy(), labels.numpy())
    found = knn_seg.nearest_class(queries, bank, labels, 7, 2)  # odd k, two classes: no ties
    assert found.tolist() == reference.predict(queries.numpy()).tolist()


# ---- discovery


def fabricated_object(height=10, width=12, box=(3, 2, 8, 6)):
    """Features whose object points one way and has large norms, and whose ground points the other way."""
    features = torch.zeros(height, width, 8)
    features[..., 0] = -1
    x0, y0, x1, y1 = box
    features[y0:y1, x0:x1, 0] = 3
    features += 0.05 * torch.randn(height, width, 8)
    want = torch.tensor([x0 / width, y0 / height, x1 / width, y1 / height], dtype=torch.float64)
    return features, want


@pytest.mark.parametrize("indicator", ["norm", "degree"])
@pytest.mark.parametrize("center", [False, True])
def test_lost_finds_a_known_box(indicator, center):
    features, want = fabricated_object()
    assert torch.equal(lost(features, 10, indicator, center), want)


def test_lost_takes_the_component_that_holds_the_seed():
    features, want = fabricated_object()
    features[8:, 10:, 0] = 2.5  # of the same kind, elsewhere, of smaller norm
    assert torch.equal(lost(features, 10), want)


def test_lost_follows_the_published_definition_step_by_step():
    for trial in range(20):
        torch.manual_seed(trial)
        features = torch.randn(7, 6, 4).double()
        tokens = features.reshape(-1, 4).numpy()
        products = tokens @ tokens.T
        degree = (products >= 0).sum(1)
        seed = int(degree.argmin())
        pool = np.argsort(degree, kind="stable")[:9]
        expanded = [q for q in pool if products[seed, q] >= 0]
        mask = {p for p in range(42) if sum(products[p, s] for s in expanded) >= 0}
        component, border = {seed}, [seed]
        while border:
            row, column = divmod(border.pop(), 6)
            for r, c in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if 0 <= r < 7 and 0 <= c < 6 and 6 * r + c in mask - component:
                    component.add(6 * r + c)
                    border.append(6 * r + c)
        rows, columns = zip(*(divmod(p, 6) for p in component))
        want = [min(columns) / 6, min(rows) / 7, (max(columns) + 1) / 6, (max(rows) + 1) / 7]
        assert lost(features, 9, "degree").tolist() == pytest.approx(want), trial


def test_corloc_needs_more_than_half_of_the_union():
    box = torch.tensor([0.0, 0.0, 0.5, 1.0])
    assert not is_correct(box, torch.tensor([[0.0, 0.0, 1.0, 1.0]]))  # exactly 0.5
    assert is_correct(box, torch.tensor([[0.9, 0.9, 1.0, 1.0], [0.0, 0.0, 0.49, 1.0]]))


# ---- detection


def boxes(corners, classes, difficult=None):
    return Boxes(
        torch.tensor(corners, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(classes, dtype=torch.int64),
        torch.tensor(difficult or [False] * len(classes)),
    )


def detections(corners, classes, scores):
    return Detections(torch.tensor(corners).reshape(-1, 4), torch.tensor(classes), torch.tensor(scores))


LEFT, RIGHT, AWAY = [0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.0, 0.8, 0.1, 0.9]


def test_map_by_hand():
    true = [boxes([LEFT, RIGHT], [0, 0])]
    found = [detections([LEFT, AWAY, RIGHT], [0, 0, 0], [0.9, 0.8, 0.7])]
    # hit, miss, hit: precision 1 up to recall 1/2, then 2/3.
    numbers = voc_map(found, true, 1)
    assert numbers["mAP"] == pytest.approx(100 * (0.5 * 1 + 0.5 * 2 / 3))
    assert numbers["mAP_11"] == pytest.approx(100 * (6 * 1 + 5 * 2 / 3) / 11)


def test_map_counts_second_hits_as_misses_and_difficult_objects_not_at_all():
    true = [boxes([LEFT, RIGHT], [0, 0], [False, True])]
    twice = [detections([LEFT, RIGHT, LEFT], [0, 0, 0], [0.9, 0.8, 0.7])]
    assert voc_map(twice, true, 1)["mAP"] == pytest.approx(100)
    wrong_first = [detections([AWAY, RIGHT, LEFT, LEFT], [0, 0, 0, 0], [0.9, 0.8, 0.7, 0.6])]
    assert voc_map(wrong_first, true, 1)["mAP"] == pytest.approx(50)


def test_map_ranks_over_all_images_and_averages_over_classes_with_objects():
    true = [boxes([LEFT], [0]), boxes([RIGHT], [0]), boxes([LEFT], [2])]
    found = [
        detections([LEFT, AWAY], [0, 1], [0.5, 0.99]),
        detections([AWAY, RIGHT], [0, 0], [0.9, 0.4]),
        detections([], [], []),
    ]
    # class 0: miss, hit, hit: best precision from either hit on is 2/3; class 1 has no object; class 2 is never found.
    assert voc_map(found, true, 3)["mAP"] == pytest.approx(100 * (2 / 3 + 0) / 2)


def test_map_agrees_with_torchmetrics_where_its_101_points_do_not_matter():
    from torchmetrics.detection import MeanAveragePrecision

    reference = MeanAveragePrecision(iou_thresholds=[0.5])
    true = [boxes([LEFT, RIGHT], [0, 1]), boxes([AWAY], [1]), boxes([RIGHT], [0])]
    found = [
        detections([LEFT, RIGHT, AWAY], [0, 1, 1], [0.9, 0.8, 0.95]),
        detections([AWAY], [1], [0.7]),
        detections([RIGHT, AWAY], [0, 0], [0.6, 0.99]),
    ]
    reference.update(
        [{"boxes": d.boxes * 100, "labels": d.classes, "scores": d.scores} for d in found],
        [{"boxes": b.boxes * 100, "labels": b.classes} for b in true],
    )
    assert voc_map(found, true, 2)["mAP"] == pytest.approx(100 * float(reference.compute()["map"]), abs=0.5)


def test_the_pyramid_has_four_scales_and_one_more():
    levels = SimplePyramid(16, 8)(torch.randn(1, 16, 6, 6))
    assert [tuple(level.shape[1:]) for level in levels.values()] == [
        (8, 24, 24),
        (8, 12, 12),
        (8, 6, 6),
        (8, 3, 3),
        (8, 2, 2),
    ]
    coarse = SimplePyramid(16, 8, levels=3)(torch.randn(1, 16, 6, 6))
    assert [tuple(level.shape[1:]) for level in coarse.values()] == [(8, 6, 6), (8, 3, 3), (8, 2, 2)]


def test_fixed_positions_tell_places_apart_and_are_the_same_at_each_call():
    positions = fixed_positions(5, 18)
    assert torch.equal(positions, fixed_positions(5, 18)) and not positions[..., 16:].any()
    assert torch.pdist(positions.flatten(0, 1)).min() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("finest", [4, 2, 1])
def test_the_detector_learns_objects_that_the_maps_show(finest):
    """One object an image, its class a channel of the map. A property, not a score: the loss falls to a third."""
    settings = detection.Settings(width=16, hidden=32, proposals=32, candidates=50, finest=finest)
    draw = torch.Generator().manual_seed(0)
    maps, targets = torch.zeros(8, 8, 8, 4), []
    for one in maps:
        x, y, label = (int(torch.randint(high, (), generator=draw)) for high in (5, 5, 2))
        one[y : y + 3, x : x + 3, label] = 3.0
        targets.append({"boxes": torch.tensor([[x, y, x + 3, y + 3]]) * 8.0, "labels": torch.tensor([label + 1])})
    torch.manual_seed(0)
    detector = detection.Detector(4, 2, grid=8, input_size=64, settings=settings)
    optimizer = torch.optim.AdamW(detector.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = sum(detector(maps, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < losses[0] / 3, losses
    detector.eval()
    with torch.no_grad():
        best = [found["labels"][found["scores"].argmax()] for found in detector(maps) if len(found["scores"])]
    assert len(best) == 8


# ---- depth


def test_depth_numbers_by_hand_within_crop_and_range():
    true = torch.full((480, 640), 2.0)
    true[100, 100:300] = 0  # unknown
    predicted = torch.full((480, 640), 2.4)
    predicted[:45], predicted[471:], predicted[:, :41], predicted[:, 601:] = 9, 9, 9, 9  # outside of the crop
    predicted[200, 41:601] = 4.0  # one row of 560 of the crop's 426 * 560 - 200 counted pixels
    counted, off = 426 * 560 - 200, 560
    numbers = depth.depth_numbers(predicted, true, depth.Settings())
    assert numbers["AbsRel"] == pytest.approx((0.2 * (counted - off) + 1.0 * off) / counted, rel=1e-6)
    assert numbers["RMSE"] == pytest.approx(math.sqrt((0.16 * (counted - off) + 4.0 * off) / counted), rel=1e-6)
    assert numbers["delta1"] == pytest.approx(100 * (counted - off) / counted)  # 1.2 < 1.25; 2 > 1.25^3
    assert numbers["delta3"] == numbers["delta1"]


def test_without_eigens_crop_all_pixels_of_known_depth_count():
    true = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    numbers = depth.depth_numbers(torch.full((2, 2), 2.0), true, depth.Settings(eigen_crop=False))
    assert numbers["AbsRel"] == pytest.approx((1 + 0 + 0.5) / 3) and numbers["delta1"] == pytest.approx(100 / 3)


def test_depth_bins_are_uniform_and_their_centers_come_back():
    settings = depth.Settings(bins=4, least=0.0, most=8.0)
    values = torch.tensor([0.0, 1.9, 2.0, 7.9, 8.0, 8.1, -1.0])
    assert depth.depth_bins(values, settings).tolist() == [0, 0, 1, 3, 3, -1, -1]
    head = depth.DepthHead(3, settings)
    logits = torch.full((1, 4, 1, 1), -50.0)
    logits[:, 2] = 50
    assert head.depth(logits).item() == pytest.approx(5)  # of the bin from 4 to 6


def test_the_class_token_is_appended_to_every_patch_token():
    head = depth.DepthHead(5, depth.Settings(bins=2))
    maps, token = torch.randn(1, 2, 2, 3), torch.randn(1, 2)
    whole = torch.cat([maps[0, 0, 0], token[0]])
    want = head.linear.weight[:, :, 0, 0] @ whole + head.linear.bias
    assert torch.allclose(head(maps, token)[0, :, 0, 0], want, atol=1e-6)  # at the corner nothing is interpolated


# ---- attentive probe and position


def test_the_attentive_probe_pools_by_softmax_attention_of_one_query():
    probe = attentive_probe.AttentiveProbe(8, 3, heads=2).eval()
    tokens = torch.randn(2, 5, 8)
    normed = tokens / math.sqrt(1 + 1e-6)  # running mean 0, variance 1
    pooled = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        key, value = probe.key(normed)[..., part], probe.value(normed)[..., part]
        attention = (key @ probe.query[0, 0, part] / 2).softmax(1)
        pooled.append((attention[..., None] * value).sum(1))
    assert torch.allclose(probe(tokens), probe.classify(torch.cat(pooled, 1)), atol=1e-5)


def test_position_share_is_zero_by_chance_and_one_for_equal_maps():
    assert abs(position.position_share(torch.randn(50, 6, 6, 32))) < 0.01
    assert position.position_share(torch.randn(1, 6, 6, 4).expand(5, -1, -1, -1)) == pytest.approx(1)
    # Signal of variance 1 that the place decides, noise of variance 3: a quarter.
    maps = torch.randn(1, 8, 8, 64) + math.sqrt(3) * torch.randn(400, 8, 8, 64)
    assert position.position_share(maps) == pytest.approx(0.25, abs=0.02)


def test_position_statistics_do_not_depend_on_batches():
    maps = torch.randn(10, 4, 4, 3) + torch.randn(4, 4, 3)
    statistics = position.PositionStatistics()
    statistics.add(maps[:3])
    statistics.add(maps[3:])
    assert statistics.share() == pytest.approx(position.position_share(maps))
    assert torch.allclose(
        statistics.mean_map(), (maps.double() - maps.double().mean((1, 2), keepdim=True)).mean(0).flatten(0, 1)
    )


def test_correlation_is_pearsons():
    first, second = torch.randn(9, 1).numpy(), torch.randn(9, 1).numpy()
    want = np.corrcoef(first[:, 0], second[:, 0])[0, 1]
    assert map_correlation(first, second) == pytest.approx(want)
