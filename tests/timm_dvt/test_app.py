"""The page in a real browser: Debian's chromium, headless, against the command that a person starts."""

import importlib.util
import io
import json
import re
import shutil
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import timm
import torch
from PIL import Image

from tests.helpers.app_server import noise, save, until
from timm_dvt.viewer import demo

if not importlib.util.find_spec("gradio"):  # seconds to import, in every process that runs tests
    pytest.skip("needs the extra app", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, of the extra test")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("needs a browser: apt-get install chromium chromium-driver", allow_module_level=True)
pytestmark = pytest.mark.slow  # a minute in all; test_app_requests asks the same page without a browser


@pytest.fixture(scope="module")
def browser(server):
    """It ends before the server does, which waits seconds for a page that is open."""
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, server):
    """The page as a first visit shows it, in a window of its own."""
    browser.get(server[0])
    until(lambda: len(sources(browser, "#rest")) == 4)
    return browser


def find(page, selector: str):
    return page.find_element("css selector", selector)


def sources(page, selector: str) -> list[str]:
    return [image.get_attribute("src") for image in page.find_elements("css selector", f"{selector} img")]


def said(page) -> str:
    return find(page, "#notice").text


def upload(page, path: Path | str) -> None:
    find(page, "#upload input[type=file]").send_keys(str(Path(path).resolve()))


# ---- a visit


def test_a_first_visit_shows_the_example_without_a_click_and_nothing_from_elsewhere(browser, server):
    for log in ("performance", "browser"):
        browser.get_log(log)  # empties it
    browser.get(server[0])
    until(lambda: len(sources(browser, "#rest")) == 4)
    for part, count in {"#overview": 3, "#alike": 3, "#rest": 4}.items():
        pictures = browser.find_elements("css selector", f"{part} img")
        assert len(pictures) == count and all(picture.get_attribute("alt") for picture in pictures)
        assert all(picture.get_property("naturalWidth") > 1 for picture in pictures)
    assert re.search(r"112 x 80 pixels.*5 x 7 patches, 192 channels.*on c", find(browser, "dl").text, re.DOTALL)
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith((server[0], "data:", "blob:")) for url in asked)


def test_the_bar_shows_one_map_or_the_other_and_back(page):
    """By keys, as a mouse is not everybody's."""
    bar = find(page, ".dvt-bar")

    def picture(key):
        bar.send_keys(key)
        shot = Image.open(io.BytesIO(find(page, ".dvt-compare").screenshot_as_png)).convert("RGB")
        return np.asarray(shot, float)[60:-10, 10:-10]  # without the words and the ring of the focus

    on, off = picture(webdriver.Keys.HOME), picture(webdriver.Keys.END)
    middle = picture(webdriver.Keys.PAGE_DOWN)
    assert np.abs(on - off).mean() > 10 and 1 < np.abs(middle - off).mean() < np.abs(on - off).mean()
    assert np.abs(picture(webdriver.Keys.HOME) - on).mean() < 1


def test_a_click_or_a_key_flips_the_map_in_place_and_the_bar_cuts_no_patch(page):
    def seen():
        return [find(page, f".dvt-{side}").is_displayed() for side in ("left", "right", "line")]

    place = find(page, ".dvt-compare").rect
    assert seen() == [True, True, True]
    find(page, ".dvt-toggle").click()
    assert seen() == [False, True, False]
    for off in (True, False):
        webdriver.ActionChains(page).send_keys("t").perform()
        assert seen() == [off, not off, False] and find(page, ".dvt-compare").rect == place
    find(page, "#variant input").send_keys("t")  # a letter there
    assert seen() == [False, True, False]
    find(page, ".dvt-bar").send_keys(webdriver.Keys.ARROW_RIGHT)
    cut = page.execute_script(
        "return getComputedStyle(document.querySelector('.dvt-compare')).getPropertyValue('--at')"
    )
    assert seen() == [True, True, True] and float(cut.rstrip("%")) == pytest.approx(100 / 7)


def test_a_gray_image_says_what_is_position(page):
    (gray,) = [b for b in page.find_elements("css selector", "button.sm") if "gray" in b.text]
    gray.click()
    until(lambda: "All patches of this image are alike" in find(page, "#overview").text)
    link = until(lambda: find(page, "#files a[download^=gray_]"))
    assert link.get_attribute("download").endswith("_picture.png")


def test_a_portrait_fits_the_screen(page, tmp_path):
    upload(page, save(noise(80, 240), tmp_path / "tall.png"))
    until(lambda: "x 144 pixels" in find(page, "dl").text or "x 160 pixels" in find(page, "dl").text)
    height = page.execute_script("return innerHeight")
    for map in page.find_elements("css selector", ".dvt-map, .dvt-photograph, .dvt-pick"):
        assert 0 < map.rect["height"] <= 0.81 * height
    frame, map = (find(page, f"#alike {part}").rect for part in (".dvt-frame", ".dvt-pick"))
    assert frame["x"] < map["x"] + map["width"]


