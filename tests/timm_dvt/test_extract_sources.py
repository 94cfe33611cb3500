"""Claims about what `timm-dvt extract` takes: an image, a list, a video, a streamed data set."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

import timm_dvt
from tests.helpers.photographs import MODEL, write_pictures
from timm_dvt.__main__ import main
from timm_dvt.errors import UserError
from timm_dvt.extraction import video

OPTIONS = ["--model", MODEL, "--no-pretrained", "--size", "64"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("photographs"), 20)


@pytest.fixture(scope="module")
def of_folder(photographs, tmp_path_factory):
    out = tmp_path_factory.mktemp("features")
    assert main(["extract", str(photographs), "--out", str(out), *OPTIONS]) == 0
    return timm_dvt.open_features(out)


def extract(source, out, *options):
    assert main(["extract", str(source), "--out", str(out), *OPTIONS, *options]) == 0
    return timm_dvt.open_features(out)


def same(first, second):
    return np.allclose(first.astype(np.float32), second.astype(np.float32), atol=2e-3)


def test_an_image_and_a_list_of_paths(photographs, of_folder, tmp_path):
    image = extract(photographs / "0000.png", tmp_path / "image")
    assert list(image) == ["0000.png"] and same(image["0000.png"], of_folder["0000.png"])
    (tmp_path / "list.txt").write_text(f"{photographs}/sub/0001.png\nmissing.png\n{photographs}/0002.png\n")
    listed = extract(tmp_path / "list.txt", tmp_path / "listed", "--format", "npy")
    assert [os.path.basename(name) for name in listed] == ["0001.png", "0002.png"]
    assert same(listed[f"{photographs}/sub/0001.png"], of_folder["sub/0001.png"])
    assert list(listed.errors) == ["missing.png"]


def test_a_folder_that_is_filled_within_the_source_is_no_source(photographs, tmp_path):
    source = write_pictures(tmp_path / "photographs", 3)
    for _ in range(2):
        assert len(extract(source, source / "features", "--pictures")) == 3


def test_pictures_of_another_extraction_are_no_source(photographs, tmp_path):
    shutil.copytree(photographs, tmp_path / "images")
    extract(tmp_path / "images", tmp_path / "images" / "features", "--pictures")
    assert len(extract(tmp_path / "images", tmp_path / "out")) == 20
    shown = extract(tmp_path / "images" / "features" / "pictures", tmp_path / "of pictures")
    assert len(shown) == 20  # unless they are asked for


def test_files_that_were_changed_or_mended_are_taken_again(photographs, of_folder, tmp_path, capsys):
    images = shutil.copytree(photographs, tmp_path / "images")
    broken = (images / "0000.png").read_bytes()
    (images / "0000.png").write_bytes(bytes(len(broken)))
    first = extract(images, tmp_path / "out")
    assert "0000.png" not in first
    (images / "0000.png").write_bytes(broken)
    shutil.copyfile(photographs / "0004.png", images / "0002.png")
    again = extract(images, tmp_path / "out")
    assert "taken again: 1 shard with images that have changed" in capsys.readouterr().out
    assert list(again) == list(of_folder) and same(again["0000.png"], of_folder["0000.png"])
    assert same(again["0002.png"], of_folder["0004.png"]) and not same(again["0002.png"], of_folder["0002.png"])
    assert (tmp_path / "out" / "errors.jsonl").read_text() == ""
    extract(images, tmp_path / "out")
    assert "others now" not in capsys.readouterr().out


def test_a_folder_of_other_images_is_left_as_it_is_and_said_in_plain_words(photographs, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for name in ("0000.png", "0002.png"):
        shutil.copyfile(photographs / name, images / name)
    extract(images, out)
    before = (out / "settings.json").read_bytes()

    def said(source):
        assert main(["extract", str(source), "--out", str(out), *OPTIONS]) == 2
        assert (out / "settings.json").read_bytes() == before
        error = capsys.readouterr().err
        assert f"the images are not those that {out} was begun with" in error and "sha256" not in error
        return error

    (images / "0002.png").rename(images / "new.png")
    assert "(2 images then, 2 images now; names or their order differ)" in said(images)
    (images / "new.png").unlink()
    assert "(2 images then, 1 image now)" in said(images)
    pytest.importorskip("imageio.v2").mimwrite(tmp_path / "clip.mp4", np.zeros((3, 32, 32, 3), np.uint8))
    assert f"then, clip.mp4 of {(tmp_path / 'clip.mp4').stat().st_size} bytes now" in said(tmp_path / "clip.mp4")
    shutil.copyfile(photographs / "0002.png", images / "0002.png")
    assert len(extract(images, out)) == 2


def test_files_that_were_changed_and_have_their_size_still_are_taken_again(photographs, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("0002", "0004"):
        Image.open(photographs / f"{name}.png").resize((64, 64)).save(images / f"{name}.bmp")
    first = extract(images, tmp_path / "out")
    extract(images, tmp_path / "out")
    assert "taken again" not in capsys.readouterr().out
    shutil.copyfile(images / "0002.bmp", images / "0004.bmp")
    again = extract(images, tmp_path / "out")
    assert "taken again: 1 shard" in capsys.readouterr().out
    assert same(again["0002.bmp"], first["0002.bmp"]) and same(again["0004.bmp"], first["0002.bmp"])


def test_of_an_image_that_is_broken_now_nothing_is_left(photographs, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("0002.png", "0004.png"):
        shutil.copyfile(photographs / name, images / name)
    extract(images, tmp_path / "out", "--format", "npy", "--pictures")
    files = {path.name for path in (tmp_path / "out").rglob("000*")}
    assert files == {"0002.png.npy", "0004.png.npy", "0002.png.png", "0004.png.png"}
    (images / "0004.png").write_bytes(b"broken")
    assert list(extract(images, tmp_path / "out", "--format", "npy", "--pictures")) == ["0002.png"]
    assert {path.name for path in (tmp_path / "out").rglob("000*")} == {"0002.png.npy", "0002.png.png"}


def test_a_video_gives_frames_in_order_and_a_video_of_their_colors(tmp_path):
    imageio = pytest.importorskip("imageio.v2")
    frames = [np.full((64, 96, 3), 5 * i, np.uint8) for i in range(40)]
    with imageio.get_writer(tmp_path / "clip.mp4", fps=20, macro_block_size=2) as writer:
        for frame in frames:
            writer.append_data(frame)
    features = extract(tmp_path / "clip.mp4", tmp_path / "out", "--pictures", "--keep-aspect")
    assert list(features) == [f"{i:06d}" for i in range(40)] and features["000000"].shape == (3, 4, 64)
    Image.fromarray(frames[33]).save(tmp_path / "frame.png")
    still = extract(tmp_path / "frame.png", tmp_path / "still", "--keep-aspect")["frame.png"].astype(float)
    apart = [float(np.linalg.norm(features[name] - still)) for name in features]
    assert abs(int(np.argmin(apart)) - 33) <= 1
    with imageio.get_reader(tmp_path / "out" / "pictures.mp4") as colors:
        assert colors.get_meta_data()["fps"] == 20 and sum(1 for _ in colors) == 40
    xarray = pytest.importorskip("xarray")
    assert xarray.open_zarr(tmp_path / "out" / "features.zarr").features.shape == (40, 4, 4, 64)


def write_of_variable_rate(path, count):
    """A video that is dark in the second half, where a phone shows each frame three times as long; frame i is 6i."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    frames = b"".join(np.full((32, 32), 6 * i, np.uint8).tobytes() for i in range(count))
    times = f"settb=1/90000,setpts='if(lt(N,{count // 2}),N,{count // 2}+3*(N-{count // 2}))*3000'"
    given = "-f rawvideo -pix_fmt gray -s 32x32 -r 30 -i -".split()
    for mode in (["-fps_mode", "passthrough"], ["-vsync", "0"]):  # which has the second name before ffmpeg 5.1
        options = ["-vf", times, *mode, "-enc_time_base", "1/90000", "-pix_fmt", "yuv420p", "-g", "1"]
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *given, *options, str(path)]
        if subprocess.run(command, input=frames, capture_output=True).returncode == 0:
            return
    pytest.skip("this ffmpeg writes no video of a variable rate")


