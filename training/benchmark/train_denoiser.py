"""What training.train_denoiser costs beside its arithmetic: its pairs a second against a bare PyTorch loop.

    python -m training.benchmark train_denoiser                 --channels 384 --grid 16 for a larger case

The bare loop has the first 20 of the same batches in memory, as float32, and does forward, Eq. 11, backward and AdamW
and nothing else. The two take turns, a stretch of steps each, long enough for the wait for the first batch to count for
little, no validation among them, and each turn's rates are compared with each other. "read" reads
every pair from disk each time, "kept" has read them before, as from the second epoch on where there is room.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from timm_dvt.loading import pick_device
from timm_dvt.options import at_least
from training.benchmark._hardware import hardware
from training.benchmark._scenes import REGIMES
from training.benchmark._synthetic_pairs import MODELS, World
from training.common.command import command_parser, positive
from training.common.memory import keep_freed_memory
from training.loop.distance import norm_distance
from training.loop.optimization import make_adamw, set_learning_rate
from training.loop.order import positions
from training.loop.settings import Pace
from training.pairs.reader import PairReader, PairSet, open_pairs
from training.stage2.denoisers import make_denoisers
from training.stage2.train import Stage2Settings, Stage2Training

BAR = 0.95


def ours(
    pairs: PairSet, settings: Stage2Settings, folder: Path, device: torch.device, make_reader: Callable[..., PairReader]
) -> float:
    """Pairs a second of the command's own loop, log, checks and all."""
    Stage2Training(pairs, settings, device, make_reader=make_reader).run(folder, Pace(None, 10**9, 10**9))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["images_per_second"] for line in lines if "images_per_second" in line][-1]


def bare(pairs: PairSet, settings: Stage2Settings, batches: list[torch.Tensor]) -> float:
    """Pairs a second of nothing but the arithmetic, on batches (2, B, 1, N, C) float32 in the device's memory."""
    (denoiser,) = make_denoisers(pairs, settings.arch, settings.blocks, settings.seed).values()
    denoiser.to(batches[0].device)
    optimizer = make_adamw(denoiser, settings.lr, settings.weight_decay)
    start = time.perf_counter()
    for step in range(settings.steps):
        set_learning_rate(optimizer, settings.schedule.rate(step))
        raw, clean = batches[step % len(batches)]
        loss = norm_distance(denoiser(raw[:, 0], pairs.grid), clean[:, 0]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    loss.item()  # which waits for a GPU
    return settings.steps * settings.batch_size / (time.perf_counter() - start)


def main(argv: list[str]) -> int:
    parser = command_parser("benchmark train_denoiser", __doc__)
    parser.add_argument("--channels", type=int, choices=list(MODELS), default=192)
    parser.add_argument("--grid", type=at_least(2), default=14, help="patches a side (14)")
    parser.add_argument("--steps", type=positive, default=60, help="of each turn (60)")
    parser.add_argument("--rounds", type=positive, default=4, help="turns of each (4)")
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--device", default="cpu", help="where to train (%(default)s)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    keep_freed_memory()  # as the command does
    settings = Stage2Settings(steps=args.steps, batch_size=args.batch_size, val_fraction=0.0, start="random")
    world = World(dataclasses.replace(REGIMES["blobby, high"], channels=args.channels, grid=args.grid))
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        world.write(where / "pairs", 2 * args.batch_size)
        pairs = open_pairs(where / "pairs")
        reader = PairReader(pairs)
        count = len(pairs.files)
        batches = [
            reader.read(positions(count, step * args.batch_size, (step + 1) * args.batch_size, settings.seed)).float()
            for step in range(min(args.steps, 20))
        ]
        batches = [batch.to(device) for batch in batches]
        bare(pairs, dataclasses.replace(settings, steps=2), batches)
        readers: dict[str, Callable[..., PairReader]] = {
            "read": functools.partial(PairReader, cache_bytes=0),
            "kept": PairReader,
        }
        ratios: dict[str, list[float]] = {kind: [] for kind in readers}
        print(f"C={args.channels}, K={args.grid}, batches of {args.batch_size}, {hardware(device)}")
        for turn in range(args.rounds):
            for kind, make in readers.items():
                rates = ours(pairs, settings, where / f"{kind}-{turn}", device, make), bare(pairs, settings, batches)
                ratios[kind].append(rates[0] / rates[1])
                print(
                    f"  {kind}: ours {rates[0]:.1f} pairs/s, bare {rates[1]:.1f}, ratio {ratios[kind][-1]:.3f}",
                    flush=True,
                )
    medians = {kind: statistics.median(values) for kind, values in ratios.items()}
    medians["ten epochs"] = 10 / (1 / medians["read"] + 9 / medians["kept"])  # the default run, where there is room
    for kind, median in medians.items():
        print(f"{kind}: median {median:.3f} (bar {BAR}: {'pass' if median >= BAR else 'miss'})")
    return 0 if medians["ten epochs"] >= BAR else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
