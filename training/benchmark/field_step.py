"""What a step of the neural field costs at the paper's settings (A.1), in phases 1 and 2, by clock and processor.

    python -m training.benchmark field_step

Processor time is of all threads together; a busy machine disturbs it less. A step is that of `fit_field`: batch drawn,
losses, gradients and Adam over all tables. Each phase's first 50 steps warm up; of the turns, the fastest counts.
"""

import time

import torch

from timm_dvt.bars import tqdm
from timm_dvt.loading import pick_device
from training.benchmark._hardware import hardware
from training.common.command import command_parser, positive
from training.common.memory import keep_freed_memory
from training.stage1.field.backends import BACKENDS
from training.stage1.field.fit import REPORT_EVERY, FieldSettings, fit_field

STEPS = 4 * REPORT_EVERY  # of a turn, two parts each phase


def measure_steps(channels: int, grid: int, device: torch.device, backend: str, bar: tqdm) -> list[tuple[float, float]]:
    """Milliseconds a step by the clock and of the processor, in the first and in the second phase; moves a bar on."""
    generator = torch.Generator().manual_seed(0)
    count = 16 * grid**2
    coords = torch.rand(count, 2, generator=generator)
    patches = torch.arange(grid**2).repeat(16)
    features = torch.randn(count, channels, generator=generator).to(device)
    marks = [(time.perf_counter(), time.process_time())]

    def mark(steps: int) -> None:
        marks.append((time.perf_counter(), time.process_time()))
        bar.update(steps)

    fit_field(
        coords, patches, features, grid, FieldSettings(steps=STEPS, backend=backend), device=device, progress=mark
    )
    taken = [[1000 * (b - a) / REPORT_EVERY for a, b in zip(*pair)] for pair in zip(marks, marks[1:])]
    return [(taken[warm][0], taken[warm][1]) for warm in (1, 3)]


def main(argv: list[str]) -> int:
    parser = command_parser("benchmark field_step", __doc__)
    parser.add_argument("--channels", type=positive, default=768)
    parser.add_argument("--grid", type=positive, default=37)
    parser.add_argument("--rounds", type=positive, default=3, help="turns (3)")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", choices=BACKENDS, default="torch", help="of the hash grid (%(default)s)")
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # as the commands do, and the next
    keep_freed_memory()
    with tqdm(total=options.rounds * STEPS, desc="field_step", unit="step", leave=False) as bar:
        turns = [
            measure_steps(options.channels, options.grid, device, options.backend, bar) for _ in range(options.rounds)
        ]
    print(f"ms a step: C={options.channels}, K={options.grid}, batch 2048, {options.backend} on {hardware(device)}")
    for phase, taken in zip((1, 2), zip(*turns)):
        clock, processor = (min(times) for times in zip(*taken))
        print(f"phase {phase}: {clock:.3g} by the clock, {processor:.3g} of the processor")
    return 0
