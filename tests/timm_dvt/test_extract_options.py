"""Claims about options of `timm-dvt extract`: states of the denoiser, blocks, shapes, a basis, pictures, refusals."""

import errno
import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.numpy import load_file
from timm.data import create_transform, resolve_model_data_config

import timm_dvt
from tests.helpers.photographs import MODEL, denoised_folder, write_pictures
from timm_dvt import shared_folder
from timm_dvt.__main__ import main
from timm_dvt.errors import UserError
from timm_dvt.weights import files


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("photographs"), 12)


@pytest.fixture(scope="module")
def denoised(tmp_path_factory):
    return f"local-dir:{denoised_folder(tmp_path_factory.mktemp('model'))}"


@pytest.fixture
def extract(photographs, tmp_path):
    """Runs the command in float32; gives its features, or its exit code where it failed."""

    def run(*options, model=MODEL, source=photographs, folder="out"):
        options = ["--model", model, "--dtype", "float32", *options]
        failed = main(["extract", str(source), "--out", str(tmp_path / folder), *options])
        return failed or timm_dvt.open_features(tmp_path / folder)

    return run


def test_both_gives_the_maps_with_the_denoiser_on_and_off(extract, denoised, photographs, tmp_path):
    features = extract("--both", model=denoised)
    raw = timm_dvt.open_features(tmp_path / "out", "features_raw")
    on, off = (extract(f"--{flag}", model=denoised, folder=flag) for flag in ("denoise", "no-denoise"))
    model = timm.create_model(denoised, pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    for name in features:
        with torch.no_grad():
            tokens = model.forward_features(transform(Image.open(photographs / name).convert("RGB"))[None])[0, 1:]
        np.testing.assert_allclose(features[name], tokens.unflatten(0, (4, 4)), atol=2e-5)
        np.testing.assert_array_equal(features[name], on[name])
        np.testing.assert_array_equal(raw[name], off[name])
        assert np.abs(on[name] - off[name]).max() > 0.1
    assert features.settings["denoised"] == [True, False] and off.settings["denoised"] == [False]


def test_blocks_are_final_normed_and_the_last_is_what_is_opened(extract, denoised, photographs, tmp_path):
    features = extract("--blocks", "all", "--no-denoise", model=denoised)
    plain = extract("--no-denoise", model=denoised, folder="plain")
    inner = timm_dvt.open_features(tmp_path / "out", "block_0")
    model = timm.create_model(denoised, pretrained=True).eval()
    assert features.variable == "block_1"
    for name in features:
        np.testing.assert_array_equal(features[name], plain[name])
        lengths = inner[name] - model.norm.bias.detach().numpy()
        assert np.linalg.norm(lengths / model.norm.weight.detach().numpy(), axis=-1) == pytest.approx(8, rel=1e-2)


def test_keep_aspect_gives_grids_of_the_images_shapes_nothing_distorted(extract, photographs):
    xarray = pytest.importorskip("xarray")
    options = ("--keep-aspect", "--size", "64", "--no-pretrained")
    features = extract(*options)
    shapes = {Image.open(photographs / name).size: features[name].shape for name in features}
    assert shapes == {(64, 48): (3, 4, 64), (32, 64): (4, 2, 64)}
    name = next(name for name in features if features[name].shape[:2] == (4, 2))
    row = xarray.open_zarr(features.folder / "features.zarr").features.sel(image=name)
    np.testing.assert_array_equal(row[: int(row.rows), : int(row.columns)], features[name])
    assert np.isnan(row[:, 2:]).all()
    torch.manual_seed(0)
    model = timm.create_model(MODEL, dynamic_img_size=True).eval()
    pixels = torch.from_numpy(np.array(Image.open(photographs / name))).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(features.settings[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        (wanted,) = model.forward_intermediates((pixels - mean) / std, indices=1, norm=True, intermediates_only=True)
    np.testing.assert_allclose(features[name], wanted[0].permute(1, 2, 0), atol=2e-5)
    for kind in ("npy", "parquet"):
        other = extract(*options, "--format", kind, folder=kind)
        assert all(np.array_equal(other[name], features[name]) for name in features)


def test_keep_aspect_refuses_what_it_would_cut_a_patch_or_more_off_and_says_which_size_keeps_it(
    extract, tmp_path, capsys
):
    (tmp_path / "images").mkdir()
    for width in (64, 78, 330):  # 78 x 16: of 4.9 patches 4 are kept
        Image.new("RGB", (width, 16), "red").save(tmp_path / "images" / f"{width:03d}.png")
    for _ in range(2):
        features = extract("--keep-aspect", "--size", "64", "--no-pretrained", source=tmp_path / "images")
        assert {name: features[name].shape for name in features} == {"064.png": (1, 4, 64), "078.png": (1, 4, 64)}
        needed = "330 x 16 pixels are too narrow for --keep-aspect at --size 64: they take --size 320 or more"
        assert features.errors["330.png"].startswith(needed)
        assert "taken again" not in capsys.readouterr().out
    narrow = extract("--keep-aspect", "--size", "320", "--no-pretrained", source=tmp_path / "images", folder="larger")
    assert narrow["330.png"].shape == (1, 20, 64) and not narrow.errors
    capsys.readouterr()
    alone = tmp_path / "images" / "330.png"
    assert extract("--keep-aspect", "--size", "304", "--no-pretrained", source=alone, folder="smaller") == 2
    assert "none of the 1 images can be used (330.png: 330 x 16 pixels are too narrow" in capsys.readouterr().err


def test_pca_keeps_the_components_of_one_stored_basis(extract):
    from sklearn.decomposition import PCA

    options = ("--size", "64", "--no-pretrained", "--class-token")
    whole, features = extract(*options), extract(*options, "--pca", "3", folder="pca")
    rows = np.concatenate([whole[name].reshape(-1, 64) for name in whole])
    wanted = PCA(3).fit(rows)
    basis = load_file(features.folder / "basis.safetensors")
    for name in features:
        found = (whole[name] - basis["features.mean"]) @ basis["features.components"].T
        np.testing.assert_allclose(features[name], found, atol=1e-4)
        scores = wanted.transform(whole[name].reshape(-1, 64)).reshape(features[name].shape)
        np.testing.assert_allclose(np.abs(features[name]), np.abs(scores), atol=1e-3)
    assert features.variables["class_token"] == (64,)


def test_pictures_have_one_basis_for_all(extract, photographs):
    features = extract("--pictures", "--keep-aspect", "--size", "64", "--no-pretrained")
    names = {path.relative_to(features.folder / "pictures").as_posix() for path in features.folder.rglob("*.png")}
    assert names == {f"{name}.png" for name in features}
    rows, colors = zip(
        *(
            (
                features[name].reshape(-1, 64),
                _patches(features.folder / "pictures" / f"{name}.png", features[name].shape),
            )
            for name in features
        )
    )
    design = np.c_[np.concatenate(rows), np.ones(sum(map(len, rows)))]
    wanted = np.concatenate(colors)
    inside = ((wanted > 0) & (wanted < 255)).all(1)  # where colors are not clipped they are linear in the features
    basis = load_file(features.folder / "basis.safetensors")
    values = (design[:, :-1] - basis["features.color.mean"]) @ basis["features.color.axes"]
    low, high = basis["features.color.low"], basis["features.color.high"]
    np.testing.assert_allclose(wanted[inside], 255 * ((values - low) / (high - low))[inside], atol=0.51)


def _patches(path, shape):
    picture = np.asarray(Image.open(path)).astype(float)
    times = picture.shape[0] // shape[0]
    return picture[times // 2 :: times, times // 2 :: times].reshape(-1, 3)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--denoise"], "has no denoiser"),
        (["--size", "50"], "multiple of 16"),
        (["--blocks", "77"], "blocks 0 to"),
        (["--pca", "65"], "have not so many components"),
        (["--model", "vit_smal_patch16_224"], "did you mean"),
        (["--model", "resnet18"], "A ResNet gives no features to extract"),
        (["--model", "hiera_tiny_224", "--size", "224", "--blocks", "0"], "timm norms no blocks of a Hiera"),
        (["--model", "vit_base_patch16_siglip_224", "--class-token", "--size", "32"], "no class token"),
        (["--device", "cuda:77"], "device"),
    ],
)
def test_what_cannot_be_is_one_clear_line(extract, options, said, capsys):
    assert extract("--size", "64", "--no-pretrained", *options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert said in line


@pytest.mark.parametrize(
    "setting, said",
    [
        ({"states": "off"}, "states must be None or one of ('on',), ('off',), ('on', 'off'), got 'off'"),
        ({"format": "csv"}, "format must be one of zarr"),
        ({"dtype": "bfloat16"}, "dtype must be one of float16, float32"),
        ({"size": 0}, "size must be 1 or more"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"blocks": "0,5"}, "blocks must be None"),
        ({"blocks": 5}, "blocks must be None"),
        ({"part": (3, 2)}, "part must be"),
        ({"model": timm.create_model("test_vit")}, "local-dir:FOLDER"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_python_refuses_what_the_command_line_cannot_say(photographs, tmp_path, setting, said):
    with pytest.raises(UserError) as error:
        timm_dvt.extract(str(photographs), **{"model": MODEL, "out": str(tmp_path / "out"), **setting})
    assert said in str(error.value) and not (tmp_path / "out").exists()


def test_a_class_whose_blocks_timm_does_not_norm_gives_its_features(photographs, tmp_path):
    torch.manual_seed(0)
    small = {"embed_dim": 32, "num_heads": 1, "stages": (1, 1, 1, 1), "img_size": 64}
    model = timm_dvt.add_denoiser(timm.create_model("hiera_tiny_224", **small), arch="static").eval()
    torch.nn.init.normal_(model.denoiser.pos_embed)
    name = f"local-dir:{timm_dvt.save_pretrained(model, tmp_path / 'model', model_args=small)}"
    image = photographs / "0000.png"
    timm_dvt.extract(str(image), name, str(tmp_path / "out"), states=("on", "off"), dtype="float32")
    config = resolve_model_data_config(timm.create_model(name))
    pixels = create_transform(**config, is_training=False)(Image.open(image).convert("RGB"))
    for variable, denoise in (("features", True), ("features_raw", False)):
        with torch.no_grad(), model.denoising(denoise):
            wanted = model.forward_features(pixels[None]).reshape(2, 2, -1)
        np.testing.assert_allclose(timm_dvt.open_features(tmp_path / "out", variable)["0000.png"], wanted, atol=2e-5)


@pytest.mark.parametrize("kind", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_maps_are_normed_where_timm_norms_behind_its_pool_too(kind, photographs, tmp_path):
    """The same in both states: what the denoiser is given is normed, and what there is without it has to be."""
    torch.manual_seed(0)
    small = {"embed_dim": 64, "num_heads": 1, "depth": 2, "img_size": 64, "patch_size": 16, "global_pool": "avg"}
    model = timm.create_model(kind, **small).eval()
    for parameter in model.fc_norm.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    timm_dvt.add_denoiser(model, arch="static")
    name = f"local-dir:{timm_dvt.save_pretrained(model, tmp_path / 'm', model_args=small)}"
    image = photographs / "0000.png"
    options = dict(states=("on", "off"), dtype="float32", blocks=(0, 1), class_token=True)
    timm_dvt.extract(str(image), name, str(tmp_path / "out"), **options)
    config = resolve_model_data_config(timm.create_model(name))
    pixels = create_transform(**config, is_training=False)(Image.open(image).convert("RGB"))
    with torch.no_grad(), model.denoising(False):  # of a static denoiser, which takes off a map of zeros
        first, last = model.forward_intermediates(pixels[None], intermediates_only=True, output_fmt="NLC")
        token = model.fc_norm(model.forward_features(pixels[None])[0, 0])
    for block, maps in (("block_0", first), ("block_1", last), ("block_0_raw", first), ("block_1_raw", last)):
        wanted = model.fc_norm(maps).detach().reshape(4, 4, 64)
        np.testing.assert_allclose(timm_dvt.open_features(tmp_path / "out", block)["0000.png"], wanted, atol=2e-5)
    found = timm_dvt.open_features(tmp_path / "out", "class_token")["0000.png"]
    np.testing.assert_allclose(found, token.detach(), atol=2e-5)


@pytest.mark.parametrize("states", [("on", "off"), ("on",)])
def test_patches_without_texture_are_leveled_with_one_pass_of_the_backbone_too(states, tmp_path):
    torch.manual_seed(0)
    small = {"embed_dim": 64, "num_heads": 1, "depth": 2, "img_size": 64}
    model = timm_dvt.add_denoiser(timm.create_model("vit_tiny_patch16_224", **small), flat_gate=True).eval()
    name = f"local-dir:{timm_dvt.save_pretrained(model, tmp_path / 'model', model_args=small)}"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    pixels[:, :48] = 99
    Image.fromarray(pixels).save(tmp_path / "wall.png")
    timm_dvt.extract(str(tmp_path / "wall.png"), name, str(tmp_path / "out"), states=states, dtype="float32")
    inputs = create_transform(**resolve_model_data_config(timm.create_model(name)), is_training=False)(
        Image.open(tmp_path / "wall.png")
    )[None]
    with torch.no_grad():
        wanted = model.forward_features(inputs)[0, 1:].reshape(4, 4, -1)
        model.denoiser.flat_below = None
        assert np.abs(model.forward_features(inputs)[0, 1:].reshape(4, 4, -1) - wanted).max() > 0.05
    np.testing.assert_allclose(timm_dvt.open_features(tmp_path / "out")["wall.png"], wanted, atol=2e-5)


def test_a_folder_of_other_settings_is_refused_and_one_that_is_none_is_not_opened(extract, capsys, tmp_path):
    extract("--size", "64", "--no-pretrained")
    assert extract("--size", "48", "--no-pretrained") == 2
    assert "size: the folder has [64, 64], this run has [48, 48]" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no folder of `timm-dvt extract`"):
        timm_dvt.open_features(tmp_path)
    with pytest.raises(ValueError, match="variable must be one of features; got 'depth'"):
        timm_dvt.open_features(tmp_path / "out", "depth")


def test_a_system_without_posix_locks_is_told_to_work_alone_and_works(extract, denoised, monkeypatch):
    """As on Windows: no fcntl, no pread, no folders that can be opened."""
    opened = os.open

    def open_file(path, *options, **more):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *options, **more)

    for module in (shared_folder, files):
        monkeypatch.setattr(module, "fcntl", None)
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.delattr(os, "pread")
    with pytest.warns(UserWarning, match="only one process"):
        for _ in range(2):  # the second time it is there
            assert len(extract(model=denoised)) == 12
