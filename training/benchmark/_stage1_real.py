"""Stage 1 with a real backbone: what it costs beside the bare forward passes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from timm_dvt.loading import pick_device
from training.benchmark._hardware import hardware, waiting
from training.common.backbone import FeatureReader
from training.common.views import render_views
from training.stage1.decompose import Stage1Settings, decompose, image_views


def photographs() -> dict[str, Tensor]:
    """The color photographs that scikit-image and scikit-learn install, as (3, H, W) in [0, 1]."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    images = {name: getattr(data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")}
    images |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    return {name: torch.from_numpy(np.array(x)).permute(2, 0, 1) / 255 for name, x in images.items()}


def create(name: str, pretrained: bool) -> nn.Module:
    """The model; with random weights drawn from a fixed seed unless pretrained."""
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=pretrained).eval()


@dataclass(frozen=True)
class Run:
    """What `end_to_end` times: a model by name, with its own or random weights, and where and how it computes."""

    name: str
    pretrained: bool
    input_size: int | None
    device: str
    dtype: str


def end_to_end(run: Run, counts: Sequence[int]) -> int:
    """Print seconds of stage 1 over those of the bare forward passes, and peak memory, at these numbers of views."""
    peaks = []
    missed = 0
    for views in counts:
        result = _child(run, views)
        peaks.append(result["peak"])
        ratio = result["stage1"] / result["forward"]
        missed += ratio > 1.10
        print(
            f"{run.name}, {run.dtype} on {result['where']}, {views} views: bare forward passes "
            f"{result['forward']:.2f} s, stage 1 {result['stage1']:.2f} s, ratio {ratio:.3f} (bar 1.10); peak memory "
            f"{result['peak']:.0f} MB",
            flush=True,
        )
    growth = max(peaks) / peaks[0] - 1
    print(f"peak memory grows by {growth:.1%} from {counts[0]} views on (bar 5%)")
    return 1 if missed or growth >= 0.05 else 0


def _child(run: Run, views: int) -> dict[str, Any]:
    arguments = json.dumps([asdict(run), views])
    command = [sys.executable, "-m", "training.benchmark._stage1_real", arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def time_once(run: Run, views: int) -> dict[str, Any]:
    """Forward passes and stage 1 in turns, batch by batch: a machine that slows down slows both alike."""
    device = pick_device(run.device)
    gpu = device.type == "cuda"
    model = create(run.name, run.pretrained).to(device)
    image = photographs()["astronaut"]
    settings = Stage1Settings(views=views, input_size=run.input_size, dtype=run.dtype)
    reader = FeatureReader(model, input_size=run.input_size, dtype=run.dtype)
    rendered = render_views(image, image_views(settings, (512, 512))[: settings.batch_size], reader.input_size)
    rendered = rendered.to(device)
    if gpu:  # its libraries load at their first use
        decompose(model, image, replace(settings, views=2 * settings.batch_size))
    reader.patch_features(rendered)
    forward, now = 0.0, waiting(device)

    def bare(count: int) -> None:
        nonlocal forward
        start = now()
        reader.patch_features(rendered[:count])
        forward += now() - start

    start = now()
    decompose(model, image, settings, progress=bare)
    stage1 = now() - start - forward
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if gpu else resident
    return {"forward": forward, "stage1": stage1, "peak": peak, "where": hardware(device)}


if __name__ == "__main__":
    options, count = json.loads(sys.argv[1])
    print(json.dumps(time_once(Run(**options), count)))
