"""A model's layers as `timm_dvt.inspect` reads them, and which models it cannot."""

from torch import nn

from timm_dvt.errors import InspectionError
from timm_dvt.layouts import KNOWN, layout_or_refusal, meant_size
from timm_dvt.reading import LayerReader


def layer_reader(model: nn.Module, blocks: list[int] | None, batch_size: int) -> LayerReader:
    """A reader of these blocks, negative ones from the end, or of all; it reads the features in any case.

    Raises:
        InspectionError: the model gives no patches of one grid, or has no such block.
    """
    layout = layout_or_refusal(model, "cannot be inspected", InspectionError)
    count = layout.maps
    wanted = range(count) if blocks is None else blocks
    if any(not -count <= block < count for block in wanted):
        raise InspectionError(f"blocks is {list(wanted)}; this model has those from {-count} to {count - 1}.")
    # Of another class than these, the size that the layout was found out at is known to run.
    size = meant_size(model) if isinstance(model, KNOWN) or layout.img_size is None else layout.img_size
    return LayerReader(model, layout, sorted({block % count for block in wanted}), batch_size, size)
