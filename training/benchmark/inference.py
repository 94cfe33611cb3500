"""What the denoiser costs at inference, as ratios within one run.

python -m training.benchmark inference
python -m training.benchmark inference --blank-gate      with the gates that trained and calibrated denoisers have
python -m training.benchmark inference --arch static     what timm_dvt.calibrate makes
python -m training.benchmark inference --device cuda --dtype bfloat16 --compile --batch-sizes 1 32
"""

import copy
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import nn

import timm_dvt
from timm_dvt.architectures import ARCHITECTURES
from timm_dvt.bars import tqdm
from timm_dvt.errors import UserError
from timm_dvt.loading import pick_device
from timm_dvt.registry import VARIANTS
from training.benchmark._hardware import hardware, waiting
from training.common.command import command_parser, positive

MODELS = ("vit_small_patch14_dinov2.lvd142m_dvt", "vit_base_patch14_dinov2.lvd142m_dvt")
# One block in twelve is 1.083, the floor of the second line.
BARS = {"off / plain": 1.01, "on / plain": 1.10, "on (map) / published (map)": 1.00}
IMPORT_BAR = 1.10
# Processor time is what other work on a shared machine disturbs least; it adds up the threads.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARM_UP = 1  # forwards of each arrangement before its times count


class Published(nn.Module):
    """The arrangement of the published code, as a reference: maps between the parts, PE resampled at every forward.

    Args:
        backbone: a plain timm ViT.
        model: the denoised one whose denoiser's weights are copied.
    """

    def __init__(self, backbone: Any, model: Any) -> None:
        super().__init__()
        ours = model.denoiser
        if len(ours.blocks) != 1 or ours.pos_embed is None:
            raise UserError("the published arrangement has one block and a position embedding")
        self.backbone = backbone
        self.grid_size = ours.grid_size
        self.pos_embed = nn.Parameter(ours.pos_embed.detach().clone())
        norm_layer: Any = functools.partial(nn.LayerNorm, eps=1e-6)
        self.block = Block(ours.dim, ours.num_heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm_layer)
        self.block.load_state_dict(ours.blocks[0].state_dict())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, h, w) to a denoised map (B, C, H, W)."""
        (raw,) = self.backbone.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        batch, channels, rows, columns = raw.shape
        tokens = raw.permute(0, 2, 3, 1).reshape(batch, rows * columns, channels)
        position = resample_abs_pos_embed(
            self.pos_embed, new_size=[rows, columns], old_size=list(self.grid_size), num_prefix_tokens=0
        )
        tokens = self.block(tokens + position)
        return tokens.reshape(batch, rows, columns, channels).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Comparison:
    """Paired ratios of two arrangements, one a round."""

    name: str
    ratios: tuple[float, ...]
    bar: float

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """Quartiles of the ratios: how far the machine's other work moved them."""
        if len(self.ratios) < 2:
            return self.ratios[0], self.ratios[0]
        low, _, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, high

    def line(self) -> str:
        low, high = self.spread
        verdict = "pass" if self.median <= self.bar else "miss"
        return f"  {self.name:28} {self.median:7.3f}   [{low:.3f}, {high:.3f}]   <= {self.bar:5.2f}   {verdict}"


HEAD = f"  {'ratio':28} {'median':>7}   {'quartiles':14}   {'bar':>8}"


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each call in each round. The order moves on by one a round, so that no call has a fixed neighbor."""
    for _ in range(WARM_UP):
        for call in calls.values():
            call()
    clock()  # a GPU's work is done before what counts begins
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in tqdm(range(rounds), desc="rounds", unit="round", leave=False):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = clock()
            calls[name]()
            seconds[name].append(clock() - start)
    return seconds


def paired(seconds: dict[str, list[float]]) -> list[Comparison]:
    """The ratios that have a bar, each round's times divided by each other."""
    comparisons = []
    for name, bar in BARS.items():
        above, below = name.split(" / ")
        if above not in seconds:
            continue
        ratios = tuple(a / b for a, b in zip(seconds[above], seconds[below], strict=True))
        comparisons.append(Comparison(name, ratios, bar))
    return comparisons


