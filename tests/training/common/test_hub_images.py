"""Images of a data set: of every form that `datasets` has, of one config, once, whoever asks for them."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.helpers.processes import Python
from timm_dvt.shared_folder import OutputError, SettingsDiffer
from training.common.hub_images import fetch_images

datasets = pytest.importorskip("datasets", reason="needs datasets, of the extra test")


def pictures(count, kind="PNG"):
    """Files of images, none like another."""
    files = []
    for i in range(count):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(buffer, kind)
        files.append(buffer.getvalue())
    return files


def as_files(folder, files):
    for i, data in enumerate(files):
        (folder / f"{i:02d}.png").write_bytes(data)


def as_zip(folder, files):
    with zipfile.ZipFile(folder / "train.zip", "w") as archive:
        for i, data in enumerate(files):
            archive.writestr(f"deep/{i}.png", data)


def as_parquet(folder, files, name="train.parquet"):
    rows = {"text": [f"{i}" for i in range(len(files))], "image": files}
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    rows["image"] = [None if data is None else {"bytes": data, "path": None} for data in files]
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / name)


def kept(folder):
    return [path.read_bytes() for path in sorted(folder.glob("[0-9]*"))]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.mark.parametrize("write", [as_files, as_zip, as_parquet])
def test_images_of_files_zips_and_tables_are_kept_as_they_are(write, source, tmp_path):
    files = pictures(5)
    write(source, files)
    assert kept(fetch_images(f"hf:{source}", 3, tmp_path / "kept")) == files[:3]
    assert kept(fetch_images(f"hf:{source}:train", 9, tmp_path / "all")) == files


def test_files_on_the_hub_are_read_by_their_url(source, tmp_path):
    import fsspec

    memory, files = fsspec.filesystem("memory"), pictures(3)
    for i, data in enumerate(files):
        memory.pipe(f"/set/{i}.png", data)
    rows = "".join(json.dumps({"image": f"memory://set/{i}.png"}) + "\n" for i in range(3))
    (source / "train.jsonl").write_text(rows)
    features = "dataset_info:\n  features:\n  - name: image\n    dtype: image\n"
    (source / "README.md").write_text(f"---\n{features}---\n")
    assert kept(fetch_images(f"hf:{source}", 3, tmp_path / "kept")) == files


def test_rows_without_an_image_are_left_out(source, tmp_path):
    first, second, third = pictures(3)
    as_parquet(source, [None, first, None, second, third])
    assert kept(fetch_images(f"hf:{source}", 3, tmp_path / "kept")) == [first, second, third]
    as_parquet(source, [None, None])
    with pytest.raises(ValueError, match="holds no images"):
        fetch_images(f"hf:{source}", 3, tmp_path / "none")


def test_a_config_is_named_beside_a_split(source, tmp_path):
    files = pictures(4)
    for i, name in enumerate(("day-train", "day-test", "night-train", "night-test")):
        as_parquet(source, [files[i]], f"{name}.parquet")
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: {name}-{s}.parquet\n" for s in SPLITS)
        for name in ("day", "night")
    )
    (source / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for words, want in {"day": 0, "day:test": 1, "night:train": 2, "night:test": 3}.items():
        assert kept(fetch_images(f"hf:{source}:{words}", 3, tmp_path / words.replace(":", "-"))) == [files[want]]
    for words in ("", ":test"):
        with pytest.raises(ValueError, match="has the configs day, night"):
            fetch_images(f"hf:{source}{words}", 3, tmp_path / "none")
    with pytest.raises(ValueError, match="'dusk' is none of its configs day, night"):
        fetch_images(f"hf:{source}:dusk:test", 3, tmp_path / "none")


SPLITS = ("train", "test")


def test_a_folder_holds_the_images_of_one_data_set(source, tmp_path, monkeypatch):
    as_files(source, pictures(3))
    (tmp_path / "other").mkdir()
    as_files(tmp_path / "other", pictures(2, "BMP"))
    with pytest.raises(ValueError, match="cannot be read"):  # which leaves the folder to be used
        fetch_images(f"hf:{tmp_path}/none", 3, tmp_path / "kept")
    first = kept(fetch_images(f"hf:{source}", 3, tmp_path / "kept"))
    with pytest.raises(SettingsDiffer, match="data_set"):
        fetch_images(f"hf:{tmp_path}/other", 3, tmp_path / "kept")
    with pytest.raises(SettingsDiffer, match="images"):
        fetch_images(f"hf:{source}", 2, tmp_path / "kept")
    monkeypatch.setattr(datasets, "load_dataset", None)  # what is there whole is not asked for again
    assert kept(fetch_images(f"hf:{source}", 3, tmp_path / "kept")) == first


def test_a_full_disk_is_no_fault_of_the_data_set_and_the_next_run_goes_on(source, tmp_path, monkeypatch):
    files = pictures(3)
    as_files(source, files)
    from training.common import hub_images

    write = hub_images.write_atomically

    def full(path, data):
        if path.name.startswith("000001"):
            raise OutputError(28, "no room")
        write(path, data)

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="no room"):
        patch.setattr(hub_images, "write_atomically", full)
        fetch_images(f"hf:{source}", 3, tmp_path / "kept")
    assert kept(fetch_images(f"hf:{source}", 3, tmp_path / "kept")) == files


@pytest.mark.slow
def test_processes_that_start_at_once_share_one_fetch(source, tmp_path):
    files = pictures(40)
    as_files(source, files)
    code = (
        "import os, sys, time; from pathlib import Path; from training.common.hub_images import fetch_images\n"
        "import datasets\nprint('ready', flush=True)\n"
        "while not os.path.exists(sys.argv[3]):\n    time.sleep(0.01)\n"
        "fetch_images(sys.argv[1], 40, Path(sys.argv[2]))"
    )
    words = ["-c", code, f"hf:{source}", str(tmp_path / "kept"), str(tmp_path / "go")]
    started = [Python(*words) for _ in range(3)]
    assert [process.stdout.readline() for process in started] == ["ready\n"] * 3
    (tmp_path / "go").touch()
    said = [process.communicate() for process in started]
    assert [process.wait() for process in started] == [0, 0, 0], said
    assert kept(tmp_path / "kept") == files and not list((tmp_path / "kept").glob(".*.tmp"))
