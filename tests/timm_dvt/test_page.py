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
from timm_dvt.viewer import page, pairs, studio
from timm_dvt.viewer.colors import PALETTE
from timm_dvt.viewer.examples import EXAMPLES, gray, on_position, wall
from timm_dvt.viewer.page import Comparison
from timm_dvt.viewer.studio import Studio


def maps(*grid: int) -> tuple[np.ndarray, np.ndarray]:
    off, on = np.random.default_rng(0).normal(size=(2, *grid, 16)).astype(np.float32)
    return off, on


@pytest.fixture
def comparison():
    image = Image.new("RGB", (128, 96), "gray")
    return Comparison("a<b>_dvt", "cpu", image, image, *maps(6, 8))


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


# ---- pairs


def test_equal_features_have_equal_colors_in_both_states():
    """By one projection, which sklearn's of both maps together is, and not by one of each."""
    off, on = maps(6, 8)
    on[:3] = off[:3]
    on += off.mean((0, 1)) - on.mean((0, 1))  # equal features, also after the means are taken off
    first, second = pairs.colors(off, on)
    equal = (off == on).all(-1)
    assert not equal.all() and np.abs(first[equal] - second[equal]).max(initial=0) < 1e-6
    both = np.concatenate([m.reshape(-1, 16) - m.mean((0, 1)) for m in (off, on)])
    values = PCA(3, svd_solver="full").fit(both).transform(both)
    colors = np.concatenate([first.reshape(-1, 3), second.reshape(-1, 3)])
    inside = ((colors > 0) & (colors < 1)).all(1)
    assert (np.abs(np.corrcoef(values[inside], colors[inside], rowvar=False)[:3, 3:].diagonal()) > 0.9999).all()


def test_a_map_that_hardly_varies_is_not_stretched_to_full_colors():
    off, on = maps(6, 8)
    first, second = pairs.colors(off, on / 100)
    assert first.std((0, 1)).min() > 0.15 and second.std((0, 1)).max() < 0.01


def test_groups_of_equal_maps_are_equal_and_of_the_palette():
    off, _ = maps(6, 8)
    (first, second), agreement = pairs.groups(off, off.copy(), 3)
    assert np.array_equal(first, second)
    colors = {tuple(c) for c in first.reshape(-1, 3)}
    assert 0 <= agreement <= 1 and len(colors) == 3 and colors <= {tuple(c) for c in PALETTE}


def test_patches_that_differ_by_rounding_are_alike():
    """A gate levels a plain color to the last digits; that these differ from place to place must not be drawn."""
    draw = np.random.default_rng(0)
    off = (10 + draw.normal(size=(5, 6, 8))).astype(np.float32)
    on = np.broadcast_to(off.mean((0, 1)), off.shape) + 1e-5 * draw.normal(size=off.shape).astype(np.float32)
    (first, second), _ = pairs.similarities(off, on, (0, 0))
    assert len(np.unique(second.reshape(-1, 3), axis=0)) == 1 and len(np.unique(first.reshape(-1, 3), axis=0)) > 20


def test_similarity_is_the_cosine_without_the_mean_and_both_maps_share_its_scale():
    off, on = maps(6, 8)
    (first, second), (low, high) = pairs.similarities(off, on, (1, 2))
    centered = [torch.from_numpy(m - m.mean((0, 1))) for m in (off, on)]
    values = [torch.nn.functional.cosine_similarity(m, m[1, 2], dim=-1) for m in centered]
    np.testing.assert_allclose((low, high), np.percentile(torch.stack(values).numpy(), (1, 99)), atol=1e-5)
    assert (first[1, 2] == second[1, 2]).all() and (first.max((0, 1)) <= 1).all()
    for moved in ((off + 100, on), (off, on + 100)):  # what all patches share does not count
        np.testing.assert_allclose(pairs.similarities(*moved, (1, 2))[0], (first, second), atol=1e-3)