def test_a_click_on_a_patch_changes_the_maps_and_a_click_back_restores_them(page):
    def click(row, column):
        map = page.find_elements("css selector", "#alike .dvt-pick")[1]
        x, y = ((part + 0.5) / count - 0.5 for part, count in ((column, 7), (row, 5)))
        hand, size = webdriver.ActionChains(page), map.rect
        hand.move_to_element_with_offset(map, x * size["width"], y * size["height"]).click().perform()
        until(lambda: f"row {row + 1} of 5, column {column + 1} of 7" in find(page, "#alike").text)

    first = sources(page, "#alike")
    click(0, 6)
    changed = sources(page, "#alike")
    assert changed[0] == first[0] and changed[1] != first[1] and changed[2] != first[2]
    frame, map = (page.find_elements("css selector", f"#alike {part}")[1].rect for part in (".dvt-frame", ".dvt-pick"))
    assert abs(frame["x"] + frame["width"] / 2 - map["x"] - map["width"] * 6.5 / 7) < 2
    assert abs(frame["y"] + frame["height"] / 2 - map["y"] - map["height"] * 0.5 / 5) < 2
    click(2, 3)
    assert sources(page, "#alike") == first


def test_arrow_keys_choose_a_patch_and_keep_the_focus(page):
    first = sources(page, "#alike")
    page.find_elements("css selector", "#alike .dvt-pick")[2].send_keys(webdriver.Keys.ARROW_LEFT)
    until(lambda: "column 3 of 7" in find(page, "#alike").text)
    for _ in range(4):  # the last beyond the edge
        until(lambda: page.switch_to.active_element.get_attribute("class") == "dvt-pick")
        page.switch_to.active_element.send_keys(webdriver.Keys.ARROW_UP)
    until(lambda: "row 1 of 5, column 3 of 7" in find(page, "#alike").text)
    assert sources(page, "#alike") != first
    assert "denoiser on" in page.switch_to.active_element.get_attribute("aria-label")


def test_the_number_of_groups_changes_the_groups_alone(page):
    rest = sources(page, "#rest")
    number = find(page, "#clusters input[type=number]")
    number.send_keys(webdriver.Keys.CONTROL, "a")
    number.send_keys("3", webdriver.Keys.ENTER)
    until(lambda: "clusters=3" in find(page, "#files a").get_attribute("href"))
    for source in sources(page, "#groups"):  # none, where k-means is not sure of three groups
        assert len(Image.open(urllib.request.urlopen(source)).convert("RGB").getcolors()) == 3
    assert sources(page, "#groups") or "Choose another number" in find(page, "#groups").text
    assert sources(page, "#rest") == rest


# ---- images of a visitor's own


@torch.no_grad()
def test_an_upload_is_shown_its_maps_are_the_models_and_its_file_is_gone(page, server, folder, tmp_path):
    path = save(noise(160, 96), tmp_path / "mine.png")
    upload(page, path)
    until(lambda: "128 x 80 pixels" in find(page, "dl").text)
    assert not [file for file in server[2].rglob("*") if file.is_file()]
    links = {link.text: link.get_attribute("href") for link in page.find_elements("css selector", "#files a")}
    fetched = {name: urllib.request.urlopen(link).read() for name, link in links.items()}
    off, on = np.load(io.BytesIO(fetched["Maps, .npy"]))
    named = safetensors.numpy.load(fetched["Maps, .safetensors"])
    assert np.array_equal(named["off"], off) and np.array_equal(named["on"], on)
    assert Image.open(io.BytesIO(fetched["Picture"])).width > 600
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    _, pixels = demo.prepare(model, Image.open(path))
    model = demo.sized(model, pixels)
    for state, got in ((False, off), (True, on)):
        with model.denoising(state):
            want = model.forward_features(pixels)[0, 1:].unflatten(0, (5, 8))
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("case", ["half a file", "50 megapixels"])
def test_a_bad_upload_is_told_and_the_page_goes_on(case, page, server, tmp_path):
    path, message = tmp_path / "file.png", "This file: "
    if case == "half a file":
        path.write_bytes(save(noise(300, 200), tmp_path / "whole.png").read_bytes()[:9000])
    else:
        save(Image.new("L", (8000, 6300)), path)
        message = "50.4 megapixels (8000 x 6300); the most that is taken is 25. Make it smaller and try again."
    before = sources(page, "#overview")
    upload(page, path)
    assert message in until(lambda: said(page))
    assert sources(page, "#overview") == before and server[1].poll() is None
    assert not [file for file in server[2].rglob("*") if file.is_file()]
    page.find_elements("css selector", "button.sm")[1].click()  # the other example
    until(lambda: sources(page, "#overview") != before and not said(page))


