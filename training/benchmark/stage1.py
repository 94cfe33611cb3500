"""Stage 1 on scenes with a known answer, raw, view-average, linear and field; and its cost with a real ViT.

python -m training.benchmark stage1 --quick              six regimes, no field: about a minute
python -m training.benchmark stage1 --no-field           all regimes: about five minutes on two cores
python -m training.benchmark stage1                      with the field at 2,000 steps: shows its progress
python -m training.benchmark stage1 --end-to-end vit_base_patch14_dinov2     time and memory of decompose
                                    --device cuda --dtype bfloat16 --counts 16 64 256 768
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import resource
import sys
import time

import torch
from torch import Tensor

from timm_dvt.bars import tqdm
from timm_dvt.options import at_least
from training.benchmark import _stage1_real as real
from training.benchmark._scenes import REGIMES, Scene, relative_error
from training.common.backbone import DTYPES
from training.common.command import command_parser, positive, whole
from training.common.views import view_axes
from training.stage1.conditioning import LEAST_VIEWS
from training.stage1.field.fit import FieldSettings, fit_field
from training.stage1.linear.solver import LinearSettings, LinearSolver

QUICK = ("smooth, low", "blobby, high", "blobby, no noise", "5% outliers", "strong noise, blobby", "no artifacts")
CURVE = (8, 16, 32, 64, 128, 256, 512, 768)
CURVE_REGIMES = ("blobby, high", "strong noise, blobby", "no artifacts, strong noise")


@dataclasses.dataclass(frozen=True)
class Result:
    """Errors are relative, up to each channel's constant; `artifacts` is nan where there are none to find."""

    method: str
    semantics: float
    artifacts: float
    cosine: float
    seconds: float
    megabytes: float


def measure(method: str, regime_name: str, views: int, seed: int, steps: int) -> Result:
    """One method on one scene; the time is the solver's own, the memory this process's growth."""
    before = _peak_megabytes()
    regime = REGIMES[regime_name]
    scene = Scene(regime, seed)
    truth = scene.semantics(scene.centers, scene.centers)
    artifacts = torch.zeros_like(truth)
    seconds = 0.0
    if method == "raw":
        semantics = scene.view(scene.views(views), 0)
    elif method == "field":
        semantics, artifacts, seconds = _run_field(scene, views, seed, steps)
    else:
        semantics, artifacts, seconds = _run_linear(scene, views, method == "linear")
    known = float(scene.artifacts.norm()) > 0
    return Result(
        method,
        relative_error(semantics, truth),
        relative_error(artifacts, scene.artifacts) if known else float("nan"),
        float(torch.cosine_similarity(semantics, truth, dim=-1).mean()),
        seconds,
        _peak_megabytes() - before,
    )


def _run_linear(scene: Scene, count: int, with_artifacts: bool) -> tuple[Tensor, Tensor, float]:
    views = scene.views(count)
    xs, ys = view_axes(views, scene.centers)
    settings = LinearSettings(artifacts=with_artifacts)
    solver = LinearSolver(scene.regime.grid, scene.regime.channels, settings)
    seconds = 0.0
    for index in range(count):
        features = scene.view(views, index)
        start = time.perf_counter()
        solver.add(xs[index], ys[index], features)
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    fit = solver.solve()
    semantics = fit.semantics(scene.centers, scene.centers)
    return semantics, fit.artifacts, seconds + time.perf_counter() - start


