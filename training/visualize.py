"""Pictures of features, raw and denoised.

    python -m training.visualize cat.jpg dog.jpg --model NAME             the paper's Figs. S4 to S10
    python -m training.visualize cat.jpg --model NAME --layers all        Fig. 5: one row a block
    python -m training.visualize cat.jpg --model NAME --resolution 148    F between the patches, no upsampling
    python -m training.visualize photos --model NAME --positional         Figs. 3a and S1: what position does
    python -m training.visualize clip.mp4 --model NAME --video out.mp4    Fig. 3c: frame, raw, denoised

NAME is any model of timm-dvt families. A video is denoised by the denoiser of a `*_dvt` model; with any
other model each frame goes through stage 1, which takes --views forward passes. Pictures are of stage 1, which says
first what it will cost.

Exit code: 0 drawn; 1 drawn, but some images are left out; 2 the command is wrong; 130 stopped by Ctrl-C.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from timm_dvt.bars import tqdm
from timm_dvt.errors import ImageError, UserError
from timm_dvt.image_files import Source, decode_image, list_images, read_file
from timm_dvt.loading import load_model, pick_device
from timm_dvt.options import add_options, build
from timm_dvt.viewer.colors import PALETTE
from training.common.command import add_model_arguments, command_parser, exit_code_of, positive
from training.common.recipes import add_recipe
from training.common.views import render_views, whole_view
from training.figures.panels import Row, draw_positional, draw_stage1
from training.figures.sheet import check_picture, save_figure
from training.figures.video import Maps, check_suffix, count_frames, draw_video
from training.stage1.cost import describe_cost, seconds_a_view
from training.stage1.decompose import decompose
from training.stage1.images import IMAGE_ERRORS, image_seed
from training.stage1.progress import Progress
from training.stage1.settings import Stage1Settings, stage1_recipes

RECIPES = stage1_recipes(Stage1Settings(views=64))  # a picture shows no more of what 768 would bring
CLUSTERS = 6
MOST_ROWS = 100  # a taller picture opens nowhere


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = make_parser(argv).parse_args(argv)
    return exit_code_of(lambda: run(args), then="nothing was drawn.")


def run(args: argparse.Namespace) -> int:
    """What the parsed arguments ask for. Raises UserError, OSError."""
    device = pick_device(args.device)
    sources = [] if check(args).video else [source for where in args.images for source in list_images(where)]
    model = load_model(args.model, pretrained=args.pretrained, seed=args.seed).to(device)
    settings = build(RECIPES[args.recipe], args).settled(model)
    if args.video:
        return _video(args, model, settings)
    draw = _positional if args.positional else _stage1
    return draw(args, model, settings, sources[: args.limit])


def check(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments. Raises ValueError for what is wrong whatever the model and the images are."""
    if not 1 <= args.clusters <= len(PALETTE):
        raise UserError(f"clusters must be from 1 to {len(PALETTE)}, got {args.clusters}")
    if args.out:
        check_picture(args.out)
    if args.fps is not None and not 0.1 <= args.fps <= 1000:
        raise UserError(f"fps must be from 0.1 to 1000, got {args.fps}")
    if args.positional and args.video:
        raise UserError("--positional draws a picture and --video a video; leave out one of the two")
    if (args.positional or args.video) and (args.resolution or args.clusters != CLUSTERS):
        raise UserError("--resolution and --clusters are of pictures of stage 1, not of --positional or --video")
    if args.fps is not None and not args.video:
        raise UserError("--fps is of a video; leave it out, or name one by --video")
    if args.video:
        check_suffix(args.video)
        if args.layers and len(args.layers) > 1:
            raise UserError(f"--video shows one block, and --layers names {len(args.layers)}")
        if len(args.images) != 1:
            raise UserError(f"--video takes one folder of frames or one video file, got {len(args.images)}")
    return args


