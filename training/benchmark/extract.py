"""What `timm-dvt extract` takes beside its forward passes: python -m training.benchmark extract

Images a second of the whole command (files read and decoded, maps written, the model being made) against forward passes
of batches that lie in memory, by turns, and the ratio of the two: 1 if decoding and writing cost nothing.
"""

from __future__ import annotations

import dataclasses
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from timm_dvt.bars import tqdm
from timm_dvt.extraction.formats import check_package
from timm_dvt.extraction.forward import Extractor
from timm_dvt.extraction.run import fill
from timm_dvt.extraction.settings import FORMATS, ExtractSettings
from timm_dvt.extraction.sources import open_source
from training.benchmark._hardware import hardware, waiting
from training.common.command import command_parser, positive

BAR = 0.95


def write_photographs(folder: Path, count: int) -> None:
    """JPEG files of 500 x 375 pixels, ImageNet's usual size, with as much detail as photographs have."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        layers = [draw.normal(0, 30, (side * 3 // 4, side, 3)).clip(-127, 127) for side in (4, 16, 64, 500)]
        sized = [Image.fromarray((pixels + 128).astype(np.uint8)).resize((500, 375)) for pixels in layers]
        mixed = np.mean([np.asarray(pixels, np.float32) for pixels in sized], axis=0)
        Image.fromarray(mixed.astype(np.uint8)).save(folder / f"{i:05d}.jpg", quality=90)


def main(argv: list[str]) -> int:
    """Measure, print, and return 0; 1 if the bar is missed."""
    parser = command_parser("benchmark extract", __doc__)
    parser.add_argument("--model", default="vit_small_patch14_dinov2", help="with random weights (%(default)s)")
    parser.add_argument("--size", type=positive, default=518, metavar="PX")
    parser.add_argument("--images", type=positive, default=32, help="of a round (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--format", choices=FORMATS, default="zarr")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--autocast", action="store_true", help="forward passes in half precision, both")
    parser.add_argument("--threads", type=positive, default=2, help="of PyTorch (%(default)s)")
    args = parser.parse_args(argv)
    check_package(args.format)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        photographs, out = Path(name, "photographs"), Path(name, "out")
        write_photographs(photographs, args.images)
        names = {field.name for field in dataclasses.fields(ExtractSettings)} & set(vars(args))
        chosen = {key: getattr(args, key) for key in names}
        settings = ExtractSettings(source=str(photographs), out=str(out), pretrained=False, **chosen)
        extractor = Extractor(settings)
        clock, batch = waiting(extractor.device), torch.zeros(args.batch_size, 3, args.size, args.size)
        inputs = batch.to(extractor.device)
        rounds: list[tuple[float, ...]] = []
        for _ in tqdm(range(args.rounds + 1), desc="extract", unit="round", leave=False):
            start, busy = clock(), time.process_time()
            with torch.inference_mode(), torch.autocast(extractor.device.type, enabled=args.autocast):
                for _ in range(-(-args.images // args.batch_size)):
                    extractor.model.forward_intermediates(inputs, indices=1, norm=True, intermediates_only=True)
            bare, bare_busy = clock() - start, time.process_time() - busy
            shutil.rmtree(out, ignore_errors=True)
            start, busy = clock(), time.process_time()
            fill(settings, extractor, open_source(settings.source, out), lambda text: None, first=False)
            rounds.append((bare, clock() - start, bare_busy, time.process_time() - busy))
    rounds = rounds[1:]  # the first warms up
    per_image = args.images / (-(-args.images // args.batch_size) * args.batch_size)  # bare batches are whole
    ratio = statistics.median(bare * per_image / taken for bare, taken, _, _ in rounds)
    of_processor = statistics.median(bare * per_image / taken for _, _, bare, taken in rounds)
    speed = args.images / statistics.median(taken for _, taken, _, _ in rounds)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{args.model}, {args.size} px, batches of {args.batch_size}, {args.format}, {hardware(extractor.device)}")
    print(f"extract {speed:.3g} images/s; of bare forward passes {ratio:.3f} by the clock, {of_processor:.3f} of the")
    print(f"processor's time; >= {BAR}: {'pass' if ratio >= BAR else 'miss'}; peak memory {memory:.2f} GB")
    return 0 if ratio >= BAR else 1
