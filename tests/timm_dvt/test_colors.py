"""Claims about features as colors, against scikit-learn's PCA and k-means and closed forms."""

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from timm_dvt.viewer.colors import (
    cluster_labels,
    fit_projection,
    heat,
    map_correlation,
    matched_labels,
    norms,
    principal_colors,
    similarity,
)
from timm_dvt.viewer.pairs import scale_of


@pytest.fixture()
def features():
    """(9, 9, 20) features whose components differ clearly in variance."""
    generator = np.random.default_rng(0)
    return generator.normal(size=(9, 9, 20)) * np.linspace(5, 0.1, 20) + generator.normal(size=20) * 10


def test_components_are_those_of_sklearn_up_to_sign(features):
    projection = fit_projection(features)
    wanted = PCA(3, svd_solver="full").fit(features.reshape(-1, 20))
    ours, theirs = projection.components(features).reshape(-1, 3), wanted.transform(features.reshape(-1, 20))
    signs = np.sign((ours * theirs).sum(axis=0))
    np.testing.assert_allclose(ours, theirs * signs, atol=1e-9)


def test_signs_do_not_depend_on_the_order_of_the_patches(features):
    projection = fit_projection(features)
    assert (projection.axes.max(axis=0) == np.abs(projection.axes).max(axis=0)).all()
    mirrored = principal_colors(features[:, ::-1])
    np.testing.assert_allclose(mirrored[:, ::-1], principal_colors(features), atol=1e-9)


def test_an_outlier_token_does_not_take_the_contrast_from_the_rest():
    features = np.random.default_rng(0).normal(size=(16, 16, 20))
    features[3, 5] += 1000
    colors = principal_colors(features)
    assert colors.min() == 0 and colors.max() == 1
    assert (colors.reshape(-1, 3).std(axis=0) > 0.15).all()  # evenly spread values would have 0.29


def test_one_projection_gives_equal_features_equal_colors(features):
    projection = fit_projection(features)
    np.testing.assert_array_equal(projection.colors(features[:3]), projection.colors(features)[:3])


def test_constant_features_are_gray_and_bad_ones_an_error():
    assert (principal_colors(np.full((4, 4, 5), 7.0)) == 0.5).all()
    with pytest.raises(ValueError, match="3 channels or more, got 2"):
        fit_projection(np.zeros((4, 4, 2)))
    with pytest.raises(ValueError, match="finite"):
        fit_projection(np.full((4, 4, 5), np.nan))


def test_clusters_are_found_and_ordered_by_size():
    labels = np.zeros((6, 6), int)
    labels[0], labels[1, :3] = 1, 2
    centers = np.array([[0.0, 0], [10, 0], [0, 10]])
    noise = np.random.default_rng(0).normal(size=(6, 6, 2)) * 0.1
    found, agreement = cluster_labels(centers[labels] + noise, 3)
    np.testing.assert_array_equal(found, labels)
    assert agreement == 1
    with pytest.raises(ValueError, match="clusters must be from 1 to 10, got 11"):
        cluster_labels(noise, 11)
    assert (cluster_labels(np.ones((4, 4, 3)), 5)[0] == 0).all()


def test_groups_by_chance_are_known_by_their_seeds_and_others_are_as_good_as_sklearns():
    noise = np.random.default_rng(0).normal(size=(16, 16, 20))
    assert cluster_labels(noise, 6)[1] < 0.8
    rows = (noise[..., :12] + 3 * np.eye(12)[np.arange(256) % 4].reshape(16, 16, 12)).reshape(-1, 12)
    found, agreement = cluster_labels(rows, 4)
    means = np.stack([rows[found == k].mean(0) for k in range(4)])
    assert agreement > 0.95
    assert ((rows - means[found]) ** 2).sum() == pytest.approx(KMeans(4, n_init=50).fit(rows).inertia_, rel=1e-3)


def test_matched_labels_agree_where_clusterings_agree():
    reference = np.array([[0, 0, 1], [2, 2, 1]])
    renamed = np.array([[2, 2, 0], [1, 1, 0]])
    np.testing.assert_array_equal(matched_labels(renamed, reference), reference)
    fewer = np.array([[1, 1, 0], [1, 1, 0]])
    np.testing.assert_array_equal(matched_labels(fewer, reference)[:, 2], [1, 1])


def test_norm_similarity_and_correlation_by_their_formulas(features):
    np.testing.assert_allclose(norms(features)[2, 3], np.sqrt((features[2, 3] ** 2).sum()))
    cosines = similarity(features, (4, 4))
    a, b = features[4, 4], features[0, 8]
    assert cosines[4, 4] == pytest.approx(1)
    assert cosines[0, 8] == pytest.approx(a @ b / np.sqrt(a @ a * (b @ b)))
    assert map_correlation(features, 3 * features + 5) == pytest.approx(1)
    single = features[..., :1], np.random.default_rng(1).normal(size=(9, 9, 1))
    assert map_correlation(*single) == pytest.approx(np.corrcoef(*(m.ravel() for m in single))[0, 1])


def test_lengths_that_differ_by_rounding_alone_are_of_one_color():
    same = 8 + 1e-6 * np.random.default_rng(0).normal(size=(9, 9))
    assert np.ptp(heat(same, *scale_of([same])), axis=(0, 1)).max() < 1e-4
    apart = np.linspace(8, 8.1, 81).reshape(9, 9)
    assert np.ptp(heat(apart, *scale_of([apart])), axis=(0, 1)).max() > 0.3
