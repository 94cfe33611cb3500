"""The work of `timm-dvt extract`: shards are claimed, decoded, passed through the model and written, all at once."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from timm_dvt.bars import tqdm
from timm_dvt.defaults import torch_defaults
from timm_dvt.errors import UserError
from timm_dvt.extraction import pictures
from timm_dvt.extraction.basis import BASIS, SAMPLE, Basis
from timm_dvt.extraction.decoding import Decoded, batches, decoded
from timm_dvt.extraction.folder import ERRORS, INDEX, Index, check_images, check_room, shard_length
from timm_dvt.extraction.formats import WRITERS, Layout, Record, check_package, write_zarr_metadata
from timm_dvt.extraction.forward import TOKEN, Extractor
from timm_dvt.extraction.settings import ExtractSettings, check_settings
from timm_dvt.extraction.sources import ImageSource, Read, open_source
from timm_dvt.shared_folder import OutputError, SettingsDiffer, SharedFolder, write_atomically
from timm_dvt.version import __version__

NAMED = 20  # broken images that are named at the end; the file names all


@dataclass(frozen=True)
class Passed:
    """A batch behind the model: its places in the shard, variables, which are finite, and when all that is there."""

    places: list[int]
    maps: dict[str, torch.Tensor]
    finite: torch.Tensor
    event: torch.cuda.Event | None


def extract(source: str, model: str, out: str, **options: Any) -> Path:
    """Write the features of images, a data set or a video into a folder, as `timm-dvt extract`; returns the folder.

    Args:
        source, model, out: see `ExtractSettings`. options: its other fields, `size=224` say.

    Raises:
        UserError: the source, the model or the folder cannot be used, or the disk is full. TypeError: no such option.
    """
    return run(ExtractSettings(str(source), model, str(out), **options))


@torch_defaults()
def run(settings: ExtractSettings, say: Callable[[str], object] = print) -> Path:
    """Extract what is asked for, together with whatever other processes do the same; returns the folder.

    Raises:
        UserError: the source, the model or the folder cannot be used, or the disk is full; the message says what
            to do.
    """
    check_settings(settings)
    check_package(settings.format)
    source = open_source(settings.source, Path(settings.out))
    first = int(os.environ.get("RANK", 0)) == 0  # of those that torchrun started: it speaks for all
    say = say if first else lambda text: None
    extractor = Extractor(settings)
    say(f"model: {settings.model} on {extractor.device}")
    return fill(settings, extractor, source, say, first)


def fill(
    settings: ExtractSettings, extractor: Extractor, source: ImageSource, say: Callable[[str], object], first: bool
) -> Path:
    """As `extract`, with a model that is made and a source that is opened."""
    try:
        with SharedFolder(settings.out) as folder:
            return _Extraction(settings, extractor, source, folder, say, first).run()
    except (OutputError, SettingsDiffer) as error:
        more = "" if isinstance(error, SettingsDiffer) else "; once that is settled, the same command continues"
        raise UserError(f"{error}{more}") from error


class _Extraction:
    def __init__(
        self,
        settings: ExtractSettings,
        extractor: Extractor,
        source: ImageSource,
        folder: SharedFolder,
        say: Callable[[str], object],
        first: bool,
    ) -> None:
        self.settings, self.extractor, self.source, self.folder = settings, extractor, source, folder
        self.say, self.first, self.out = say, first, Path(settings.out)
        shapes = {
            key: (*shape[:-1], settings.pca) if settings.pca and len(shape) == 3 else tuple(shape)
            for key, shape in extractor.shapes.items()
        }
        size = sum(int(np.prod(shape)) for shape in shapes.values()) * np.dtype(settings.dtype).itemsize
        self.layout = Layout(shard_length(size, source.count), shapes, settings.dtype)
        self.facts = {**extractor.facts, "dtype": settings.dtype, "pca": settings.pca}
        self.default = [key for key in shapes if key != TOKEN][len(extractor.blocks) - 1]
        self.index = Index(self.out)
        done = sum(map(len, self.index.shards.values()))  # until it is settled, no error binds the folder to settings
        check_images(self.out, source.identity)
        check_room(self.out, self.layout, source.count or source.expected, done, say)
        channels = min(shape[-1] for shape in extractor.shapes.values())
        if settings.pca and settings.pca > channels:
            raise UserError(f"--pca {settings.pca}: features of {channels} channels have not so many components")
        folder.settle(
            {
                **self.facts,
                "images": source.identity,
                "format": settings.format,
                "pictures": settings.pictures,
                "shard": self.layout.length,
                "variables": {key: list(shape) for key, shape in shapes.items()},
                "default": self.default,
                "version": __version__,
            },
            undecided=["version"],
            begun=INDEX,
        )
        cores = 1 if extractor.device.type == "cpu" else 8
        self.pool = ThreadPoolExecutor(settings.num_workers or cores, "decode")
        self.writer, self.line = ThreadPoolExecutor(2, "write"), threading.Lock()

    def run(self) -> Path:
        """The whole extraction; returns the folder."""
        if changed := self.index.forget(self.source.changed(self.index.shards, self.layout.length)):
            shards = f"{changed} shard{'s' * (changed > 1)}"
            self.say(f"taken again: {shards} with images that have changed, or could not be read before")
        self.basis = self._basis()
        try:
            self._shards()
        finally:
            self.pool.shutdown(cancel_futures=True)
            self.writer.shutdown(cancel_futures=True)
        self._finish()
        return self.out

    def _basis(self) -> Basis:
        """The basis that all processes use, fitted by the first that comes."""
        path = self.out / BASIS
        if self.settings.pca or self.settings.pictures:
            with self.folder.claim("basis", wait=True):
                if not path.exists():
                    self._fit().save(path)
        return Basis.load(path)

    def _fit(self) -> Basis:
        walk = self.source.walk(1, self._of_sample)
        decoded = (pixels for _, pixels, _ in self._decoded(walk) if pixels is not None)
        bar = tqdm(total=SAMPLE, desc="fit the basis", unit="image", leave=False, disable=not self.first)
        with bar:
            samples = (
                {key: maps for key, maps in self.extractor(pixels[None]).items() if key != TOKEN}
                for pixels in itertools.islice(decoded, SAMPLE)
                if bar.update() or True
            )
            return Basis.fit(samples, self.settings.pca, self.settings.pictures)

    def _of_sample(self, number: int) -> bool:
        """Whether an image is in the sample: evenly spread ones of a list, the first of a stream."""
        count = self.source.count or 0
        return count <= SAMPLE or number * SAMPLE // count != (number - 1) * SAMPLE // count

    # ---- shards

    def _shards(self) -> None:
        """Work until no shard is left for anyone; what another process is at is looked at again when that ends."""
        part, parts = self.settings.part
        bar = tqdm(
            total=self.source.count or self.source.expected, unit="image", desc="extract", disable=not self.first
        )
        with bar:
            while True:
                busy: list[int] = []
                claims: dict[int, ExitStack] = {}

                def wanted(shard: int, busy: list[int] = busy, claims: dict[int, ExitStack] = claims) -> bool:
                    if shard % parts != part - 1 or shard in self.index.shards:
                        return False
                    claim = ExitStack()
                    if not claim.enter_context(self.folder.claim(f"shard {shard}")):
                        busy.append(shard)
                    elif shard not in self.index.refresh().shards:
                        claims[shard] = claim
                        return True
                    claim.close()
                    return False

                try:
                    self._pass(self.source.walk(self.layout.length, wanted), claims, bar)
                finally:
                    for claim in claims.values():
                        claim.close()
                for shard in busy:
                    with self.folder.claim(f"shard {shard}", wait=True):
                        pass
                if self.index.refresh().shards.keys() >= set(busy):
                    break
        self.folder.check()

    def _pass(self, walk: Iterator[tuple[int, Record, Read]], claims: dict[int, ExitStack], bar: Any) -> None:
        writing: deque[Future[None]] = deque()
        bar.update(sum(map(len, self.index.shards.values())) - bar.n)
        try:
            for shard, images in itertools.groupby(self._decoded(walk), key=lambda entry: entry[0]):
                records: list[Record] = []
                values: dict[str, dict[int, np.ndarray]] = {key: {} for key in self.layout.shapes}
                launched: deque[Passed] = deque()
                for places, batch in batches(images, records, self.settings.batch_size):
                    launched.append(self._launch(places, batch))
                    if len(launched) > 1:  # a device is at the next batch while this one's maps are looked at
                        self._collect(launched.popleft(), records, values)
                    bar.update(len(places))
                for passed in launched:
                    self._collect(passed, records, values)
                bar.update(sum("error" in record for record in records))
                while len(writing) > 1:  # so that memory does not grow where the disk is slower
                    writing.popleft().result()
                writing.append(self.writer.submit(self._write, shard, records, values, claims))
            for future in writing:
                future.result()
        finally:
            wait(writing)  # they use the claims

    def _decoded(self, walk: Iterator[tuple[int, Record, Read]]) -> Iterator[Decoded]:
        return decoded(walk, self.extractor.prepare, self.pool, ahead=2 * self.settings.batch_size)

    def _launch(self, places: list[int], batch: torch.Tensor) -> Passed:
        """Begin to pass a batch through the model, and to copy what comes of it."""
        maps, finite = {}, torch.ones(len(places), dtype=torch.bool, device=self.extractor.device)
        for key, value in self.basis.project(self.extractor(batch)).items():
            value = value.to(getattr(torch, self.settings.dtype)).contiguous()
            maps[key] = self._to_host(value)
            finite &= value.isfinite().flatten(1).all(1)
        return Passed(places, maps, self._to_host(finite), self._event())

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cuda":
            return tensor.cpu()
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

    def _event(self) -> torch.cuda.Event | None:
        device = self.extractor.device
        return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def _collect(self, passed: Passed, records: list[Record], values: dict) -> None:
        """Put what came of a batch into `values`, by variable and place, and sizes and errors into the records."""
        if passed.event is not None:
            passed.event.synchronize()
        for i, place in enumerate(passed.places):
            if passed.finite[i]:
                for key, whole in passed.maps.items():
                    values[key][place] = whole[i].numpy()
                records[place] |= dict(zip(("rows", "columns"), values[self.default][place].shape))
            else:
                why = "features are not finite" + (" in float16" if self.settings.dtype == "float16" else "")
                records[place] |= {"error": why}

    def _write(self, shard: int, records: list[Record], values: dict, claims: dict[int, ExitStack]) -> None:
        self.folder.check()
        for key, maps in values.items():
            WRITERS[self.settings.format](self.out, self.layout, shard, key, records, maps)
        if self.settings.pictures and self.source.video is None:
            pictures.write_pictures(self.out, records, values, self.basis, self.default)
        with self.line:  # the folder's locks are between processes, not between threads
            self.folder.append(INDEX, {"shard": shard, "images": records})
        claims.pop(shard).close()

    def _finish(self) -> None:
        with self.folder.claim("finish", wait=True):
            records = [record for _, _, record in self.index.refresh().images()]
            errors = [record for record in records if "error" in record]
            write_atomically(self.out / ERRORS, "".join(json.dumps(record) + "\n" for record in errors).encode())
            if self.settings.format == "zarr":
                records_of = self.index.padded(self.layout.length, self.source.count)
                write_zarr_metadata(self.out, self.layout, records_of, {**self.facts, "timm_dvt": __version__})
            whole = self.source.count == len(records)
            if whole and self.settings.pictures and self.source.video:
                pictures.write_video(self.out, self.source.video, self.basis, self.default, self.first)
        good = len(records) - len(errors)
        if whole and not good:
            why = "{name}: {error}".format(**errors[0])
            raise UserError(f"none of the {len(records)} images can be used ({why}): see {self.out / ERRORS}")
        for record in errors[:NAMED]:
            self.say(f"left out {record['name']}: {record['error']}")
        if errors:
            self.say(f"left out {len(errors)} of {len(records)} images: {self.out / ERRORS} names each")
        rest = "" if whole else f" of {self.source.count}; the rest is left to other parts"
        self.say(f"wrote {self.out}: {good} images{rest}; {self.settings.format}, {', '.join(self.layout.shapes)}")
