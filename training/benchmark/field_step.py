"""What a step of the neural field costs beside the same step with dense Adam over all tables, at what error.

    python -m training.benchmark field_step

Times are at the paper's settings (A.1), by the clock and of the processor (all threads together), which a busy
machine disturbs less. Each variant trains in a process of its own, for what one leaves in memory and caches slows the
next; they take turns, and of each one's turns the fastest counts. A turn is the median of its steps.
"touched" is the solver's own step. "dense Adam" is the same step, losses and precision of the MLPs included, with
autograd's dense gradient of the tables and torch.optim.Adam as it comes, which takes 79 MB several times a step anew
from the system. "memory kept" is that with an allocator told to keep what is freed (`training.common.memory`),
"fused" that with Adam's fused=True kernel instead. The errors are means over seeds, for the solver's step in float32
too.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor

from training.common.memory import keep_freed_memory
from training.stage1.field.field import FieldSettings, FieldTraining
from training.stage1.field.hashgrid import HashGrid


class DenseTrainer:
    """The grid's trainer as PyTorch has it: a dense gradient, and Adam over every entry of every table."""

    def __init__(self, grid: HashGrid, fused: bool) -> None:
        self.grid = grid
        self.adam = torch.optim.Adam([grid.params], fused=fused)

    def encode(self, coords: Tensor) -> Tensor:
        return self.grid(coords)

    def step(self, learning_rate: float) -> None:
        self.adam.param_groups[0]["lr"] = learning_rate
        self.adam.step()
        self.adam.zero_grad()

    def finish(self) -> HashGrid:
        return self.grid


WARM_UP, MEASURED = 8, 15  # steps
VARIANTS = ("touched", "touched, float32", "dense Adam", "dense Adam, memory kept", "dense Adam, fused")
Times = tuple[float, float]  # milliseconds by the clock, of the processor


def training_of(
    variant: str, channels: int, grid: int, settings: FieldSettings, seed: int = 0
) -> FieldTraining:
    """A training of that variant; all of one seed start from the same parameters."""
    if variant == "touched, float32":
        settings = dataclasses.replace(settings, precision="float32")
    training = FieldTraining(channels, grid**2, settings, seed, device=torch.device("cpu"))
    if variant.startswith("dense"):
        training.grid_trainer = DenseTrainer(training.grid, fused=variant.endswith("fused"))
    return training


def measure_steps(channels: int, grid: int, rounds: int, threads: int) -> dict[str, list[Times]]:
    """What a step takes in the first and in the second phase, by variant: the least of the rounds."""
    turns: dict[str, list[list[Times]]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            arguments = json.dumps([variant, channels, grid, threads])
            command = [sys.executable, "-m", "training.benchmark.field_step", arguments]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            turns[variant].append(json.loads(output.splitlines()[-1]))
    return {
        variant: [tuple(map(min, zip(*phase, strict=True))) for phase in zip(*taken, strict=True)]
        for variant, taken in turns.items()
    }


def one_turn(variant: str, channels: int, grid: int, threads: int) -> list[Times]:
    """The median step of that variant in the first and in the second phase."""
    torch.set_num_threads(threads)
    settings = FieldSettings()
    training = training_of(variant, channels, grid, settings)
    if variant.endswith("memory kept"):
        keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    medians = []
    for training.done in (0, settings.steps // 2):
        taken = []
        for _ in range(WARM_UP + MEASURED):
            batch = (
                torch.rand(settings.batch, 2, generator=generator),
                torch.randint(grid**2, (settings.batch,), generator=generator),
                torch.randn(settings.batch, channels, generator=generator),
            )
            start, busy = time.perf_counter(), time.process_time()
            training.step(*batch)
            taken.append((time.perf_counter() - start, time.process_time() - busy))
        clock, processor = (1000 * statistics.median(kind) for kind in zip(*taken[WARM_UP:], strict=True))
        medians.append((clock, processor))
    return medians


def final_errors(channels: int, grid: int, steps: int, batch: int, seeds: int) -> dict[str, list[float]]:
    """Last loss and relative errors of F and G (up to their constant), by variant, at equal steps: means."""
    generator = torch.Generator().manual_seed(0)
    count = 100 * grid**2
    coords = torch.rand(count, 2, generator=generator)
    patches = torch.randint(grid**2, (count,), generator=generator)
    waves = torch.randn(2, 12, generator=generator) * 6
    mixing = torch.randn(12, channels, generator=generator) / 12**0.5
    semantics = torch.sin(coords @ waves) @ mixing
    artifacts = torch.randn(grid**2, channels, generator=generator) / 2
    features = semantics + artifacts[patches] + 0.1 * torch.randn(count, channels, generator=generator)
    settings = FieldSettings(steps=steps, batch=batch)
    errors = {}
    for variant in ("touched", "touched, float32", "dense Adam, fused"):
        found = []
        for seed in range(seeds):
            training = training_of(variant, channels, grid, settings, seed)
            result = training.result((grid, grid), training.fit(coords, patches, features, seed))
            found.append([
                result.losses[-20:].mean().item(),
                relative_error(result.semantics(coords), semantics),
                relative_error(result.artifacts.flatten(0, 1), artifacts),
            ])
        errors[variant] = torch.tensor(found).mean(dim=0).tolist()
    return errors


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference of (N, C) over that of the truth, both less their mean over N."""
    found, truth = found - found.mean(dim=0), truth - truth.mean(dim=0)
    return ((found - truth).norm() / truth.norm()).item()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.benchmark field_step", description=__doc__)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--grid", type=int, default=37)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant (3)")
    parser.add_argument("--scene-steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3, help="runs of the scene that errors are averaged over")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)

    print(f"ms a step: C={options.channels}, K={options.grid}, batch 2048, {options.threads} threads")
    print(f"{'variant':25}{'phase 1':>9}{'phase 2':>9}{'ratio':>8}   processor: phase 1, phase 2, ratio")
    least = measure_steps(options.channels, options.grid, options.rounds, options.threads)
    own = [sum(phase[kind] for phase in least["touched"]) for kind in (0, 1)]
    for variant, (first, second) in least.items():
        ratio, busy_ratio = ((first[kind] + second[kind]) / own[kind] for kind in (0, 1))
        print(f"{variant:25}{first[0]:9.1f}{second[0]:9.1f}{ratio:7.1f}x"
              f"{first[1]:20.1f}{second[1]:9.1f}{busy_ratio:7.1f}x", flush=True)

    print(f"one scene (C=96, K=16), {options.scene_steps} steps of 1024 patches, {options.seeds} seeds")
    print(f"{'variant':25}{'loss':>9}{'error F':>9}{'error G':>9}")
    for variant, values in final_errors(96, 16, options.scene_steps, 1024, options.seeds).items():
        print(f"{variant:25}" + "".join(f"{value:9.4f}" for value in values), flush=True)
    return 0


if __name__ == "__main__":
    print(json.dumps(one_turn(*json.loads(sys.argv[1]))))
