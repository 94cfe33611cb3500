"""The settings of stage 1, each an option of the command lines; its recipes; and what they are for a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from timm_dvt.errors import UserError
from timm_dvt.options import Blocks, block_list, option
from training.common.backbone import DTYPES, FeatureReader
from training.common.views import check_area
from training.stage1.conditioning import LEAST_VIEWS
from training.stage1.field.fit import FieldSettings
from training.stage1.linear.solver import LinearSettings

SOLVERS = ("linear", "field")


@dataclass(frozen=True)
class Stage1Settings:
    """How one image is decomposed.

    The whole image is one of the views and takes part in the fit, because random crops hardly ever reach the corners.

    Attributes:
        layers: blocks to decompose, all in one pass; of a command line perhaps "all", until `settled`.
        corner_aligned, square_first: as the paper's repository has it, patches' places run from edge to edge of a
            view instead of from center to center, and the image is resized to the input's square before it is cut.
        aspect, flip: of the crops, see `training.common.views.sample_views`.
    """

    solver: str = option(
        "linear", "linear: least squares, seconds an image (default); field: the paper's neural fields", choices=SOLVERS
    )
    views: int = option(768, "forward passes an image (default: %(default)s; the paper's: 768)", least=LEAST_VIEWS)
    seed: int = 0
    layers: tuple[int, ...] | None = option(
        None,
        "blocks counted from 0, or from the end with a minus, or 'all' (default: the last)",
        type=block_list,
        nargs="+",
        action=Blocks,
        metavar="N",
    )
    input_size: int | None = option(None, "(default: the paper's, 518 for patch 14, 512 for 16)", least=1, metavar="PX")
    stride: int | None = option(None, "between patches; below the patch size for denser maps", least=1, metavar="PX")
    batch_size: int = option(8, "views in one forward pass (default: %(default)s)", least=1)
    dtype: str = option("float32", "of forward passes (default: %(default)s)", choices=list(DTYPES))
    area: tuple[float, float] = option(
        (0.1, 0.5),
        "of a view, as a share of the image's (default: the paper's %(default)s)",
        type=float,
        nargs=2,
        metavar=("LEAST", "MOST"),
    )
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    crops: int = option(
        0,
        "of the views, whose own maps are kept as well, with F at their patches: more to learn from at no further "
        "forward pass, and two maps each on disk (default: %(default)s, where there are so many)",
        least=0,
        metavar="N",
    )
    corner_aligned: bool = False
    square_first: bool = False
    linear: LinearSettings = LinearSettings()
    field: FieldSettings = FieldSettings()

    def reader(self, model: nn.Module) -> FeatureReader:
        """What reads the features of a model as these settings say. Raises as that."""
        return FeatureReader(model, self.layers, input_size=self.input_size, stride=self.stride, dtype=self.dtype)

    def settled(self, model: nn.Module) -> Stage1Settings:
        """These settings with layers, input size and stride filled in for a model.

        Raises:
            UserError: a value that cannot be. TypeError: the model cannot have a denoiser.
        """
        check_area(self.area)
        if self.solver == "field" and not self.linear.artifacts:
            raise UserError("--no-artifacts is of the linear solver: pass --solver linear too")
        every = tuple(range(len(getattr(model, "blocks", ()))))
        reader = replace(self, layers=every if self.layers == "all" else self.layers).reader(model)
        filled: dict[str, Any] = {name: getattr(reader, name) for name in ("layers", "input_size", "stride")}
        return replace(self, crops=min(self.crops, self.views - 1), **filled)


def stage1_recipes(ours: Stage1Settings) -> dict[str, Stage1Settings]:
    """The recipes of a command whose own settings are ours."""
    return {
        "ours": ours,
        "paper": Stage1Settings(solver="field"),
        "repository": Stage1Settings(
            solver="field",
            views=769,  # 768 and the whole image
            corner_aligned=True,
            square_first=True,
            field=FieldSettings(steps=25_000, recipe="repository"),
        ),
    }
