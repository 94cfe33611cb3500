"""A progress bar in images, for work that takes from milliseconds to minutes an image."""

import os
from typing import Any

from timm_dvt.bars import tqdm
from training.stage1.decompose import Stage1Settings


def is_first_process() -> bool:
    """Whether this process speaks for all that torchrun started; a process started by hand does."""
    return int(os.environ.get("RANK", 0)) == 0


class Progress(tqdm):
    """A bar that counts images, moves within them, and says images/s also where one takes minutes."""

    def __init__(self, total: int, initial: int = 0) -> None:
        super().__init__(
            total=total,
            initial=initial,
            disable=not is_first_process(),
            bar_format="{percentage:3.0f}%|{bar}| {n:.1f}/{total} images "
            "[{elapsed}<{remaining}, {images_per_second}{postfix}]",
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        values = super().format_dict
        rate = values["rate"] or (values["n"] - values["initial"]) / max(values["elapsed"], 1e-9)
        return {**values, "images_per_second": f"{rate:.3g} images/s"}

    def update(self, n: float | None = 1) -> bool | None:
        """Move on by n images, or by a part of one, but never beyond the end: parts do not add up exactly."""
        return super().update(min(n or 0, self.total - self.n))

    def parts(self, settings: Stage1Settings) -> dict[str, Any]:
        """The progress arguments of `decompose`, which move the bar on by one image in all.

        Views are a fifth of the way with the field, whose fit takes most of the time (paper A.1).
        """
        layers = len(settings.layers or (0,))
        seen = 0.2 if settings.solver == "field" else 1.0
        return {
            "progress": lambda views: self.update(seen * views / settings.views),
            "fit_progress": lambda steps: self.update((1 - seen) * steps / settings.field.steps / layers),
        }

    def settle(self, done: int, failed: int) -> None:
        """Count `done` images, wherever the bar stood within the last one."""
        if failed:
            self.set_postfix_str(f"{failed} failed", refresh=False)
        self.update(done - self.n)