def _run_field(scene: Scene, count: int, seed: int, steps: int) -> tuple[Tensor, Tensor, float]:
    views = scene.views(count)
    xs, ys = view_axes(views, scene.centers)
    grid, channels = scene.regime.grid, scene.regime.channels
    features = torch.empty(count, grid * grid, channels)
    for index in range(count):
        features[index] = scene.view(views, index).flatten(0, 1)
    coords = torch.stack([xs[:, None].expand(-1, grid, -1), ys[..., None].expand(-1, -1, grid)], -1)
    start = time.perf_counter()
    with tqdm(total=steps, desc="field", unit="step", leave=False) as bar:
        fit = fit_field(
            coords.reshape(-1, 2).float(),
            torch.arange(grid * grid).repeat(count),
            features.flatten(0, 1),
            grid,
            FieldSettings(steps=steps),
            seed=seed,
            progress=bar.update,
        )
    centers = scene.centers.float()
    at = torch.stack(torch.meshgrid(centers, centers, indexing="ij"), -1).flip(-1)
    return fit.semantics(at), fit.artifacts, time.perf_counter() - start


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _alone(*arguments: object) -> Result:
    """`measure` in a process of its own, so that its peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(measure, arguments)
        pool.close()  # to leave the block is to kill it, and tqdm's semaphores with it
        pool.join()
    return result


def compare(names: list[str], views: int, seed: int, steps: int, with_field: bool) -> int:
    """Print the table of all methods and regimes and how it stands to the bars; returns the bars missed."""
    print(f"{views} views a scene, seed {seed}; errors relative, up to a constant")
    print(
        f"{'regime':28s} {'method':8s} {'F error':>8s} {'raw / it':>8s} {'G error':>8s} {'cos F':>7s} "
        f"{'seconds':>8s} {'MB':>6s}"
    )
    missed = []
    for name in names:
        methods = ["raw", "average", "linear"] + ["field"] * with_field
        results = {method: _alone(method, name, views, seed, steps) for method in methods}
        raw, linear, average = results["raw"], results["linear"], results["average"]
        for method, result in results.items():
            gain = raw.semantics / max(result.semantics, 1e-12)
            print(
                f"{name:28s} {method:8s} {result.semantics:8.4f} {gain:8.1f} {result.artifacts:8.4f} "
                f"{result.cosine:7.4f} {result.seconds:8.2f} {result.megabytes:6.0f}",
                flush=True,
            )
        if REGIMES[name].artifacts != "none" and raw.semantics < 5 * linear.semantics:
            missed.append(f"{name}: linear beats raw only {raw.semantics / linear.semantics:.1f} times")
        if linear.semantics > 1.01 * average.semantics:
            missed.append(f"{name}: linear {linear.semantics:.4f}, view-average {average.semantics:.4f}")
        if with_field:
            field = results["field"]
            if linear.semantics > field.semantics:
                missed.append(f"{name}: linear {linear.semantics:.4f}, field {field.semantics:.4f}")
            faster = field.seconds / steps * 20_000 / linear.seconds
            print(f"{name:28s} linear is {faster:.0f} times faster than 20,000 steps of field (extrapolated)")
            if faster < 100:
                missed.append(f"{name}: only {faster:.0f} times faster than the field at 20,000 steps")
    print(
        "bars (5x over raw with artifacts; view-average not better by 1%; field not better, 100x slower): "
        f"{'all met' if not missed else ''}"
    )
    print("".join(f"  missed: {line}\n" for line in missed), end="")
    return len(missed)


def curve(names: list[str], seed: int) -> None:
    """Print the error of F against the number of views (paper Fig. 7c)."""
    print("\nrelative error of F against the number of views")
    print(f"{'regime':28s} {'method':8s}" + "".join(f"{count:8d}" for count in CURVE))
    for name in names:
        for method in ("average", "linear"):
            errors = [measure(method, name, count, seed, 0).semantics for count in CURVE]
            print(f"{name:28s} {method:8s}" + "".join(f"{error:8.4f}" for error in errors), flush=True)


def main(argv: list[str]) -> int:
    parser = command_parser("benchmark stage1", __doc__)
    parser.add_argument(
        "--regimes",
        nargs="+",
        choices=list(REGIMES),
        metavar="REGIME",
        help=f"some of: {'; '.join(REGIMES)}".replace("%", "%%"),
    )
    parser.add_argument("--views", type=at_least(LEAST_VIEWS), default=256, help="views a scene of the table (256)")
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("--quick", action="store_true", help="six regimes, 64 views, no field, no curve")
    parser.add_argument("--no-field", action="store_true", help="leave out the neural field")
    parser.add_argument(
        "--field-steps", type=at_least(2), default=2000, metavar="N", help="steps of the neural field (2000)"
    )
    parser.add_argument("--no-curve", action="store_true", help="leave out error against number of views")
    parser.add_argument("--end-to-end", metavar="MODEL", help="instead: time and memory with this timm model")
    parser.add_argument(
        "--counts",
        type=at_least(LEAST_VIEWS),
        nargs="+",
        default=[32, 256],
        metavar="N",
        help="views of --end-to-end (%(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="of --end-to-end (%(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of --end-to-end (%(default)s)")
    parser.add_argument("--pretrained", action="store_true", help="of --end-to-end: load weights")
    parser.add_argument("--input-size", type=positive, help="of --end-to-end: pixels a side")
    args = parser.parse_args(argv)
    if args.end_to_end:
        run = real.Run(args.end_to_end, args.pretrained, args.input_size, args.device, args.dtype)
        return real.end_to_end(run, args.counts)
    names = args.regimes or (list(QUICK) if args.quick else list(REGIMES))
    views = min(args.views, 64) if args.quick else args.views
    missed = compare(names, views, args.seed, args.field_steps, not (args.no_field or args.quick))
    if not (args.no_curve or args.quick):
        curve([name for name in CURVE_REGIMES if name in names], args.seed)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