def test_a_refused_file_takes_back_what_was_said_of_the_one_before(page, tmp_path):
    """The browser refuses it, or the server while it comes in; neither reaches what draws the page."""
    text, other = tmp_path / "file.png", tmp_path / "file.pdf"
    for path in (text, other):
        path.write_text("no image")
    for _ in range(2):  # and what is said a second time is seen a second time
        upload(page, text)
        until(lambda: "not an image that is taken; choose one of JPEG, PNG" in said(page))
        upload(page, other)
        until(lambda: not said(page) and "Invalid file type" in find(page, "body").text)
        page.execute_script("document.querySelectorAll('.toast-close').forEach(button => button.click())")
    assert "100 MB and 25 megapixels" in find(page, "#upload").text
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(101 << 20)
    upload(page, large)
    assert until(lambda: said(page)) == "This file: 101 MB; the most that is taken is 100."


def test_two_visitors_at_once_get_their_own(page, server, tmp_path):
    windows, sizes = [page.current_window_handle], {(160, 96): "128 x 80", (96, 160): "80 x 128"}
    page.switch_to.new_window("tab")
    windows.append(page.current_window_handle)
    page.get(server[0])
    until(lambda: len(sources(page, "#rest")) == 4)
    for window, size in zip(windows, sizes):
        page.switch_to.window(window)
        upload(page, save(noise(*size), tmp_path / f"{size[0]}.png"))
    for window, shown in zip(windows, sizes.values()):
        page.switch_to.window(window)
        until(lambda shown=shown: shown in find(page, "dl").text)
    page.close()
    page.switch_to.window(windows[0])


def choose(page, *keys: str) -> None:
    box = find(page, "#variant input")
    box.click()
    box.send_keys(webdriver.Keys.CONTROL, "a")
    box.send_keys(*keys)


def test_a_variant_that_cannot_be_had_is_one_sentence_and_all_else_stays(page, tmp_path):
    upload(page, save(noise(160, 96), tmp_path / "mine.png"))
    until(lambda: "128 x 80 pixels" in find(page, "dl").text)
    before = sources(page, "#overview")
    choose(page, "vit_base_patch16_224.mae_dvt", webdriver.Keys.ENTER)
    told = until(lambda: said(page))
    assert told.startswith("vit_base_patch16_224.mae_dvt cannot be loaded") and told.count(".") == 2
    until(lambda: sources(page, "#overview") == before)
    until(lambda: find(page, "#variant input").get_property("value").startswith("local-dir:"))


def test_a_list_that_is_opened_and_closed_computes_nothing(page):
    mark = "document.querySelector('.dvt-compare').dataset.drawn = 'once'"  # a part that is drawn anew has none
    page.execute_script(mark)
    choose(page, webdriver.Keys.ESCAPE)
    find(page, "#variant input").send_keys(webdriver.Keys.TAB)
    page.find_elements("css selector", "#alike .dvt-pick")[2].send_keys(webdriver.Keys.ARROW_LEFT)
    until(lambda: "column 3 of 7" in find(page, "#alike").text)
    assert find(page, ".dvt-compare").get_attribute("data-drawn") == "once"


# ---- for everyone, and against some


def test_a_phone_shows_all_of_it_without_scrolling_sideways(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        until(lambda: page.execute_script("return innerWidth") == 390)
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
        for part in ("#upload", "#variant", ".dvt-compare", ".dvt-pick", "#clusters", "#groups", "#rest", "#files"):
            box = find(page, part).rect
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["width"] > 100
        maps = page.find_elements("css selector", ".dvt-map")
        assert len(maps) >= 7 and all(map.rect["width"] > 300 for map in maps)
        photograph, map = (find(page, f".dvt-overview .dvt-{part}").rect for part in ("photograph", "compare"))
        assert photograph["height"] > 80 and 0 < map["y"] + map["height"] - photograph["y"] <= 844
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_control_is_reached_by_the_tabulator(page):
    find(page, "body").click()
    wanted = {"dvt-bar", "dvt-pick", "dvt-toggle"} | {"#upload", "#variant", "#clusters", "#files"}
    seen = set()
    for _ in range(30):
        webdriver.ActionChains(page).send_keys(webdriver.Keys.TAB).perform()
        seen |= set(page.switch_to.active_element.get_attribute("class").split())
        seen |= set(
            page.execute_script(
                "let e = document.activeElement, ids = [];"
                "for (; e; e = e.parentElement) ids.push('#' + e.id); return ids"
            )
        )
    assert wanted <= seen
