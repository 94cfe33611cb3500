"""Claims about pictures and videos: every kind is drawn, shows what it says, and says what it left out."""

import re
from contextlib import contextmanager
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from timm_dvt.extraction.video import video_rate
from timm_dvt.image_files import list_images, load_image
from timm_dvt.loading import load_model
from timm_dvt.viewer import pairs
from timm_dvt.viewer.colors import fit_projection
from training import visualize
from training.common.backbone import FeatureReader
from training.figures import video
from training.figures.panels import Row, draw_positional, draw_stage1
from training.figures.video import draw_video, read_frames, side_by_side
from training.stage1.decompose import Stage1Settings
from training.visualize import positional_maps, video_maps

SMALL = ["--model", "test_vit", "--no-pretrained", "--input-size", "64", "--views", "24"]


@pytest.fixture()
def frames(tmp_path):
    """Five frames, 40 x 60, of a bright square that moves to the right."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(5):
        frame = np.full((40, 60, 3), (30, 60, 90), np.uint8)
        frame[10:30, 8 * i : 8 * i + 20] = (250, 180, 20)
        Image.fromarray(frame).save(folder / f"{i:03}.png")
    return folder


@pytest.mark.parametrize(("options", "rows"), [(["--layers", "all", "--limit", "1"], 6), (["--layers", "0", "-1"], 4)])
def test_stage1_panel_has_a_row_for_each_image_and_layer(frames, tmp_path, options, rows, monkeypatch):
    drawn = []
    monkeypatch.setattr(visualize, "draw_stage1", lambda r, *rest: drawn.extend(r) or draw_stage1(r[:1], *rest))
    images = [str(frames / "000.png"), str(frames / "004.png")]
    out = tmp_path / "new folder" / "picture.png"
    assert visualize.main([*images, *SMALL, "--out", str(out), *options]) == 0
    assert len(drawn) == rows
    assert Image.open(out).size[0] > 850
    for row in drawn:
        assert row.image.shape == (64, 64, 3) and row.raw.shape == (4, 4, 64)
        np.testing.assert_allclose(row.raw, row.clean + row.artifacts + row.residual, atol=1e-4)


def test_f_can_be_drawn_between_the_patches_and_a_name_without_a_suffix_is_a_png(frames, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(visualize, "draw_stage1", lambda r, *rest: drawn.extend(r) or draw_stage1(r, *rest))
    command = [str(frames / "000.png"), *SMALL, "--out", str(tmp_path / "picture"), "--resolution", "13"]
    assert visualize.main(command) == 0
    (row,) = drawn
    assert row.clean.shape == (13, 13, 64) and row.raw.shape == (4, 4, 64)
    assert capsys.readouterr().out.strip() == str(tmp_path / "picture.png")
    assert Image.open(tmp_path / "picture.png").size[0] > 1200


def test_no_text_of_a_panel_is_cut_or_lies_on_another():
    generator = np.random.default_rng(0)
    maps = [generator.normal(size=(5, 5, 8)) * 1e5 for _ in range(4)]
    assert_texts_apart(draw_stage1([Row("a_very_long_name_of_an_image.jpeg, block 11", np.ones((8, 8, 3)), *maps)] * 2))


def assert_texts_apart(figure):
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.texts]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        for other in boxes[:i]:
            assert not box.overlaps(other)


@pytest.mark.parametrize("resolution", [5, 15])
def test_a_panel_has_the_colors_of_the_demo_and_one_scale_for_raw_and_clean_features(resolution):
    """Also where F is drawn between the patches."""
    generator = np.random.default_rng(0)
    raw, artifacts, residual = (generator.normal(size=(5, 5, 8)) for _ in range(3))
    clean = 3 * generator.normal(size=(resolution, resolution, 8))
    figure = draw_stage1([Row("image.jpeg", np.ones((8, 8, 3)), raw, clean, artifacts, residual)], clusters=4)
    pictures = [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images]
    times = resolution // 5
    fine = raw.repeat(times, 0).repeat(times, 1)
    lengths, ends = pairs.lengths(fine, clean)
    similarities, _ = pairs.similarities(fine, clean, (resolution // 2, resolution // 2))
    for wanted in (*pairs.colors(fine, clean), *pairs.groups(fine, clean, 4)[0], *lengths, *similarities):
        assert any(one.shape == wanted.shape and np.allclose(one, wanted) for one in pictures)
    texts = [text.get_text() for text in figure.texts]
    assert [texts.count(f"{end:.3g}") for end in ends] == [2, 2]


def test_images_that_cannot_be_drawn_are_named_and_the_rest_is_drawn(frames, tmp_path, capsys):
    (frames / "bad.png").write_bytes(b"no image")
    out = tmp_path / "picture.png"
    images = [str(frames / "000.png"), str(frames / "bad.png")]
    assert visualize.main([*images, *SMALL, "--out", str(out)]) == 1
    assert "bad.png: not an image" in capsys.readouterr().err and out.exists()
    assert visualize.main([*images, *SMALL, "--out", str(out), "--positional"]) == 1
    assert "bad.png: not an image" in capsys.readouterr().err
    assert visualize.main([images[1], *SMALL, "--out", str(out)]) == 2
    assert "none of the images" in capsys.readouterr().err


def test_positional_maps_are_those_of_a_zero_tensor_and_the_mean(frames):
    model = load_model("test_vit", pretrained=False)
    settings = Stage1Settings(layers=(5,), input_size=160)  # the model's own size: nothing is resampled
    (zero, mean, first), count = positional_maps(model, list_images(frames), settings)
    with torch.no_grad():
        tokens = model.forward_features(torch.zeros(1, 3, 160, 160))[0, model.num_prefix_tokens :]
    torch.testing.assert_close(torch.from_numpy(zero[5]).flatten(0, 1), tokens, rtol=1e-4, atol=1e-4)
    reader = FeatureReader(model, [5], input_size=160)
    images = torch.stack([load_image(path) for path in sorted(frames.iterdir())])
    square = torch.nn.functional.interpolate(images, (160, 160), mode="bilinear", antialias=True)
    wanted = reader.patch_features(square)[5]
    np.testing.assert_allclose(mean[5], wanted.mean(dim=0), atol=1e-4)
    np.testing.assert_allclose(first[5], wanted[0], atol=1e-4)
    assert count == 5


def test_the_positional_picture_has_a_column_for_each_layer(frames, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(visualize, "draw_positional", lambda *a: drawn.append(draw_positional(*a)) or drawn[-1])
    for layers in (["-1"], ["0", "1", "3", "5"]):
        out = tmp_path / f"{len(layers)}.png"
        options = ["--positional", "--out", str(out), "--layers", *layers]
        assert visualize.main([str(frames), *SMALL, *options]) == 0
        maps = [image for axes in drawn[-1].axes for image in axes.images if image.get_array().shape == (4, 4, 3)]
        assert len(maps) == 4 * len(layers) and Image.open(out).size[1] > 700
        assert_texts_apart(drawn[-1])


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_video_of_a_folder_shows_frame_raw_and_denoised(frames, tmp_path, suffix):
    out = tmp_path / f"clip{suffix}"
    assert visualize.main([str(frames), *SMALL, "--video", str(out), "--fps", "5"]) == 0
    pictures = np.stack(list(iio.imiter(out)))[..., :3]
    assert pictures.shape[0] == 5 and video_rate(out) == pytest.approx(5, rel=0.01)
    width = pictures.shape[2] // 3
    assert width == pytest.approx(320 * 60 / 40, abs=5)
    for i in range(5):  # the square is where it was in the frame
        middle = pictures[i, 26 + 160, :width].astype(int)
        assert np.median(np.flatnonzero(middle[:, 0] > 140)) == pytest.approx((8 * i + 10) * 8, abs=10)
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.slow
def test_a_video_can_be_made_from_a_video(frames, tmp_path):
    clip, out = tmp_path / "clip.mp4", tmp_path / "out.mp4"
    assert visualize.main([str(frames), *SMALL, "--video", str(clip), "--fps", "7"]) == 0
    assert visualize.main([str(clip), *SMALL, "--video", str(out), "--limit", "3"]) == 0
    assert len(list(read_frames(out))) == 3 and video_rate(out) == pytest.approx(7)


def test_of_a_long_video_no_more_frames_are_read_than_are_drawn(tmp_path, monkeypatch):
    read = []

    def film(source):
        for number in range(1000):
            read.append(number)
            yield np.full((40, 60, 3), number % 256, dtype=np.uint8)

    monkeypatch.setattr(video, "video_frames", film)
    monkeypatch.setattr(video, "video_rate", lambda source: 10.0)
    out = tmp_path / "out.gif"
    assert visualize.main(["long.mp4", *SMALL, "--video", str(out), "--limit", "3"]) == 0
    assert read == 3 * [0, 1, 2] and len(list(iio.imiter(out))) == 3  # counted, looked at for colors, drawn


def test_all_frames_of_a_video_share_one_projection(frames, tmp_path, monkeypatch):
    def maps(frame):  # what the picture is made of, on 4 x 4 patches
        small = np.asarray(Image.fromarray(frame).resize((4, 4))) / 255
        return small, small[::-1]

    seen = []
    monkeypatch.setattr(video, "side_by_side", lambda f, *c: seen.append(c) or side_by_side(f, *c))
    assert draw_video(frames, tmp_path / "out.gif", maps) == 5
    features = [maps(np.asarray(Image.open(path).convert("RGB"))) for path in sorted(frames.iterdir())]
    projection = fit_projection(np.array(features))
    for (raw, clean), (raw_colors, clean_colors, _) in zip(features, seen):
        np.testing.assert_allclose(raw_colors, projection.colors(raw))
        np.testing.assert_allclose(clean_colors, projection.colors(clean))


class Switchable(VisionTransformer):
    """A stand-in for a `*_dvt` model: its denoiser negates the last map."""

    denoise = True

    def set_denoise(self, enable: bool = True) -> None:
        self.denoise = enable

    @contextmanager
    def denoising(self, enable: bool = True):
        before, self.denoise = self.denoise, enable
        yield
        self.denoise = before

    def forward_intermediates(self, x, **options):
        maps = super().forward_intermediates(x, **options)
        return [-m for m in maps] if self.denoise else maps


def test_a_model_with_a_denoiser_draws_its_own_output_and_raw_features_beside_it():
    model = Switchable(img_size=64, embed_dim=64, depth=2, num_heads=1, num_classes=0).eval()
    settings = Stage1Settings(layers=(1,), input_size=64, stride=16)
    frame = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    raw, clean = video_maps(model, settings)(frame)
    assert raw.shape == clean.shape == (4, 4, 64) and model.denoise
    normed = torch.nn.functional.layer_norm(torch.from_numpy(-clean), (64,))  # the stand-in leaves that out
    np.testing.assert_allclose(raw, normed, atol=1e-4)
    with pytest.raises(ValueError, match="own denoiser is for the last block"):
        video_maps(model, Stage1Settings(layers=(0,), input_size=64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--video", "out.avi"], "out must end in .mp4 or .gif"),
        (["--video", "out.gif", "--fps", "nan"], "fps must be from 0.1 to 1000, got nan"),
        (["--video", "out.mp4", "--fps", "-1"], "fps must be from 0.1 to 1000, got -1"),
        (["--out", "b.txt"], "b.txt: a picture's name ends in one of"),
        (["--clusters", "11"], "clusters must be from 1 to 10"),
        (["--positional", "--video", "out.gif"], "leave out one of the two"),
        (["--positional", "--resolution", "9"], "--resolution and --clusters are of pictures of stage 1"),
        (["--video", "out.gif", "--clusters", "3"], "--resolution and --clusters are of pictures of stage 1"),
        (["--fps", "5"], "--fps is of a video"),
        (["--video", "out.gif", "--layers", "0", "1"], "--video shows one block, and --layers names 2"),
        (["--stride", "17"], "stride must be from 1"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(frames, tmp_path, capsys, options, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert visualize.main([str(frames), *SMALL, *options]) == 2
    assert message in capsys.readouterr().err


def test_frames_of_another_size_are_fitted_into_the_first_ones(frames, tmp_path):
    Image.new("RGB", (40, 60)).save(frames / "002.png")
    Image.new("RGB", (90, 20)).save(frames / "003.png")
    out = tmp_path / "out.mp4"
    assert visualize.main([str(frames), *SMALL, "--video", str(out)]) == 0
    film = iio.imread(out)
    assert film.shape == (5, 26 + 320, 3 * 480 + 12, 3)
    white = (film > 230).all(-1)
    # 40 x 60 at a height of 320 is 214 wide, three of them 654; three of 1440 are 4332 x 346, and 1452 x 116 here.
    assert white[2, :, :390].all() and white[2, :, -390:].all() and not white[2, 100, 410:600].any()
    assert white[3, :110].all() and white[3, -110:].all() and not white[3, 173, 10:470].any()


@pytest.mark.parametrize("options", [(), ("--video", "out.gif")])
def test_the_cost_is_said_first_and_ctrl_c_ends_in_one_line(frames, tmp_path, capsys, monkeypatch, options):
    def stop(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(visualize, "decompose", stop)
    assert visualize.main([str(frames), *SMALL, *options]) == 130
    first, *_, last = capsys.readouterr().err.splitlines()
    assert re.match(r"stage 1: 5 images x 24 views = 120 forward passes at \S+ s, about \S+ minutes$", first)
    assert last == "error: stopped; nothing was drawn." and not [p for p in tmp_path.iterdir() if p != frames]


def test_a_picture_takes_64_views_unless_told_otherwise():
    parsed = visualize.make_parser([]).parse_args(["cat.jpg", "--model", "m"])
    assert parsed.views == 64


def test_a_broken_video_is_said_to_be(frames, tmp_path, capsys):
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    assert visualize.main([str(tmp_path / "clip.mp4"), *SMALL, "--video", str(tmp_path / "out.mp4")]) == 2
    assert "clip.mp4" in capsys.readouterr().err
    (frames / "002.png").write_bytes(b"")
    assert visualize.main([str(frames), *SMALL, "--video", str(tmp_path / "out.mp4")]) == 2
    assert "frame 002.png: the file is empty" in capsys.readouterr().err
    assert not Path(tmp_path / "out.mp4").exists()
