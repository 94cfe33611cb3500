"""How long the denoisers of --train take to make here, from timed samples of both stages."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_dvt.image_files import list_images
from timm_dvt.loading import pick_device
from timm_dvt.options import add_options, build
from training.common.command import add_model_arguments
from training.common.models import load_backbone
from training.common.recipes import add_recipe
from training.loop.distributed import ALONE
from training.loop.settings import TrainingSettings
from training.pairs.reader import PairSet
from training.reproduction.jobs import Job
from training.stage1.cost import seconds_of
from training.stage1.decompose import decompose
from training.stage1.images import STAGE1
from training.stage1.settings import Stage1Settings
from training.stage2.denoisers import make_denoisers
from training.stage2.train import STAGE2, Stage2Settings

VIEWS_TIMED, STEPS_TIMED = 8, 20
BACKWARD = 3  # forward passes that a step costs


def seconds_to_make(job: Job) -> float:
    """Of one of the jobs that an evaluation needs.

    Raises:
        ValueError, TypeError: the model cannot be had, or has no weights; or the images are missing.
    """
    if job.command[0] == "training.denoise_images":
        return _stage1(job.command[1:])
    return _stage2(job.command[1:], job.needs[0].command[1:])


def _stage1(words: Sequence[str]) -> float:
    """Of all images."""
    args = _parse(words, STAGE1, Stage1Settings)
    settings = build(STAGE1[args.recipe], args)
    return _an_image(args.model, args.pretrained, args.seed, args.device, settings) * len(list_images(args.images))


@lru_cache(maxsize=8)  # lists of images differ, the rest does not
def _an_image(name: str, pretrained: bool, seed: int, device: str | None, settings: Stage1Settings) -> float:
    """It takes a + b views + c steps of the field, as three decompositions of noise say."""
    model = load_backbone(name, pretrained, seed).to(pick_device(device))
    settings = settings.settled(model)
    image = torch.rand(3, 375, 500)

    def seconds(views: int, steps: int) -> float:
        start = time.perf_counter()
        own = replace(settings, views=views, crops=min(settings.crops, views - 1))
        decompose(model, image, replace(own, field=replace(settings.field, steps=steps)))
        return time.perf_counter() - start

    seconds(VIEWS_TIMED, 2)  # the first one is slower
    base = seconds(VIEWS_TIMED, STEPS_TIMED)
    view = max(seconds(2 * VIEWS_TIMED, STEPS_TIMED) - base, 0) / VIEWS_TIMED
    step = 0.0
    if settings.solver == "field":
        step = max(seconds(VIEWS_TIMED, 2 * STEPS_TIMED) - base, 0) / STEPS_TIMED
    each = base + view * (settings.views - VIEWS_TIMED) + step * (settings.field.steps - STEPS_TIMED)
    return max(each, view * settings.views + step * settings.field.steps)


def _stage2(words: Sequence[str], stage1: Sequence[str]) -> float:
    """Steps of the denoisers on random tokens, of the layers and the grid that stage 1 gives."""
    args, made = _parse(words, STAGE2, TrainingSettings, Stage2Settings), _parse(stage1, STAGE1, Stage1Settings)
    settings = build(STAGE2[args.recipe], args).settled(len(list_images(made.images)), made.images, ALONE)
    device = pick_device(args.device)
    model = load_backbone(args.model, args.pretrained, args.seed)
    reader = build(STAGE1[made.recipe], made).settled(model).reader(model)
    grid = (reader.grid, reader.grid)
    pairs = PairSet(Path(), (), reader.layers, grid, reader.channels, {})
    tokens = torch.rand(settings.batch_size, reader.grid**2, reader.channels, device=device)
    step = 0.0
    for denoiser in make_denoisers(pairs, settings.arch, settings.blocks, 0).values():
        step += BACKWARD * seconds_of(partial(_forward, denoiser.to(device), tokens, grid))
    return step * settings.steps


def _forward(denoiser: nn.Module, tokens: Tensor, grid: tuple[int, int]) -> float:
    return denoiser(tokens, grid).sum().item()


def _parse(words: Sequence[str], recipes: Any, *settings: type) -> argparse.Namespace:
    """The options of a stage that decide how long it takes, with the defaults of its recipe."""
    parser = argparse.ArgumentParser(add_help=False)
    add_model_arguments(parser)
    parser.add_argument("--images")
    for each in settings:
        add_options(parser, each)
    add_recipe(parser, recipes, words)
    return parser.parse_known_args(words)[0]
