"""Images decoded by threads, a few ahead of the forward passes, and put together to batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future

import torch
from PIL import Image

from timm_dvt.errors import ImageError
from timm_dvt.extraction.formats import Record
from timm_dvt.extraction.sources import Read

Decoded = tuple[int, torch.Tensor | None, Record]  # shard; pixels (3, h, w) uint8 unless it is broken; record


def decoded(
    walk: Iterable[tuple[int, Record, Read]], prepare: Callable[[Image.Image], torch.Tensor], pool: Executor, ahead: int
) -> Iterator[Decoded]:
    """Images of shards in their order. Memory does not grow with their number, whatever is slower."""
    waiting: deque[Future[Decoded]] = deque()
    for shard, record, read in walk:
        waiting.append(pool.submit(_decode, shard, record, read, prepare))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _decode(shard: int, record: Record, read: Read, prepare: Callable[[Image.Image], torch.Tensor]) -> Decoded:
    size: Record = {}
    try:
        image = read()
        size = {"height": image.height, "width": image.width}
        return shard, prepare(image), {**record, **size}
    except ImageError as error:
        return shard, None, {**record, **size, "error": str(error)}  # of a known size, it is not tried again
    except (OSError, MemoryError, ValueError) as error:  # Pillow's, of a shape that it cannot resize
        return shard, None, {**record, "error": f"cannot be resized: {error or type(error).__name__}"}


def batches(images: Iterable[Decoded], records: list[Record], size: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Batches (B, 3, h, w) of a shard's images of one shape, and their places in it; the records are put together."""
    waiting: dict[torch.Size, list[tuple[int, torch.Tensor]]] = {}
    for place, (_, pixels, record) in enumerate(images):
        records.append(record)
        if pixels is None:
            continue
        group = waiting.setdefault(pixels.shape, [])
        group.append((place, pixels))
        if len(group) == size:
            yield _stacked(waiting.pop(pixels.shape))
    for group in waiting.values():
        yield _stacked(group)


def _stacked(group: list[tuple[int, torch.Tensor]]) -> tuple[list[int], torch.Tensor]:
    return [place for place, _ in group], torch.stack([pixels for _, pixels in group])
