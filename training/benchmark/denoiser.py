"""Stage 2 on synthetic features whose clean maps are known: error on unseen maps, all architectures (Tab. 6).

python -m training.benchmark denoiser                        two minutes of training for each: ten in all
python -m training.benchmark denoiser --seconds 20 --channels 64 --grid 12      a first look
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import timm
import torch

from timm_dvt.architectures import ARCHITECTURES
from timm_dvt.options import at_least
from training import train_denoiser
from training.benchmark._scenes import REGIMES, relative_error
from training.benchmark._synthetic_pairs import MODELS, World
from training.common.command import command_parser, positive, whole


def unseen_error(folder: Path | None, world: World, first: int, count: int) -> float:
    """Mean relative error over images first to first + count - 1 of the denoiser in a folder; None: of raw maps."""
    denoiser: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().denoiser if folder else None
    grid = (world.regime.grid, world.regime.grid)
    errors = []
    for image in range(first, first + count):
        maps = world.maps(image)
        features = maps["raw"]
        if denoiser is not None:
            with torch.no_grad():
                features = denoiser(features.flatten(0, 1)[None], grid)[0].unflatten(0, grid)
        errors.append(relative_error(features, maps["clean"]))
    return sum(errors) / len(errors)


def train(folder: Path, pairs: Path, model: str, arch: str, steps: int, options: list[str]) -> float:
    """One run of the command with its defaults but for its length; returns its pairs a second."""
    command = ["--pairs", str(pairs), "--model", model, "--no-pretrained", "--out", str(folder), "--arch", arch]
    length = ["--steps", str(steps)] if ARCHITECTURES[arch].trains else []
    with redirect_stdout(io.StringIO()):  # how to load what is deleted here
        failed = train_denoiser.main([*command, *length, *options])
    if failed:
        raise SystemExit(f"training {arch} failed")
    log = folder / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return next((line["images_per_second"] for line in reversed(lines) if "images_per_second" in line), 0.0)


def main(argv: list[str]) -> int:
    parser = command_parser("benchmark denoiser", __doc__)
    parser.add_argument("--seconds", type=at_least(0, float), default=120, help="of training, for each (120)")
    parser.add_argument("--archs", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument(
        "--regime",
        choices=list(REGIMES),
        default="blobby, high",
        metavar="REGIME",
        help=f"one of: {'; '.join(REGIMES)}".replace("%", "%%"),
    )
    parser.add_argument("--pairs", type=positive, default=300, help="to train on (300)")
    parser.add_argument("--unseen", type=positive, default=50, help="maps that errors are taken on (50)")
    parser.add_argument("--channels", type=int, choices=list(MODELS), default=192)
    parser.add_argument("--grid", type=at_least(2), default=14, help="patches a side (14)")
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="after --: options of training.train_denoiser")
    args = parser.parse_args(argv)
    options = [option for option in args.options if option != "--"]
    world = World(dataclasses.replace(REGIMES[args.regime], channels=args.channels, grid=args.grid), args.seed)
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        model = world.write(where / "pairs", args.pairs)
        raw = unseen_error(None, world, args.pairs, args.unseen)
        print(
            f"{args.regime}; C={args.channels}, K={args.grid}, {args.pairs} pairs, seed {args.seed}; "
            f"relative error of {args.unseen} unseen maps, up to a constant",
            flush=True,
        )
        print(f"{'architecture':14}{'error':>8}{'raw / it':>10}{'steps':>8}{'pairs/s':>9}")
        print(f"{'raw':14}{raw:8.4f}{1:10.1f}", flush=True)
        errors = {}
        for arch in args.archs:
            steps = 1
            if ARCHITECTURES[arch].trains:
                rate = train(where / f"{arch}-trial", where / "pairs", model, arch, 5, options)
                steps = max(5, round(args.seconds * rate / 64))
            rate = train(where / arch, where / "pairs", model, arch, steps, options)
            errors[arch] = unseen_error(where / arch, world, args.pairs, args.unseen)
            print(f"{arch:14}{errors[arch]:8.4f}{raw / errors[arch]:10.1f}{steps:8d}{rate:9.0f}", flush=True)
    missed = []
    if "block" in errors:
        if raw < 5 * errors["block"]:
            missed.append(f"block cuts the error {raw / errors['block']:.1f} times only")
        missed += [
            f"block {errors['block']:.4f} is not better than {arch} {errors[arch]:.4f}"
            for arch in ("conv1x1", "conv3x3")
            if arch in errors and errors["block"] >= errors[arch]
        ]
        print("bars (block: 5x over raw; better than both convolutions): " + ("; ".join(missed) or "all met"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
