"""What the page takes of what visitors send: formats, sizes, and each file decoded once."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from timm_dvt.errors import UserError
from timm_dvt.viewer.examples import gray
from timm_dvt.viewer.uploads import FORMATS, SIDE, Uploads, read_upload


def content(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "HEIF"])  # which cannot be written
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


HEIC = (  # 64 x 48 pixels of one color, made for this test
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAX1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9jAA"
    "AAAERAAAEAAQAAAAABoQABAAAAAAAAABkAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA/WlwcnAA"
    "AADdaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkA"
    "AAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAA"
    "AAAoY2xhcAAAAEAAAAABAAAAMAAAAAEAAAAAAAAAAv////AAAAACAAAAEHBpeGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWBAgMFhAAAAC"
    "FtZGF0AAAAFSgBrwtg9eWDr//pwd+9Qg5YRT/UOA=="
)


def test_a_phones_heic_is_read_or_refused_with_the_remedy(monkeypatch):
    heic = base64.b64decode(HEIC)
    if "HEIF" in FORMATS:
        assert np.abs(np.asarray(read_upload(heic), int) - (200, 60, 40)).max() < 5
    monkeypatch.setattr("timm_dvt.viewer.uploads.FORMATS", ("JPEG",))
    with pytest.raises(UserError, match="pi-heif"):
        read_upload(heic)
    with pytest.raises(UserError, match="Pillow 11.3"):
        read_upload(b"\0\0\0\x1cftypavif" + bytes(99))


def test_an_upload_that_is_sent_twice_is_decoded_once(tmp_path, monkeypatch):
    path = tmp_path / "digest" / "a.png"
    uploads, images = Uploads(tmp_path), []
    for _ in range(2):
        path.parent.mkdir()
        path.write_bytes(content(gray()))
        images.append(uploads.take(str(path)))
        assert not path.exists()
        monkeypatch.setattr("timm_dvt.viewer.uploads.read_upload", None)
    assert images[0] is images[1]


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
