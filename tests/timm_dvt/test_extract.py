"""Claims about `timm-dvt extract`: what it writes is what timm's own loop gives, whatever else lies in the folder."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import timm_dvt
from tests.helpers.photographs import BROKEN, MODEL, write_broken, write_pictures
from timm_dvt.__main__ import main
from timm_dvt.extraction.formats import file_of


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = write_pictures(tmp_path_factory.mktemp("photographs"), 37)
    write_broken(folder)
    return folder


def extract(source, out, *options, model=MODEL) -> int:
    return main(
        ["extract", str(source), "--model", model, "--out", str(out), "--no-pretrained", "--size", "64", *options]
    )


def timms(photographs, names, indices=1, **arguments):
    """Maps (H, W, C) by name, of a plain loop over timm's model in float32."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, dynamic_img_size=True, **arguments).eval()
    transform = create_transform(**{**resolve_model_data_config(model), "input_size": (3, 64, 64)})
    maps = {}
    for name in names:
        with torch.no_grad():
            image = transform(Image.open(photographs / name).convert("RGB"))[None]
            found = model.forward_intermediates(image, indices=indices, norm=True, intermediates_only=True)
        maps[name] = [one[0].permute(1, 2, 0).numpy() for one in found]
    return maps


def good(photographs):
    names = sorted(path.relative_to(photographs).as_posix() for path in photographs.rglob("*.*g"))
    return [name for name in names if name not in BROKEN]


@pytest.mark.parametrize("kind", ["zarr", "safetensors", "npy", "parquet"])
def test_float32_maps_are_those_of_timms_own_loop_in_every_format(photographs, tmp_path, kind, capsys):
    assert extract(photographs, tmp_path / "out", "--dtype", "float32", "--format", kind) == 0
    features = timm_dvt.open_features(tmp_path / "out")
    assert list(features) == good(photographs) and set(features.errors) == set(BROKEN)
    for name, (wanted,) in timms(photographs, features).items():
        np.testing.assert_allclose(features[name], wanted, atol=2e-5)
    lines = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == list(BROKEN)
    said = capsys.readouterr().out
    assert all(f"left out {name}:" in said for name in BROKEN) and "to be written" in said


def test_xarray_opens_zarr_with_named_dimensions_names_and_sizes(photographs, tmp_path):
    xarray = pytest.importorskip("xarray")
    assert extract(photographs, tmp_path / "out", "--class-token") == 0
    data = xarray.open_zarr(tmp_path / "out" / "features.zarr")
    features = timm_dvt.open_features(tmp_path / "out")
    assert data.features.dims == ("image", "y", "x", "channel") and data.features.dtype == np.float16
    assert data.class_token.dims == ("image", "channel")
    assert data.attrs["model"] == MODEL and data.attrs["denoised"] == [False] and len(data.attrs["weights"]) == 64
    for name in features:
        row = data.sel(image=name)
        np.testing.assert_array_equal(row.features, features[name])
        assert (int(row.height), int(row.width)) == Image.open(photographs / name).size[::-1]
        assert (int(row.height), int(row.width)) == features.image_size(name)
    assert np.isnan(data.features.sel(image="text.jpg")).all() and int(data.height.sel(image="text.jpg")) == 0


def test_numpy_and_pandas_open_theirs(photographs, tmp_path):
    pandas = pytest.importorskip("pandas")
    assert extract(photographs, tmp_path / "npy", "--format", "npy") == 0
    assert extract(photographs, tmp_path / "parquet", "--format", "parquet", "--class-token") == 0
    name = good(photographs)[20]
    wanted = np.load(tmp_path / "npy" / "features" / f"{name}.npy")
    table = pandas.read_parquet(tmp_path / "parquet" / "features")
    rows = table[table.image == name]
    np.testing.assert_array_equal(np.stack(rows.feature).reshape(wanted.shape), wanted)
    assert list(rows.y) == sorted(rows.y) and set(rows.x) == set(range(wanted.shape[1]))
    assert list(pandas.read_parquet(tmp_path / "parquet" / "class_token").image) == good(photographs)


def test_a_pytorch_data_set_gives_batches(photographs, tmp_path):
    assert extract(photographs, tmp_path / "out") == 0
    data = timm_dvt.open_features(tmp_path / "out").dataset(lambda maps: maps.float().mean((0, 1)))
    loader = torch.utils.data.DataLoader(data, batch_size=8, num_workers=1)
    batch = next(iter(loader))
    features = timm_dvt.open_features(tmp_path / "out")
    assert batch["name"] == list(features)[:8] and batch["features"].shape == (8, 64)
    means = [features[name].astype(np.float32).mean((0, 1)) for name in batch["name"]]
    np.testing.assert_allclose(batch["features"], means, atol=1e-3)


def test_a_path_from_elsewhere_stays_within_the_folder():
    assert file_of("../../etc/x.jpg", ".npy") == "%2E%2E/%2E%2E/etc/x.jpg.npy"
    assert file_of("/etc/x.jpg", ".npy") == "%2Fetc/x.jpg.npy"


def test_a_name_as_long_as_a_file_may_have_gives_files_that_are_found(tmp_path):
    (tmp_path / "images" / "f" / ("f" * 255)).mkdir(parents=True)
    names = ["x" + "é" * 125 + ".png", "x" + "é" * 124 + "ab.png", f"f/{'f' * 255}/a.png", "b" * 247 + ".png"]
    for i, name in enumerate(names):
        Image.new("RGB", (64, 64), (60 * i, 0, 0)).save(tmp_path / "images" / name)
    assert extract(tmp_path / "images", tmp_path / "out", "--format", "npy", "--pictures") == 0
    assert extract(tmp_path / "images", tmp_path / "zarr") == 0
    features, wanted = (timm_dvt.open_features(tmp_path / folder) for folder in ("out", "zarr"))
    assert list(features) == sorted(names) and not features.errors
    for name in names:
        np.testing.assert_array_equal(features[name], wanted[name])
    assert len(list((tmp_path / "out" / "pictures").rglob("*.png"))) == 4


@pytest.mark.parametrize("long", ["a" * 300, "é" * 300, "x" + "é" * 300])
def test_names_too_long_for_a_file_are_cut_between_letters_and_stay_apart(long):
    for file in (file_of(f"folder/{long}", ".npy"), file_of(f"{long}/b.png", ".npy"), file_of(f"/{long}", ".npy")):
        longest = max(file.split("/"), key=len)
        assert len(longest.encode()) in (254, 255) and longest.removeprefix("%2F").startswith(long[:100])
    assert file_of(long + "1", ".npy") != file_of(long + "2", ".npy")