def test_of_a_video_of_variable_rate_each_frame_is_taken_once(tmp_path):
    write_of_variable_rate(tmp_path / "dark.mp4", 40)
    brightness = [float(frame.mean()) for frame in video.video_frames(tmp_path / "dark.mp4")]
    np.testing.assert_allclose(brightness, 6.0 * np.arange(40), atol=3)
    assert 40 / video.video_rate(tmp_path / "dark.mp4") == pytest.approx((20 + 3 * 20) / 30, rel=0.1)  # seconds


def test_an_ffmpeg_that_knows_the_option_by_its_old_name_is_asked_by_it(tmp_path, monkeypatch):
    imageio = pytest.importorskip("imageio.v2")
    imageio.mimwrite(tmp_path / "clip.mp4", np.zeros((3, 32, 32, 3), np.uint8))
    asked, get_reader = [], imageio.get_reader

    def old(source, output_params=()):
        asked.append(list(output_params))
        if "-fps_mode" in output_params:
            raise OSError("Could not load meta information\nUnrecognized option 'fps_mode'.")
        return get_reader(source)

    monkeypatch.setattr(imageio, "get_reader", old)
    assert len(list(video.video_frames(tmp_path / "clip.mp4"))) == 3
    assert asked[-1] == ["-vsync", "0"]