def test_nothing_removed_is_one_color():
    off, _ = maps(6, 8)
    (colors, length), scale = pairs.removed(off, off)
    assert scale == (0, 0) and len(np.unique(colors.reshape(-1, 3), axis=0)) == 1
    assert len(np.unique(length.reshape(-1, 3), axis=0)) == 1


# ---- parts of the page


def test_every_part_is_whole_and_has_one_pixel_a_patch(comparison, monkeypatch):
    monkeypatch.setattr(pairs, "AGREEING", 0)
    parts = {
        "overview": (page.overview(comparison), 2),
        "alike": (page.alike(comparison, (1, 2)), 2),
        "groups": (page.groups(comparison, 4), 2),
        "rest": (page.rest(comparison), 4),
    }
    for name, (text, count) in parts.items():
        pictures = [picture for picture in Parts(text).pictures() if picture.shape == (6, 8, 3)]
        assert len(pictures) == count, name
        assert "<b>" not in text
    want = (pairs.colors(comparison.off, comparison.on)[1] * 255).round()
    assert np.array_equal(Parts(parts["overview"][0]).pictures()[2], want)
    for text in (
        page.intro(),
        page.downloads("key", "a", "b", (1, 2), 4),
        page.pending(comparison.image),
        page.heading("groups", "text"),
    ):
        Parts(text)


def test_lengths_that_the_denoiser_keeps_are_not_shown(comparison):
    assert "norm" in page.rest(comparison) and len(Parts(page.rest(comparison)).pictures()) == 4
    off, on = (np.linalg.norm(maps, axis=-1, keepdims=True) for maps in (comparison.off, comparison.on))
    kept = dataclasses.replace(comparison, on=comparison.on * off / on)
    assert "norm" not in page.rest(kept) and len(Parts(page.rest(kept)).pictures()) == 2


def test_groups_that_chance_makes_are_not_shown(comparison, monkeypatch):
    assert "Choose another number" in page.groups(comparison, 4)
    monkeypatch.setattr(pairs, "AGREEING", 0)
    assert len(Parts(page.groups(comparison, 4)).pictures()) == 2


def test_a_notice_says_what_it_is_given_and_runs_none_of_it():
    assert page.notice("") == ""
    assert "&lt;script&gt;" in page.notice("<script>")


@pytest.mark.parametrize("asked, got", [((2, 3), (2, 3)), ((-4, 99), (0, 7)), ((None, 3), (3, 4)), (("1", 2), (3, 4))])
def test_a_patch_is_one_there_is(asked, got, comparison):
    assert comparison.clamped(*asked) == got


def test_files_hold_the_maps_bit_for_bit_and_the_demos_picture(comparison):
    both = np.load(io.BytesIO(page.file(comparison, "maps.npy", (1, 2), 4)), allow_pickle=False)
    assert both.dtype == np.float32 and np.array_equal(both, np.stack([comparison.off, comparison.on]))
    named = safetensors.numpy.load(page.file(comparison, "maps.safetensors", (1, 2), 4))
    assert np.array_equal(named["off"], comparison.off) and np.array_equal(named["on"], comparison.on)
    pictures = [page.file(comparison, "picture.png", patch, n) for patch, n in (((1, 2), 4), ((5, 7), 4))]
    assert len(set(pictures)) == 2 and Image.open(io.BytesIO(pictures[0])).format == "PNG"


# ---- the studio