def arrangements(name: str, model: Any) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The ways to run one variant, with the model's weights, each from images to tokens or to a map.

    The published arrangement is one of blocks alone.
    """
    arguments: Any = {"img_size": model.patch_embed.img_size, "dynamic_img_size": True, "num_classes": 0}
    plain = timm.create_model(VARIANTS[name].backbone, **arguments).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("denoiser.")})
    weight = next(model.parameters())

    def off(images: torch.Tensor) -> torch.Tensor:
        with model.denoising(False):
            return model.forward_features(images)

    def on_map(images: torch.Tensor) -> torch.Tensor:
        return model.forward_intermediates(images, indices=1, intermediates_only=True)[0]

    calls = {"plain": plain.forward_features, "off": off, "on": model.forward_features}
    ours: Any = model.denoiser
    if ours.arch == "block" and ours.blank_gate is None and ours.pos_embed_out is None and not ours.keep_length:
        calls |= {"on (map)": on_map, "published (map)": Published(plain, model).to(weight).eval()}
    return calls


def check_agreement(calls: dict[str, Callable[[torch.Tensor], torch.Tensor]], images: torch.Tensor) -> None:
    """Raise RuntimeError unless the arrangements compute the same thing; otherwise their times compare nothing."""
    if not torch.equal(calls["plain"](images), calls["off"](images)):
        raise RuntimeError("the model with its denoiser off does not equal the plain one")
    if "published (map)" not in calls:
        return
    ours, published = (calls[name](images).float() for name in ("on (map)", "published (map)"))
    apart = float((ours - published).norm() / published.norm())
    # They add up in other orders; in half precision each of a dozen sums is rounded to 2 to 3 digits.
    if not apart < (1e-4 if images.dtype == torch.float32 else 5e-2):
        raise RuntimeError(f"denoised maps differ by {apart:.2g} of their size")


def compiled(calls: dict[str, Callable[[torch.Tensor], torch.Tensor]], model: Any) -> dict[str, Callable]:
    """The arrangements by torch.compile, each by itself and for the next batch's size alone."""
    torch.compiler.reset()
    off = copy.deepcopy(model)  # a switch that turns within the timed rounds would be compiled again and again
    off.set_denoise(False)
    return {name: torch.compile(call, dynamic=False) for name, call in {**calls, "off": off.forward_features}.items()}


def measure_within(model: Any, images: torch.Tensor, rounds: int, clock: Callable[[], float]) -> Comparison:
    """A denoised forward against the backbone's part of the same forward.

    The two are milliseconds apart, so this stays sharp on a machine whose other work blurs the ratios of whole
    forwards. It leaves out what the two forwards' shared steps might cost one of them more; those ratios see that.
    """
    backbone, spent, ratios = model._backbone_features, [0.0], []

    def timed(*args, **kwargs):
        start = clock()
        tokens = backbone(*args, **kwargs)
        spent[0] = clock() - start
        return tokens

    model._backbone_features = timed
    try:
        for _ in tqdm(range(rounds), desc="within one forward", unit="round", leave=False):
            start = clock()
            model.forward_features(images)
            ratios.append((clock() - start) / spent[0])
    finally:
        del model._backbone_features
    return Comparison("on / backbone, one forward", tuple(ratios), BARS["on / plain"])


def measure_import(rounds: int) -> Comparison:
    """`import timm_dvt` against `import timm`, both stamped in the same new process: each ratio is paired."""
    code = (
        "import time; a = time.perf_counter(); import timm; b = time.perf_counter(); import timm_dvt; "
        "c = time.perf_counter(); print((c - a) / (b - a))"
    )
    ratios = []
    for i in tqdm(range(rounds + 1), desc="import", unit="process", leave=False):
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        if i:  # the first fills the file cache
            ratios.append(float(answer.stdout))
    return Comparison("import timm_dvt / timm", tuple(ratios), IMPORT_BAR)