def test_a_gif_which_ffmpeg_does_not_read_is_read(tmp_path):
    pytest.importorskip("imageio.v2")
    first, *rest = (Image.new("RGB", (32, 32), (40 * i, 0, 0)) for i in range(5))
    first.save(tmp_path / "clip.gif", save_all=True, append_images=rest, duration=100)
    assert [int(frame[0, 0, 0]) for frame in video.video_frames(tmp_path / "clip.gif")] == [0, 40, 80, 120, 160]


def test_a_data_set_is_streamed(photographs, of_folder, tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    for path in photographs.glob("*.png"):
        (tmp_path / "set" / path.name).write_bytes(path.read_bytes())
    features = extract(f"hf:{tmp_path / 'set'}", tmp_path / "out")
    names = [name for name in of_folder if "/" not in name]
    assert list(features) == [f"{i:06d}" for i in range(len(names))]
    assert all(same(features[number], of_folder[name]) for number, name in zip(features, names))


def test_images_of_a_data_set_are_named_by_their_rows_also_where_some_have_none(photographs, of_folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [str(photographs / name) if name else None for name in ("0000.png", None, "0002.png", "0004.png", None)]
    data = datasets.Dataset.from_dict({"image": rows}, datasets.Features({"image": datasets.Image()}))
    data.to_parquet(tmp_path / "set" / "train.parquet")
    features = extract(f"hf:{tmp_path / 'set'}", tmp_path / "out")
    assert list(features) == ["000000", "000002", "000003"] and same(features["000003"], of_folder["0004.png"])
    assert features.errors == {"000001": "row 1 has no image", "000004": "row 4 has no image"}
    settings = tmp_path / "out" / "settings.json"  # of a folder that named images by how many came before
    said = json.loads(settings.read_text())
    del said["images"]["names"]
    settings.write_text(json.dumps(said))
    with pytest.raises(UserError, match="names or their order differ"):
        timm_dvt.extract(f"hf:{tmp_path / 'set'}", "test_vit", str(tmp_path / "out"), pretrained=False)


def test_of_a_data_set_that_says_its_length_the_disk_need_is_said_first(photographs, tmp_path, capsys):
    pytest.importorskip("datasets")
    picture = (photographs / "0000.png").read_bytes()
    for i in range(3):
        (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "data" / f"{i}.png").write_bytes(picture)
    features, splits = "- name: image\n    dtype: image", "- name: train\n    num_examples: 3"
    said = f"dataset_info:\n  features:\n  {features}\n  splits:\n  {splits}\n"
    (tmp_path / "set" / "README.md").write_text(f"---\n{said}---\n")
    assert len(extract(f"hf:{tmp_path / 'set'}", tmp_path / "out")) == 3
    assert "disk: 3 images of 2.05 KB, 6.14 KB to be written" in capsys.readouterr().out


@pytest.mark.parametrize("source, said", [("nowhere", "does not exist"), ("hf:nobody/nothing", "cannot be read")])
def test_a_source_that_is_none_is_one_clear_line(source, said, tmp_path, capsys):
    assert main(["extract", source, "--out", str(tmp_path / "out"), *OPTIONS]) == 2
    assert said in capsys.readouterr().err
