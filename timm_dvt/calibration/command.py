"""timm-dvt calibrate: a model by name, calibrated, saved as a folder, and drawn before and after."""

import argparse
import io
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from timm_dvt.calibration.calibrate import LEAST_VIEWS, METHODS, Calibration, calibrate, check_arguments
from timm_dvt.calibration.samples import sources
from timm_dvt.calibration.views import WINDOWS
from timm_dvt.errors import CalibrationError
from timm_dvt.images import PHOTOGRAPHS, read_image
from timm_dvt.layouts import meant_size
from timm_dvt.loading import check_name, load_any_size, pick_device
from timm_dvt.options import Blocks, add_device, block_numbers
from timm_dvt.reading import LayerReader
from timm_dvt.viewer.panel import Shown, draw
from timm_dvt.weights.files import write_whole
from timm_dvt.weights.saving import recorded_arguments, save_pretrained

PANEL, FACTS = "before_after.png", "calibration.json"
WRITTEN = ("config.json", "model.safetensors", PANEL)
MOST_SHOWN = 2


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """Options of `calibrate`."""
    parser.description = (
        "Calibrate a denoiser for a timm ViT from images, or from blank ones, and write a folder that "
        "timm.create_model('local-dir:FOLDER', pretrained=True) loads, with a picture of features before and after."
    )
    parser.epilog = "Example: %(prog)s --model vit_base_patch16_siglip_512.v2_webli --images photos --out calibrated"
    parser.add_argument("--model", metavar="NAME", required=True, help="a timm model, local-dir:FOLDER or hf-hub:REPO")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="made if it does not exist")
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="PATH",
        help="image files or folders, 16 images or more of many kinds (default: blank and noise images)",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="static",
        help="; ".join(f"{name}: {method.help}" for name, method in METHODS.items()) + " (default: %(default)s)",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        type=block_numbers,
        action=Blocks,
        metavar="N",
        help="blocks to denoise, counted from 0, or from the end with a minus (default: the last, or those of the "
        "model's denoiser)",
    )
    parser.add_argument(
        "--views",
        type=int,
        default=256,
        metavar="N",
        help=f"forward passes at the most, {LEAST_VIEWS} or more (default: %(default)s)",
    )
    parser.add_argument(
        "--keep-length", action="store_true", help="clean tokens of the raw ones' length, for what lives on lengths"
    )
    parser.add_argument(
        "--blank-gate",
        action=argparse.BooleanOptionalAction,
        help="with images: know images without content and patches without texture, and level them (default: yes); "
        "leftover keeps the gates of a denoiser that has them",
    )
    parser.add_argument(
        "--json", action="store_true", help="print what was found as JSON, and nothing else; progress goes to stderr"
    )
    add_device(parser)
    parser.add_argument("--no-pretrained", action="store_true", help="random weights: fetch nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> Path:
    """Calibrate as the parsed arguments say and save it; prints what was found, returns the folder written.

    Raises:
        UserError: an image, the model, the device or the folder cannot be used; the message says what to do.
    """
    check_arguments(args.method, args.views)
    if args.blank_gate and not args.images:
        raise CalibrationError("--blank-gate tells blank images from photographs; name some by --images.")
    check_name(args.model)
    device = pick_device(args.device)
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / FACTS).exists() and (there := [name for name in WRITTEN if (folder / name).exists()]):
            raise CalibrationError(
                f"{args.out} holds {', '.join(there)}, not written by calibrate; name another --out."
            )
        shown = [read_image(Path(photograph)) for photograph in _to_show(args.images)]  # before anything slow
    except OSError as e:
        raise CalibrationError(f"cannot write to {args.out}: {e.strerror or e}; name a folder for --out.") from e
    model = load_any_size(args.model, not args.no_pretrained)
    say = (lambda *words: None) if args.json else print
    say(f"model: {args.model} on {device}" + (", random weights, as asked for" if args.no_pretrained else ""))
    start = time.perf_counter()
    model.to(device)
    calibrate(
        model,
        args.images,
        method=args.method,
        layers=args.layers,
        views=args.views,
        keep_length=args.keep_length,
        blank_gate=args.blank_gate is not False,
        progress=True,
    )
    of_blocks = {block: denoiser.calibration for block, denoiser in model.denoisers().items()}
    facts = of_blocks[max(of_blocks)]
    say(f"calibrated in {time.perf_counter() - start:.0f} s: {describe(facts)}")
    for block in sorted(of_blocks)[:-1]:
        say(f"block {block}: {describe(of_blocks[block])}")
    if max(calibration.error for calibration in of_blocks.values()) > 0.5:
        # Whether more images would not be looked at.
        spent = facts.images * WINDOWS * (2 if METHODS[args.method].blanks else 1) >= args.views
        wanted = "views (--views)" if spent else "images"
        say(f"note: little is known of the artifacts; use {f'more {wanted}' if args.images else 'images (--images)'}")
    written = ["config.json", "model.safetensors", FACTS]
    report = asdict(facts)
    if len(of_blocks) > 1:
        report["layers"] = {str(block): asdict(calibration) for block, calibration in of_blocks.items()}
    try:
        text = json.dumps(report, indent=2) + "\n"
        write_whole(folder / FACTS, lambda path: path.write_text(text))  # first: by it a folder is known as ours
        save_pretrained(model, folder, model_args=recorded_arguments(args.model))
        if model.in_chans == 3:  # photographs can be shown to it
            encoded = io.BytesIO()
            picture(model, shown, f"{args.model}, before and after: {args.method}").save(encoded, format="PNG")
            write_whole(folder / PANEL, lambda path: path.write_bytes(encoded.getvalue()))
            written.append(PANEL)
    except OSError as e:
        raise CalibrationError(f"cannot write to {args.out}: {e.strerror or e}.") from e
    say(f"wrote {folder}: {', '.join(written)}")
    say(f"load it with timm.create_model({f'local-dir:{folder}'!r}, pretrained=True), after import timm_dvt")
    if args.json:
        print(json.dumps({"folder": str(folder), **report}))
    return folder


def describe(facts: Calibration) -> str:
    """The facts in a sentence or two."""
    looked_at = f"{facts.images} image{'s' * (facts.images != 1)}" if facts.images else "blank and noise images"
    method = METHODS[facts.method]
    if facts.images and method.blanks:
        looked_at += " and of blank ones"
    what = method.found.format(n=facts.components, s="s" * (facts.components != 1))
    return (
        f"{what}, from {facts.views} views of {looked_at}; estimated error of the map {facts.error:.0%}. Position "
        f"explains {facts.share_before:.2%} of the variance within these views before, {facts.share_after:.2%} after."
    )


def picture(model: Any, photographs: Sequence[Image.Image], title: str) -> Image.Image:
    """The features of photographs before and after the last denoiser of a model, drawn side by side."""
    last = max(model.denoisers())
    inner = [] if last == model.final_block else [last]
    reader = LayerReader(model, model.layout, inner, 1, meant_size(model))
    shown = []
    for photograph in photographs:
        fitted = ImageOps.fit(photograph, reader.size[::-1], Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)
        maps = reader(reader.normalized(pixels / 255)[None])
        off, on = (maps[reader.name_of(last, denoised)][0].cpu().numpy() for denoised in (False, True))
        shown.append(Shown(fitted, off, on, ("", "")))
    return draw(shown, title, [describe(model.denoisers()[last].calibration)])


def _to_show(images: Sequence[str] | None) -> Sequence[Any]:
    return PHOTOGRAPHS if images is None else sources(list(images), MOST_SHOWN)
