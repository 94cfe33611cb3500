"""Claims about pairs on disk: what is stored comes back, names never collide, the index tells the truth."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from timm_dvt.image_files import Source, read_file
from timm_dvt.version import __version__
from training.pairs.folder import (
    PairFolder,
    ValueTooLarge,
    pair_file,
    read_header,
    read_index,
    read_pair,
    read_settings,
)

SETTINGS = {"model": "test_vit", "layers": [3, 5], "seed": 0}


@pytest.fixture()
def sources(tmp_path):
    """Three images, two of them of one name; any bytes will do here."""
    result = []
    for name in ("a/cat.png", "b/cat.png", "dog.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"image {name}".encode())
        result.append(Source(name, tmp_path / "images"))
    return result


def make_maps(seed: int = 0) -> dict[int, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(4, 4, 8, generator=generator)  # noqa: E731
    return {layer: {"raw": draw(), "clean": draw(), "artifacts": draw()} for layer in (3, 5)}


def save(folder: PairFolder, source: Source, **facts) -> None:
    folder.save(source, read_file(source.path)[1], make_maps(len(source.name)), facts)


def test_maps_come_back_in_half_precision_with_where_they_come_from(tmp_path, sources):
    out = tmp_path / "out"
    with PairFolder(out, SETTINGS) as folder:
        save(folder, sources[0], seed=7)
    (entry,) = read_index(out)
    maps = make_maps(len("a/cat.png"))
    arrays = load_file(out / entry.file)
    assert sorted(arrays) == ["3.artifacts", "3.clean", "3.raw", "5.artifacts", "5.clean", "5.raw"]
    for layer, parts in maps.items():
        for part, wanted in parts.items():
            assert arrays[f"{layer}.{part}"].dtype == np.float16
            np.testing.assert_array_equal(arrays[f"{layer}.{part}"], wanted.numpy().astype(np.float16))
    header = read_header(out / entry.file)
    assert header["image"] == "a/cat.png" and header["seed"] == 7 and header["version"] == __version__
    assert header["sha256"] == entry.sha256 == read_file(sources[0].path)[1].sha256
    assert header["settings"] == read_settings(out) == {**SETTINGS, "precision": "half"}


def test_full_precision_loses_nothing(tmp_path, sources):
    with PairFolder(tmp_path / "out", SETTINGS, "full") as folder:
        save(folder, sources[0])
    (entry,) = read_index(tmp_path / "out")
    maps = read_pair(tmp_path / "out" / entry.file, 5, ("artifacts", "raw"))
    assert list(maps) == ["artifacts", "raw"]
    for part in maps:
        torch.testing.assert_close(maps[part], make_maps(len("a/cat.png"))[5][part], rtol=0, atol=0)


def test_a_layer_must_be_named_if_there_are_several(tmp_path, sources):
    with PairFolder(tmp_path / "out", SETTINGS) as folder:
        save(folder, sources[0])
    (entry,) = read_index(tmp_path / "out")
    for wrong in (None, 4):
        with pytest.raises(ValueError, match=r"layer must be one of \[3, 5\].*got"):
            read_pair(tmp_path / "out" / entry.file, wrong)


def test_equal_pairs_are_equal_files(tmp_path, sources):
    contents = set()
    for run in range(5):  # safetensors writes metadata entries in random order
        with PairFolder(tmp_path / str(run), SETTINGS) as folder:
            save(folder, sources[0], seed=7, image_size=[3, 4])
        (entry,) = read_index(tmp_path / str(run))
        contents.add((tmp_path / str(run) / entry.file).read_bytes())
    assert len(contents) == 1


def test_equal_names_and_equal_contents_do_not_collide(tmp_path, sources):
    (sources[1].path).write_bytes(sources[0].path.read_bytes())
    with PairFolder(tmp_path / "out", SETTINGS) as folder:
        for source in sources:
            save(folder, source)
    entries = read_index(tmp_path / "out")
    assert [entry.image for entry in entries] == ["a/cat.png", "b/cat.png", "dog.png"]
    assert len({entry.file for entry in entries}) == 3


def test_file_names_are_safe_and_short_whatever_the_image_is_called():
    for name in ("../../etc/passwd", "ü n\tb.png", "x" * 300 + ".jpg", "\udcff.png", ".png", "a/b\n.png"):
        folder, file = pair_file(name, "00").split("/")
        assert len(folder) == 2 and len(file) < 100 and file.isascii() and file.isprintable()
        assert not file.startswith(".") and " " not in file


def test_a_value_that_half_precision_cannot_hold_is_an_error_not_infinity(tmp_path, sources):
    maps = make_maps()
    maps[3]["raw"][0, 0, 0] = 1e5
    content = read_file(sources[0].path)[1]
    with PairFolder(tmp_path / "half", SETTINGS) as folder:
        with pytest.raises(ValueTooLarge, match="block 3: raw holds 1e.05, too large for half"):
            folder.save(sources[0], content, maps, {})
    assert read_index(tmp_path / "half") == []
    with PairFolder(tmp_path / "full", SETTINGS, "full") as folder:
        folder.save(sources[0], content, maps, {})
    with pytest.raises(ValueError, match="precision must be one of .* got 'int8'"):
        PairFolder(tmp_path / "x", SETTINGS, "int8")


def test_a_later_run_knows_what_is_done_and_what_has_changed(tmp_path, sources):
    with PairFolder(tmp_path / "out", SETTINGS) as folder:
        save(folder, sources[0])
        save(folder, sources[1])
    read_pair_path = tmp_path / "out" / read_index(tmp_path / "out")[1].file
    read_pair_path.unlink()  # whatever the index says, a pair that is gone is not done
    with PairFolder(tmp_path / "out", SETTINGS) as folder:
        assert [folder.is_done(source) for source in sources] == [True, False, False]
        sources[0].path.write_bytes(b"another image")
        assert not folder.is_done(sources[0])
        sources[0].path.unlink()
        assert not folder.is_done(sources[0])


def test_a_pair_whose_line_was_lost_is_entered_and_not_made_again(tmp_path, sources):
    out = tmp_path / "out"
    with PairFolder(out, SETTINGS) as folder:
        for source in sources:
            save(folder, source)
    lines = (out / "index.jsonl").read_text().splitlines(keepends=True)
    (out / "index.jsonl").write_text(lines[0] + lines[1][:20])  # killed within the second line
    assert [entry.image for entry in read_index(out)] == ["a/cat.png"]
    with PairFolder(out, SETTINGS) as folder:
        for source in sources[1:]:
            assert not folder.is_done(source)
            assert folder.adopt(source, read_file(source.path)[1])
            assert folder.is_done(source)
    assert (out / "index.jsonl").read_text() == "".join(lines)


def test_another_process_sees_what_was_finished_meanwhile(tmp_path, sources):
    ours = PairFolder(tmp_path / "out", SETTINGS)
    theirs = PairFolder(tmp_path / "out", SETTINGS)
    save(theirs, sources[0])
    assert not ours.is_done(sources[0])
    assert ours.is_done_by_now(sources[0])


def test_failures_say_what_is_true_now(tmp_path, sources):
    out = tmp_path / "out"
    content = read_file(sources[2].path)[1]
    with PairFolder(out, SETTINGS) as folder:
        folder.fail(sources[2], content, "truncated")
        folder.fail(sources[0], None, "cannot be read")
        folder.fail(sources[2], content, "still truncated")
        records = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
        assert [(r["image"], r["reason"]) for r in records] == [
            ("a/cat.png", "cannot be read"),
            ("dog.png", "still truncated"),
        ]
        assert folder.failure(sources[2], content) == "still truncated"
        assert folder.failure(sources[0], read_file(sources[0].path)[1]) is None  # it can be read now
        sources[2].path.write_bytes(b"repaired")
        assert folder.failure(sources[2], read_file(sources[2].path)[1]) is None
        save(folder, sources[2])
        assert [json.loads(line)["image"] for line in open(out / "failures.jsonl")] == ["a/cat.png"]