def make_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The options of this command, with the defaults of the recipe that the command line names."""
    parser = command_parser("visualize", __doc__)
    parser.add_argument("images", nargs="+", help="images, folders, .txt lists of paths, or a video")
    parser.add_argument("--out", help="picture to write (default: stage1.png or positional.png)")
    parser.add_argument("--positional", action="store_true", help="draw what position does to features")
    parser.add_argument("--video", metavar="OUT", help=".mp4 or .gif to write, from a video or frames")
    parser.add_argument("--fps", type=float, help="of the video (default: the source's, or 10)")
    parser.add_argument(
        "--clusters", type=int, default=CLUSTERS, help="of k-means, from 1 to 10 (default: %(default)s)"
    )
    parser.add_argument("--limit", type=positive, help="only the first so many images or frames")
    add_model_arguments(parser)
    parser.add_argument(
        "--resolution", type=positive, metavar="N", help="draw F at N x N places instead of at the patches"
    )
    fields = "solver views layers input_size stride batch_size dtype area linear field".split()  # crops are of pairs
    add_options(parser.add_argument_group("stage 1"), Stage1Settings, *fields)
    add_recipe(parser, RECIPES, argv)
    return parser


def stage1_rows(
    model: nn.Module,
    source: Source,
    settings: Stage1Settings,
    progress: Progress | None = None,
    resolution: int | None = None,
) -> list[Row]:
    """Stage 1 of an image, as rows for `draw_stage1`: one for each of `settings.layers`.

    Its seed is the one that training.denoise_images gives the image. With a resolution, F is read at so many places
    either way instead of at the patches.

    Raises:
        IMAGE_ERRORS: the image cannot be read or decomposed.
    """
    data, content = read_file(source.path)
    image = decode_image(data)
    seeded = replace(settings, seed=image_seed(settings.seed, content.sha256))
    parts = decompose(model, image, seeded, **({} if progress is None else progress.parts(seeded)))
    square = _square(image, seeded.input_size or 0)[0].permute(1, 2, 0).numpy().clip(0, 1)
    name = Path(source.shown).name
    rows = []
    for layer, part in (parts if isinstance(parts, dict) else {parts.layer: parts}).items():
        label = name if len(seeded.layers or ()) < 2 else f"{name}, block {layer}"
        clean = part.semantics if resolution is None else part.at(resolution, resolution)
        arrays = [x.numpy() for x in (part.raw, clean, part.artifacts, part.residual)]
        rows.append(Row(label, square, *arrays))
    return rows


def positional_maps(
    model: nn.Module, sources: Sequence[Source], settings: Stage1Settings, progress: Progress | None = None
) -> tuple[list[dict[int, np.ndarray]], int]:
    """What `draw_positional` shows: {layer: (K, K, C)} of a zero tensor, of the images' mean, and of one.

    Images that cannot be read are named and left out.

    Returns:
        The three maps, and how many images there were.

    Raises:
        ValueError: not one image could be read.
    """
    reader = settings.reader(model)
    gray = torch.tensor(resolve_model_data_config(model)["mean"]).view(1, 3, 1, 1)  # zero, once normalized
    zero = reader.patch_features(gray.expand(1, 3, reader.input_size, reader.input_size))
    total: dict[int, Tensor] = {}
    first: dict[int, Tensor] = {}
    count = 0
    for source in sources:
        try:
            pixels = _square(decode_image(read_file(source.path)[0]), reader.input_size)
        except ImageError as error:
            _leave_out(source, error)
            continue
        features = reader.patch_features(pixels)
        first = first or features
        total = {layer: total.get(layer, 0) + maps.double() for layer, maps in features.items()}
        count += 1
        if progress is not None:
            progress.update(1)
    if count == 0:
        raise UserError("none of the images could be read")
    mean = {layer: maps / count for layer, maps in total.items()}
    return [{layer: m[0].cpu().numpy() for layer, m in maps.items()} for maps in (zero, mean, first)], count


def video_maps(model: Any, settings: Stage1Settings) -> Maps:
    """How a frame gets its raw and denoised maps: by the model's own denoiser, or else by stage 1."""
    reader = settings.reader(model)
    last = reader.layers[-1]
    if not hasattr(model, "denoising"):

        def by_stage1(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            parts = decompose(model, _to_image(frame), settings)
            part = parts[last] if isinstance(parts, dict) else parts
            return part.raw.numpy(), part.semantics.numpy()

        return by_stage1
    if reader.stride != reader.patch or last != reader.depth - 1:
        raise UserError("a model's own denoiser is for the last block, with a stride of one patch")
    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key], device=reader.device).view(1, -1, 1, 1) for key in ("mean", "std"))

    @torch.no_grad()
    def by_denoiser(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels = _square(_to_image(frame), reader.input_size).to(reader.device)
        raw = reader.patch_features(pixels)[last][0]
        with model.denoising(True):
            maps = model.forward_intermediates((pixels - mean) / std, indices=1, intermediates_only=True)
        return raw.cpu().numpy(), maps[0][0].permute(1, 2, 0).float().cpu().numpy()

    return by_denoiser


def _stage1(args: argparse.Namespace, model: nn.Module, settings: Stage1Settings, sources: list[Source]) -> int:
    if len(sources) * len(settings.layers or ()) > MOST_ROWS:
        raise UserError(f"a picture has at most {MOST_ROWS} rows (images times layers); use --limit")
    _say_cost(model, settings, len(sources))
    rows: list[Row] = []
    failed = 0
    with Progress(len(sources)) as bar:
        for done, source in enumerate(sources, start=1):
            try:
                rows += stage1_rows(model, source, settings, bar, args.resolution)
            except IMAGE_ERRORS as error:
                _leave_out(source, error)
                failed += 1
            bar.settle(done, failed)
    if not rows:
        raise UserError("none of the images could be drawn")
    return _save(draw_stage1(rows, args.clusters), args.out or "stage1.png", failed)


def _positional(args: argparse.Namespace, model: nn.Module, settings: Stage1Settings, sources: list[Source]) -> int:
    with Progress(len(sources)) as bar:
        maps, count = positional_maps(model, sources, settings, bar)
    figure = draw_positional(settings.layers or (), count, *maps)
    return _save(figure, args.out or "positional.png", len(sources) - count)


def _video(args: argparse.Namespace, model: nn.Module, settings: Stage1Settings) -> int:
    source = args.images[0]
    maps, count = video_maps(model, settings), count_frames(source, args.limit)
    if not hasattr(model, "denoising"):
        _say_cost(model, settings, count)
    with Progress(count) as bar:
        draw_video(source, args.video, maps, fps=args.fps, count=count, progress=bar.update)
    print(args.video)
    return 0


def _save(figure: Figure, out: str, failed: int) -> int:
    out = out if Path(out).suffix else f"{out}.png"
    save_figure(figure, out)
    print(out)
    return 1 if failed else 0


def _say_cost(model: nn.Module, settings: Stage1Settings, images: int) -> None:
    words = describe_cost(images, settings.views, seconds_a_view(settings.reader(model), settings.batch_size))
    fits = ", and the fit of a field to each image" if settings.solver == "field" else ""
    print(words + fits, file=sys.stderr, flush=True)


def _square(image: Tensor, size: int) -> Tensor:
    """The whole image as the model sees it: (3, H, W) -> (1, 3, size, size)."""
    return render_views(image, whole_view(), size)


def _to_image(frame: np.ndarray) -> Tensor:
    return torch.tensor(frame).permute(2, 0, 1).float() / 255


def _leave_out(source: Source, error: Exception) -> None:
    tqdm.write(f"{source.name}: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
