"""Stage 1 over many images: pairs of raw and clean feature maps, on any number of processes.

    python -m training.denoise_images --model vit_base_patch14_dinov2.lvd142m --images photos --out pairs
    torchrun --nproc-per-node 8 -m training.denoise_images --model ... (the same)

Kill it whenever you like, and run the same command again to continue: the result is that of an uninterrupted
run. Processes that are started by hand on the same OUT, here or on other machines, share the work. What
lies in OUT, and how this goes to a million images, is described in training/pairs/folder.py.

Exit code: 0 every image has its pair; 1 some have not, see OUT/failures.jsonl; 2 the command is wrong or does
not fit what OUT was begun with; 3 OUT cannot be written (disk full); 130 stopped by Ctrl-C.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn
from tqdm import tqdm

from training.common.backbone import FeatureReader
from training.common.command import add_model_arguments, complain, help_from
from training.common.images import Fingerprint, Source, decode_image, list_images, read_file
from training.common.memory import keep_freed_memory
from training.common.models import load_model, pick_device, weights_digest
from training.common.shared_folder import OutputError
from training.pairs.folder import FAILURES, PRECISIONS, PairFolder
from training.stage1.decompose import SOLVERS, Stage1Settings, decompose
from training.stage1.one_image import IMAGE_ERRORS, image_seed, pair_maps
from training.stage1.options import add_stage1_arguments, stage1_settings
from training.stage1.progress import Progress, is_first_process

# Of one image of many. Stage 2 learns the mean over images: with DINOv2-S, 27 composed images of 16 views and
# 53 of 8 gave denoisers that are level in k-NN (README). The paper's is 768 (Stage1Settings.views).
VIEWS = 32


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    keep_freed_memory()
    try:
        sources = list_images(args.images, args.limit)
        device = pick_device(args.device)
        model = load_model(args.model, pretrained=args.pretrained, seed=args.seed)
        settings = stage1_settings(args, model)
        folder = PairFolder(args.out, describe(args, model, settings), args.precision)
    except OutputError as error:
        return complain(3, error)
    except (ValueError, TypeError) as error:
        return complain(2, error)
    with folder:
        try:
            failed = denoise_images(model.to(device), sources, folder, settings)
        except OutputError as error:
            return complain(3, f"{error}\nOnce that is settled, run the same command again to continue.")
        except KeyboardInterrupt:
            return complain(130, "stopped; run the same command again to continue.")
    if failed and is_first_process():
        print(f"{failed} of {len(sources)} images failed: see {folder.path / FAILURES}", file=sys.stderr)
    return 1 if failed else 0


def make_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = argparse.ArgumentParser(prog="python -m training.denoise_images", **help_from(__doc__))
    parser.add_argument("--images", required=True, help="a folder, an image or a .txt list of paths")
    parser.add_argument("--out", required=True, help="folder of the pairs; made, or continued if it exists")
    add_model_arguments(parser)
    add_stage1_arguments(parser, VIEWS)
    parser.add_argument("--limit", type=int, help="only the first so many images")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="half", help="of the maps on disk (default: %(default)s)"
    )
    return parser


def describe(args: argparse.Namespace, model: nn.Module, settings: Stage1Settings) -> dict[str, Any]:
    """All that decides what the pairs hold, and nothing that does not (device, batch size, images)."""
    reader = FeatureReader(model, settings.layers, input_size=settings.input_size, stride=settings.stride)
    chosen = asdict(settings)
    solver = {name: chosen.pop(name) for name in SOLVERS if name in chosen}
    chosen.pop("batch_size")
    return {
        "model": args.model,
        "pretrained": args.pretrained,
        "weights": weights_digest(model),
        "grid": reader.grid,
        "channels": reader.channels,
        **chosen,
        settings.solver: solver.get(settings.solver, {}),
    }


def denoise_images(
    model: nn.Module, sources: Sequence[Source], folder: PairFolder, settings: Stage1Settings
) -> int:
    """Make sure that every image has its pair, together with whatever other processes do the same.

    Returns when no image is left for anyone: images that another process was at are looked at again in the
    end, and done if that process died.

    Args:
        model: on its device.
        sources: the images.
        folder: where pairs go.
        settings: as in the folder's settings.json; each image's seed is drawn from `settings.seed` and its
            content.

    Returns:
        How many of the images have no pair.

    Raises:
        OutputError: a full disk, say.
    """
    failed = 0
    warned: set[tuple[str, int]] = set()
    waiting = [source for source in sources if not folder.is_done(source)]
    done = len(sources) - len(waiting)
    with Progress(total=len(sources), initial=done) as bar:
        for last_round in (False, True):
            busy = []
            for source in waiting:
                with folder.claim(source, wait=last_round) as mine:
                    if not mine:
                        busy.append(source)
                        continue
                    reason = _denoise_one(model, source, folder, settings, bar, warned)
                done += 1
                if reason is not None:
                    failed += 1
                    if is_first_process():
                        _say(source, reason)
                bar.settle(done, failed)
            waiting = busy
    return failed


def _denoise_one(
    model: nn.Module,
    source: Source,
    folder: PairFolder,
    settings: Stage1Settings,
    bar: Progress,
    warned: set[tuple[str, int]],
) -> str | None:
    """Give one claimed image its pair, unless it has one by now. Returns why it cannot have one, or None.

    `warned` holds the places in the code that have warned before in this run.
    """
    if folder.is_done_by_now(source):
        return None
    content: Fingerprint | None = None
    try:
        data, content = read_file(source.path)
        if folder.adopt(source, content):
            return None
        reason = folder.failure(source, content)
        if reason is not None:
            return reason
        image = decode_image(data).to(next(model.parameters()).device)
        own = replace(settings, seed=image_seed(settings.seed, content.sha256))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            parts = decompose(model, image, own, **bar.parts(own))
        assert isinstance(parts, dict)  # settings.layers is filled in
        facts = {
            "seed": own.seed,
            "image_size": list(image.shape[1:]),
            "diagnostics": {layer: part.diagnostics for layer, part in parts.items()},
        }
        for warning in caught:
            if (warning.filename, warning.lineno) not in warned:
                warned.add((warning.filename, warning.lineno))
                _say(source, f"warning: {warning.message} (said once)")
        folder.save(source, content, {layer: pair_maps(part) for layer, part in parts.items()}, facts)
    except IMAGE_ERRORS as error:
        folder.fail(source, content, str(error))
        return str(error)
    except Exception:
        _say(source, "stopped at this image")  # the traceback alone would not name it
        raise
    return None


def _say(source: Source, message: str) -> None:
    tqdm.write(f"{source.name}: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
