"""Stage 1 over many images, on any number of processes: each one's seed, what of it is kept, what may go wrong."""

from __future__ import annotations

import hashlib
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from timm_dvt.bars import tqdm
from timm_dvt.errors import ImageError
from timm_dvt.image_files import Fingerprint, Source, decode_image, read_file
from timm_dvt.loading import weights_digest
from training.common.models import DENOISER
from training.pairs.folder import PairFolder, ValueTooLarge
from training.stage1.conditioning import IllConditioned
from training.stage1.decompose import Decomposition, NonFiniteFeatures, decompose
from training.stage1.progress import Progress, is_first_process
from training.stage1.settings import SOLVERS, Stage1Settings, stage1_recipes

# Of one image of many. Stage 2 learns the mean over images: of as many forward passes, with DINOv2-S, 48 images of 32
# views and 96 of 16 gave the best denoisers (RESULTS.md). The paper's is 768 (Stage1Settings.views).
VIEWS = 32
CROPS = 8  # of the views, kept for stage 2
STAGE1 = stage1_recipes(Stage1Settings(views=VIEWS, crops=CROPS))

# What costs one image its pair, while the others go on.
IMAGE_ERRORS = (ImageError, NonFiniteFeatures, IllConditioned, ValueTooLarge)


def describe_pairs(name: str, pretrained: bool, model: nn.Module, settings: Stage1Settings) -> dict[str, Any]:
    """All that decides what the pairs hold, and nothing that does not (device, batch size, images)."""
    reader = settings.reader(model)
    chosen = asdict(settings)
    solver = {name: chosen.pop(name) for name in SOLVERS if name in chosen}
    chosen.pop("batch_size")
    # Said only where they are set, so that folders begun before there were such options go on.
    for option in ("corner_aligned", "square_first", "crops"):
        if not chosen[option]:
            chosen.pop(option)
    return {
        "model": name,
        "pretrained": pretrained,
        "weights": weights_digest(model, without=DENOISER),
        "grid": reader.grid,
        "channels": reader.channels,
        **chosen,
        settings.solver: solver.get(settings.solver, {}),
    }


def denoise_images(model: nn.Module, sources: Sequence[Source], folder: PairFolder, settings: Stage1Settings) -> int:
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
    warned: set[str] = set()
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
                    reason = _denoise_image(model, source, folder, settings, bar, warned)
                done += 1
                if reason is not None:
                    failed += 1
                    if is_first_process():
                        _say(source, reason)
                bar.settle(done, failed)
            waiting = busy
    folder.check()
    return failed


def _denoise_image(
    model: nn.Module,
    source: Source,
    folder: PairFolder,
    settings: Stage1Settings,
    bar: Progress,
    warned: set[str],
) -> str | None:
    """Give one claimed image its pair, unless it has one by now. Returns why it cannot have one, or None.

    `warned` holds what was warned of before in this run, without its numbers.
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
        seeded = replace(settings, seed=image_seed(settings.seed, content.sha256))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            parts = decompose(model, image, seeded, **bar.parts(seeded))
        assert isinstance(parts, dict)  # settings.layers is filled in
        facts = {
            "seed": seeded.seed,
            "image_size": list(image.shape[1:]),
            "diagnostics": {layer: part.diagnostics for layer, part in parts.items()},
        }
        for warning in caught:
            kind = re.sub(r"[\d.]+", "", str(warning.message))
            if kind not in warned:
                warned.add(kind)
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


def image_seed(seed: int, digest: str) -> int:
    """An image's own seed, from the run's and its file's sha256: the same in any order, on any process."""
    return int.from_bytes(hashlib.sha256(f"{seed} {digest}".encode()).digest()[:7], "big")


def pair_maps(parts: Decomposition) -> dict[str, Tensor]:
    """The maps that a pair keeps; not the residual: with the linear solver it is raw - clean - artifacts."""
    maps = {"raw": parts.raw, "clean": parts.semantics, "artifacts": parts.artifacts}
    if parts.crop_raw is not None and parts.crop_semantics is not None:
        maps |= {"crops.raw": parts.crop_raw, "crops.clean": parts.crop_semantics}
    return maps