def test_visitors_at_once_get_their_own_and_memory_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(studio, "COMPARISONS", 5)
    shared = Studio(f"local-dir:{folder}")
    images = [Image.new("RGB", (64 + 16 * i, 64), (40 * i, 90, 200 - 40 * i)) for i in range(4)]
    keys: dict[int, str] = {}

    def visit(number: int) -> None:
        keys[number] = shared.compare(images[number], shared.first)

    visitors = [threading.Thread(target=visit, args=(i,)) for i in range(4)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    alone = Studio(f"local-dir:{folder}")
    for number, key in keys.items():
        want = alone.find(alone.compare(images[number], alone.first))
        assert np.array_equal(shared.find(key).on, want.on) and shared.find(key).original is images[number]
    assert len(shared.comparisons) == len({*keys.values()}) == 4
    oldest = next(iter(shared.comparisons))
    for i in (1, 2):
        shared.compare(Image.new("RGB", (64, 64 + 16 * i)), shared.first)
    assert len(shared.comparisons) == 5 and shared.find(shared.first_comparison)  # with which each visit starts
    with pytest.raises(UserError, match="no longer kept"):
        shared.find(oldest)


def test_the_first_example_is_kept_for_all_and_another_image_until_it_has_to_go(folder):
    shared = Studio(f"local-dir:{folder}")
    assert shared.compare(EXAMPLES["cat"](), shared.first) == shared.first_comparison and not shared.comparisons
    key = shared.compare(gray(), shared.first)
    assert shared.compare(gray(), shared.first) == key
    before = shared.comparisons.pop(key)
    assert np.array_equal(shared.find(shared.compare(gray(), shared.first)).on, before.on)


def test_a_look_comes_off_first(folder):
    shared = Studio(f"local-dir:{folder}")
    off, key = shared.steps(gray(), shared.first)
    assert np.array_equal(off, shared.find(key).off) and not np.array_equal(off, shared.find(key).on)
    assert "denoiser on ..." in page.pending(gray(), off) and "denoiser off ..." in page.pending(gray())
    assert [len(Parts(page.pending(gray(), maps)).pictures()) for maps in (None, off)] == [1, 2]


def test_a_variant_that_cannot_be_had_is_one_sentence_and_the_terminal_says_more(folder, monkeypatch, capsys):
    shared = Studio(f"local-dir:{folder}")
    monkeypatch.setattr(studio, "load_denoised", lambda name: (_ for _ in ()).throw(UserError("unset HF_HUB_OFFLINE")))
    with pytest.raises(UserError, match=r"^\S+ cannot be loaded by this server; its terminal says why$"):
        shared.compare(gray(), shared.names[1])
    assert "unset HF_HUB_OFFLINE" in capsys.readouterr().err


def test_what_is_position_is_told_where_the_image_is_blank_and_the_drawn_wall_nearly_is():
    assert "All patches" in on_position(gray()) and "hardly differs" in on_position(wall())
    assert not on_position(EXAMPLES["cat"]())
    assert np.asarray(wall()).std((0, 1)).min() > 3 and wall().size == gray().size


def test_downloads_are_named_after_image_and_variant():
    links = [a for tag, a in Parts(page.downloads("key", 'my "cat"', "hf-hub:a/b_dvt", (1, 2), 4)).found if tag == "a"]
    assert [link["download"] for link in links] == [f"my-cat-_hf-hub-a-b_dvt_{name}" for name in page.KINDS]


def test_models_are_kept_up_to_a_number_and_only_variants_are_loaded(folder, monkeypatch):
    loaded = []

    def load(name):
        loaded.append(name)
        return timm.create_model(f"local-dir:{folder}", pretrained=True)

    monkeypatch.setattr(studio, "load_denoised", load)
    shared = Studio(f"local-dir:{folder}")
    names = [shared.first, *shared.names[1:3]]
    for i, name in enumerate((*names, names[2], names[1], names[0])):
        shared.compare(Image.new("RGB", (64, 64 + i)), name)
    assert loaded == [*names, names[0]] and len(shared.models) == studio.MODELS
    for name in ("local-dir:/etc", "hf-hub:a/b", "vit_tiny_patch16_224"):
        with pytest.raises(UserError, match="not one of the variants"):
            shared.compare(Image.new("RGB", (64, 64)), name)
    assert not any("distilled" in name for name in shared.names)
