"""Recipes: the settings of all three stages as the paper has them, as its repository has them, and as ours.

`--recipe paper` and `--recipe repository` set the defaults of a command; every other option still overrides. As
instances of their data classes they are in stage1/settings.py, stage2/train.py and stage3/train.py. The repository is
github.com/Jiawei-Yang/Denoising-ViT at its newest commit: main_img_denoising.py (stage 1),
main_denoiser.py and sample_scripts/stage2.sh (stage 2), main_distillation.py and sample_scripts/stage3.sh (stage 3).
A dash says that the source is silent; then ours stands.

    stage 1              paper (4.2, A.1)          repository                     ours, the default
    solver               neural field              neural field                   least squares: 165 to 733 times
                                                                                  faster at no greater error
    views                768                       768                            32 for many images, 64 for pictures
    area of a view       0.1 to 0.5                0.1 to 0.5, of the image       0.1 to 0.5
                                                   resized to a square first
    steps, batch         20,000 x 2,048            25,000 x 2,048                 the paper's
    learning rate        0.01, linear to 0         0.01, 2,500 steps of rise,     the paper's
                                                   cosine to 0.001
    Adam                 -                         eps 1e-15, betas 0.9, 0.99,    torch's, no decay
                                                   weight decay 1e-5
    distance (Eq. 7)     1 - cos + 2-norm          1 - cos + mean squared error   the paper's
    residual (Eq. 8)     2-norm, 1-norm            mean squared error, mean of    the paper's
                                                   absolute values
    G starts at          -                         normal, 0.02                   0
    coordinates          -                         corner-aligned                 patch centers
    kept for stage 2     the whole image           the whole image                8 crops too

    stage 2              paper (4.3, A.2)          repository                     ours, the default
    length               10 epochs at 64           50,000 steps at 8 x 16         10 epochs at 64
    distance (Eq. 11)    1 - cos + 2-norm          1 - cos + mean squared error   the paper's
    learning rate        2e-4, cosine              2e-4 sqrt(batch / 256), 15%    2e-4, cosine to 0
                                                   of rise, cosine to 1e-6
    AdamW's decay        -                         1e-5, on everything            0.01, on matrices
    start                -                         random                         the mean correction
    learned from         whole images              whole images                   crops too, three times of four
    blank images         -                         -                              a gate that levels them

    stage 3              paper                     repository                     ours, the default
    length               -                         5 epochs at 8 x 64             10 epochs at 64
    images               -                         resized to squares, flipped    random crops and flips
    tokens               -                         patches alone                  prefix tokens too
    distance             -                         1 - cos + mean squared error   Eq. 11
    learning rate        -                         2e-4 sqrt(batch / 256), 15%    the repository's, to 0
                                                   of rise, cosine to 1e-6
    AdamW's decay        -                         1e-5, on everything            1e-5, on matrices

10 epochs of 10,000 pairs at 64 are 1,563 steps; the repository's 50,000 steps at 128 are 640 epochs. Two things are not
copied: the repository's rise begins at 0 and ours at the first step's share of the peak, and its stage 3 runs the
student in training mode, which in these ViTs changes nothing. Ours decays matrices alone, as timm does, starts a
block at the best fixed map because a short run would else be over before the artifacts are learned
(training/stage2/starts.py), and trains prefix tokens so that a classifier goes on working.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

NAMES = ("ours", "paper", "repository")


def add_recipe(parser: argparse.ArgumentParser, recipes: Mapping[str, Any], argv: Sequence[str] | None) -> None:
    """Give a command line --recipe, and the defaults of the one that it names. To be called after all other options.

    Args:
        recipes: by each of the names, settings. argv: the command line; None is the process's own.
    """
    first = argparse.ArgumentParser(add_help=False)  # knows abbreviations, as the other one does
    says = "defaults of the options above; see training/common/recipes.py"
    for each in (parser, first):
        each.add_argument("--recipe", choices=NAMES, default="ours", help=says)
    known, _ = first.parse_known_args(argv)
    parser.set_defaults(**_defaults(recipes[known.recipe]))


def _defaults(settings: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    for item in fields(settings):
        value = getattr(settings, item.name)
        if is_dataclass(value):
            defaults |= _defaults(value)
        elif item.metadata:
            defaults[item.metadata.get("dest", item.name)] = value
    return defaults
