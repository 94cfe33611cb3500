"""The mean map of many images: what anybody tries first.

G(p) = mean over images of the tokens at place p, minus the mean over places; F = y - G. No paper's. `static` is the
same with another estimate of G: it takes out what windows of one image share, shrinks G by what is not known of it,
and levels blank images.
"""

from typing import Any

from timm_dvt.attach import attach_denoiser
from timm_dvt.calibration.linear import subtracting
from training.rivals.sample import Sample


def fit(model: Any, sample: Sample) -> str:
    """Give the model the denoiser, in place; returns what was learned, in words."""
    mean_map = sample.moments.mean_map
    attach_denoiser(model, subtracting(mean_map - mean_map.mean((0, 1))))
    return f"the mean of {sample.views} crops"
