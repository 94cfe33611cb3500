"""Whether a set of views can tell F and G apart at all, before and after solving."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from timm_dvt.errors import UserError

LEAST_VIEWS = 3  # different ones, with which F and G can be told apart at all


class IllConditioned(UserError, RuntimeError):
    """The views cannot tell F and G apart; the message says what to change."""


def check_views(xs: Tensor, ys: Tensor) -> None:
    """Judge views by their geometry alone, so before a single forward pass.

    With shifted crops F and G differ by no more than a constant, with crops of different sizes and with flips
    they also differ clearly; views that all show one box differ in nothing, and F + G is all that is known.

    Args:
        xs, ys: (V, K) from `training.common.views.view_axes`.

    Raises:
        IllConditioned: fewer than three different crops.

    Warns:
        UserWarning: fewer than eight different crops, or all of one size.
    """
    sides = torch.stack([xs.amin(1), ys.amin(1), xs.amax(1) - xs.amin(1), ys.amax(1) - ys.amin(1)], 1)
    different = len(torch.unique((sides * 4096).round(), dim=0))
    if different < LEAST_VIEWS:
        raise IllConditioned(
            f"{len(xs)} views show {different} different crop{'s' * (different > 1)}: F and G cannot be told "
            "apart; use more views (8 at the very least, 768 in the paper), of different places and sizes, and an "
            "image large enough to have them"
        )
    if different < 8:
        warnings.warn(
            f"only {different} different crops: F and G will be poor estimates; use at least 8 views, "
            "better 64 or more",
            stacklevel=4,
        )
    # The whole image is one of the views; it alone is no variation of scale.
    widths, heights = (side.sort().values[: max(2, len(xs) - 1)] for side in (sides[:, 2], sides[:, 3]))
    if widths[-1] < 1.05 * widths[0] and heights[-1] < 1.05 * heights[0]:
        warnings.warn(
            "all crops have the same size: slow changes across the image are hard to tell from slow changes "
            "across the patches; draw crops of different areas",
            stacklevel=4,
        )


def separation(patch_factor: Tensor, ridge: float, weight: float) -> float:
    """How well the worst-determined pattern of G is known from the data, 1 being as if F were known.

    The smallest eigenvalue of G's Schur complement without its own penalty, per view, over all patterns with
    zero mean (the constant is never determined); by a few steps of subspace iteration.

    Args:
        patch_factor: (K * K, K * K) lower Cholesky factor of the complement, penalty included.
        ridge: that penalty.
        weight: mean number of views a patch was seen in.
    """
    draw = torch.Generator().manual_seed(0)
    basis = torch.randn(len(patch_factor), 4, dtype=torch.float64, generator=draw).to(patch_factor.device)
    for _ in range(12):
        basis = torch.linalg.qr(basis - basis.mean(0)).Q
        basis = torch.cholesky_solve(basis, patch_factor)
    basis = torch.linalg.qr(basis - basis.mean(0)).Q
    largest = torch.linalg.eigvalsh(basis.T @ torch.cholesky_solve(basis, patch_factor))[-1]
    return max(0.0, (1 / float(largest) - ridge) / weight)


def warn_if_inseparable(share: float, uncertainty: float, unseen: float) -> None:
    """Warn about a poor solution.

    Args:
        share: its `separation`. A low one alone is harmless where there is next to no noise.
        uncertainty: standard deviation of G's worst-determined pattern, as a share of the features' spread.
        unseen: share of the image that no view shows.
    """
    if share < 0.05 and uncertainty > 0.05:
        warnings.warn(
            f"F and G are hardly told apart by these views (separation {share:.3f} of 1): use more views, of "
            "more different places and sizes",
            stacklevel=3,
        )
    if unseen > 0.25:
        warnings.warn(
            f"no view shows {unseen:.0%} of the image: F is extrapolated there; use more views, or include "
            "the whole image",
            stacklevel=3,
        )