def main(argv: Sequence[str]) -> int:
    """Measure, print a table with each bar, and return 0; 1 if a bar is missed."""
    parser = command_parser("benchmark inference", __doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="variants with a denoiser")
    parser.add_argument("--batch-sizes", nargs="+", type=positive, default=[1, 8], metavar="B")
    parser.add_argument(
        "--size", nargs="+", type=positive, metavar="PIXELS", help="sides of the input (default: the variant's own)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=15, help="forwards of each arrangement (default: %(default)s)"
    )
    parser.add_argument("--arch", choices=ARCHITECTURES, default="block", help="of the denoiser (default: %(default)s)")
    parser.add_argument("--blank-gate", action="store_true", help="level what has no content, too")
    parser.add_argument("--device", default="cpu", help="where to run (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and images (default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="each arrangement by torch.compile")
    parser.add_argument("--threads", type=positive, default=2, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what is timed (default: %(default)s)")
    parser.add_argument("--skip-import", action="store_true", help="do not time `import timm_dvt`")
    args = parser.parse_args(argv)
    for name in args.models:
        if name not in VARIANTS or VARIANTS[name].distilled:
            parser.error(f"--models: {name!r} is not a variant with a denoiser; timm-dvt list prints them")
    torch.set_num_threads(args.threads)
    try:
        device, dtype = pick_device(args.device), DTYPES[args.dtype]
    except UserError as error:
        parser.error(f"--device: {error}")
    clock = waiting(device, CLOCKS[args.clock])
    print(
        f"torch {torch.__version__}, timm {timm.__version__}, timm_dvt {timm_dvt.__version__}, {hardware(device)}, "
        f"{args.dtype}, {'compiled, ' if args.compile else ''}random weights; {args.clock} time, {args.rounds} rounds "
        "in turn, medians of paired ratios"
    )
    comparisons = []
    if not args.skip_import:
        comparisons.append(measure_import(max(args.rounds, 5)))
        print("\nimport\n" + HEAD, comparisons[-1].line(), sep="\n", flush=True)
    for name in args.models:
        torch.manual_seed(0)
        denoiser = {"arch": args.arch, "blank_gate": args.blank_gate, "flat_gate": args.blank_gate}
        model: Any = timm.create_model(name, num_classes=0, denoiser=denoiser).eval().to(device, dtype)
        calls = arrangements(name, model)
        for size in args.size or [VARIANTS[name].resolution]:
            if size % (patch := model.patch_embed.patch_size[0]):
                raise UserError(f"--size must be a multiple of the patch size {patch} of {name}, got {size}")
            with torch.inference_mode():
                check_agreement(calls, torch.randn(1, 3, size, size, device=device, dtype=dtype))
                for batch in args.batch_sizes:
                    timed = compiled(calls, model) if args.compile else calls
                    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
                    images[..., : size // 8] = 0  # a wall, for a gate to level: photographs have 2 to 13%
                    bound: dict[str, Callable[[], object]] = {
                        key: functools.partial(call, images) for key, call in timed.items()
                    }
                    seconds = interleaved(bound, args.rounds, clock)
                    print(f"\n{name}, {size} px, batch {batch}")
                    times = (f"{key} {statistics.median(s) * 1e3:.4g}" for key, s in seconds.items())
                    print(f"  milliseconds ({args.clock} time): " + ", ".join(times))
                    measured = paired(seconds)
                    if not args.compile:  # which has no inside to time
                        measured.append(measure_within(model, images, args.rounds, clock))
                    print(HEAD, *(c.line() for c in measured), sep="\n", flush=True)
                    comparisons += measured
    missed = sum(c.median > c.bar for c in comparisons)
    print(f"\n{len(comparisons) - missed} of {len(comparisons)} bars passed")
    return 1 if missed else 0
