"""What the page is made of, without a browser: pictures, files, limits, and visitors who come at once."""

import dataclasses
import io
import threading
import urllib.request
from html.parser import HTMLParser

import numpy as np
import pytest
import safetensors.numpy
import timm
import torch
from PIL import Image
from sklearn.decomposition import PCA

import timm_dvt
from timm_dvt.errors import UserError
from timm_dvt.viewer import page, studio
from timm_dvt.viewer import pairs as looks
from timm_dvt.viewer.colors import PALETTE
from timm_dvt.viewer.page import Look
from timm_dvt.viewer.studio import Studio
from timm_dvt.viewer.uploads import FORMATS, SIDE, read_upload


def maps(*grid: int) -> tuple[np.ndarray, np.ndarray]:
    off, on = np.random.default_rng(0).normal(size=(2, *grid, 16)).astype(np.float32)
    return off, on


@pytest.fixture
def look():
    image = Image.new("RGB", (128, 96), "gray")
    return Look("a<b>_dvt", "cpu", image, image, *maps(6, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small denoised model, as a folder that timm loads."""
    torch.manual_seed(0)
    arguments = {"depth": 1, "img_size": 64, "dynamic_img_size": True}
    model = timm_dvt.add_denoiser(timm.create_model("vit_tiny_patch16_224", **arguments))
    return timm_dvt.save_pretrained(model, tmp_path_factory.mktemp("model"), model_args=arguments)


class Parts(HTMLParser):
    """The tags of a page's part; raises AssertionError where one is not closed, or closed twice."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("img", "input", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def pictures(self) -> list[np.ndarray]:
        sources = [attributes["src"] for tag, attributes in self.found if tag == "img"]
        contents = [urllib.request.urlopen(source).read() for source in sources]
        return [np.asarray(Image.open(io.BytesIO(content))) for content in contents]


# ---- looks


def test_equal_features_have_equal_colors_in_both_states():
    """By one projection, which sklearn's of both maps together is, and not by one of each."""
    off, on = maps(6, 8)
    on[:3] = off[:3]
    on += off.mean((0, 1)) - on.mean((0, 1))  # equal features, also after the means are taken off
    first, second = looks.colors(off, on)
    equal = (off == on).all(-1)
    assert not equal.all() and np.abs(first[equal] - second[equal]).max(initial=0) < 1e-6
    both = np.concatenate([m.reshape(-1, 16) - m.mean((0, 1)) for m in (off, on)])
    values = PCA(3, svd_solver="full").fit(both).transform(both)
    colors = np.concatenate([first.reshape(-1, 3), second.reshape(-1, 3)])
    inside = ((colors > 0) & (colors < 1)).all(1)
    assert (np.abs(np.corrcoef(values[inside], colors[inside], rowvar=False)[:3, 3:].diagonal()) > 0.9999).all()


def test_a_map_that_hardly_varies_is_not_stretched_to_full_colors():
    off, on = maps(6, 8)
    first, second = looks.colors(off, on / 100)
    assert first.std((0, 1)).min() > 0.15 and second.std((0, 1)).max() < 0.01


def test_groups_of_equal_maps_are_equal_and_of_the_palette():
    off, _ = maps(6, 8)
    (first, second), agreement = looks.groups(off, off.copy(), 3)
    assert np.array_equal(first, second)
    colors = {tuple(c) for c in first.reshape(-1, 3)}
    assert 0 <= agreement <= 1 and len(colors) == 3 and colors <= {tuple(c) for c in PALETTE}


def test_similarity_is_the_cosine_without_the_mean_and_both_maps_share_its_scale():
    off, on = maps(6, 8)
    (first, second), (low, high) = looks.similarities(off, on, (1, 2))
    centered = [torch.from_numpy(m - m.mean((0, 1))) for m in (off, on)]
    values = [torch.nn.functional.cosine_similarity(m, m[1, 2], dim=-1) for m in centered]
    np.testing.assert_allclose((low, high), np.percentile(torch.stack(values).numpy(), (1, 99)), atol=1e-5)
    assert (first[1, 2] == second[1, 2]).all() and (first.max((0, 1)) <= 1).all()
    for moved in ((off + 100, on), (off, on + 100)):  # what all patches share does not count
        np.testing.assert_allclose(looks.similarities(*moved, (1, 2))[0], (first, second), atol=1e-3)


def test_nothing_removed_is_one_color():
    off, _ = maps(6, 8)
    (colors, length), scale = looks.removed(off, off)
    assert scale == (0, 0) and len(np.unique(colors.reshape(-1, 3), axis=0)) == 1
    assert len(np.unique(length.reshape(-1, 3), axis=0)) == 1


# ---- parts of the page


def test_every_part_is_whole_and_has_one_pixel_a_patch(look, monkeypatch):
    monkeypatch.setattr(looks, "AGREEING", 0)
    parts = {
        "overview": (page.overview(look), 2),
        "alike": (page.alike(look, (1, 2)), 2),
        "groups": (page.groups(look, 4), 2),
        "rest": (page.rest(look), 4),
    }
    for name, (text, count) in parts.items():
        pictures = [picture for picture in Parts(text).pictures() if picture.shape == (6, 8, 3)]
        assert len(pictures) == count, name
        assert "<b>" not in text
    want = (looks.colors(look.off, look.on)[1] * 255).round()
    assert np.array_equal(Parts(parts["overview"][0]).pictures()[2], want)
    for text in (page.intro(), page.downloads("key", (1, 2), 4), page.heading("groups", "text")):
        Parts(text)


def test_lengths_that_the_denoiser_keeps_are_not_shown(look):
    assert "norm" in page.rest(look) and len(Parts(page.rest(look)).pictures()) == 4
    lengths = np.linalg.norm(look.off, axis=-1, keepdims=True) / np.linalg.norm(look.on, axis=-1, keepdims=True)
    kept = dataclasses.replace(look, on=look.on * lengths)
    assert "norm" not in page.rest(kept) and len(Parts(page.rest(kept)).pictures()) == 2


def test_groups_that_chance_makes_are_not_shown(look, monkeypatch):
    assert "Choose another number" in page.groups(look, 4)
    monkeypatch.setattr(looks, "AGREEING", 0)
    assert len(Parts(page.groups(look, 4)).pictures()) == 2


def test_a_notice_says_what_it_is_given_and_runs_none_of_it():
    assert page.notice("") == ""
    assert "&lt;script&gt;" in page.notice("<script>")


@pytest.mark.parametrize("asked, got", [((2, 3), (2, 3)), ((-4, 99), (0, 7)), ((None, 3), (3, 4)), (("1", 2), (3, 4))])
def test_a_patch_is_one_there_is(asked, got, look):
    assert look.clamped(*asked) == got


def test_files_hold_the_maps_bit_for_bit_and_the_demos_picture(look):
    both = np.load(io.BytesIO(page.file(look, "maps.npy", (1, 2), 4)), allow_pickle=False)
    assert both.dtype == np.float32 and np.array_equal(both[0], look.off) and np.array_equal(both[1], look.on)
    named = safetensors.numpy.load(page.file(look, "maps.safetensors", (1, 2), 4))
    assert np.array_equal(named["off"], look.off) and np.array_equal(named["on"], look.on)
    pictures = [page.file(look, "picture.png", patch, n) for patch, n in (((1, 2), 4), ((5, 7), 4))]
    assert len(set(pictures)) == 2 and Image.open(io.BytesIO(pictures[0])).format == "PNG"


# ---- limits


def content(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_an_upload_is_rgb_and_of_bounded_size(kind):
    assert read_upload(content(Image.new("RGB", (60, 40)), kind)).size == (60, 40)
    big = read_upload(content(Image.new("L", (3000, 1000)), kind))
    assert big.size == (SIDE, SIDE // 3) and big.mode == "RGB"


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"<svg/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        content(Image.new("RGB", (9, 9)), "PPM"),
        content(Image.effect_noise((99, 99), 9))[:2000],
        content(Image.new("1", (7200, 7000))),
    ],
    ids=["empty", "svg", "eps", "ppm", "half", "50 megapixels"],
)
def test_what_is_no_image_to_take_is_told(bad):
    with pytest.raises(UserError, match="^This file: "):
        read_upload(bad)


def test_a_huge_image_is_refused_before_it_is_decoded(monkeypatch):
    huge = content(Image.new("1", (7200, 7000)))
    monkeypatch.setattr(Image.Image, "convert", None)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    with pytest.raises(UserError, match="50.4 megapixels"):
        read_upload(huge)
    with pytest.raises(UserError, match=r"25\.1 megapixels .5001 x 5000.; the most that is taken is 25\. "):
        read_upload(content(Image.new("1", (5001, 5000))))
    with pytest.raises(UserError, match="far too many pixels.* 25 megapixels. Make it smaller"):
        read_upload(content(Image.new("1", (20000, 20000))))  # which Pillow itself refuses, in its own words


def test_visitors_at_once_get_their_own_and_memory_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(studio, "LOOKS", 5)
    shared = Studio(f"local-dir:{folder}")
    images = [Image.new("RGB", (64 + 16 * i, 64), (40 * i, 90, 200 - 40 * i)) for i in range(4)]
    keys: dict[int, str] = {}

    def visit(number: int) -> None:
        keys[number] = shared.look(images[number], shared.first)

    visitors = [threading.Thread(target=visit, args=(i,)) for i in range(4)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    alone = Studio(f"local-dir:{folder}")
    for number, key in keys.items():
        want = alone.find(alone.look(images[number], alone.first))
        assert np.array_equal(shared.find(key).on, want.on) and shared.find(key).original is images[number]
    assert len(shared.looks) == len({*keys.values()}) == 4
    oldest = next(iter(shared.looks))
    for _ in range(2):
        shared.look(images[0], shared.first)
    assert len(shared.looks) == 5 and shared.find(shared.first_look)  # with which each visit starts
    with pytest.raises(UserError, match="no longer kept"):
        shared.find(oldest)


def test_an_example_is_computed_once_for_all_and_again_after_it_had_to_go(folder):
    shared = Studio(f"local-dir:{folder}")
    assert shared.example(0, shared.first) == shared.first_look and not shared.looks
    key = shared.example(1, shared.first)
    assert shared.find(shared.example(1, shared.first)) is shared.find(key)
    before = shared.looks.pop(key)
    assert np.array_equal(shared.find(shared.example(1, shared.first)).on, before.on)


def test_models_are_kept_up_to_a_number_and_only_variants_are_loaded(folder, monkeypatch):
    loaded = []

    def load(name):
        loaded.append(name)
        return timm.create_model(f"local-dir:{folder}", pretrained=True)

    monkeypatch.setattr(studio, "load_denoised", load)
    shared = Studio(f"local-dir:{folder}")
    names = [shared.first, *shared.names[1:3]]
    for name in (*names, names[2], names[1], names[0]):
        shared.look(Image.new("RGB", (64, 64)), name)
    assert loaded == [*names, names[0]] and len(shared.models) == studio.MODELS
    for name in ("local-dir:/etc", "hf-hub:a/b", "vit_tiny_patch16_224"):
        with pytest.raises(UserError, match="not one of the variants"):
            shared.look(Image.new("RGB", (64, 64)), name)
    assert not any("distilled" in name for name in shared.names)
