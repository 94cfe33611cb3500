"""Claims about reading images: every kind of file gives the same picture, or one clear reason."""

import io
import os
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_dvt.errors import ImageError
from timm_dvt.image_files import decode_image, list_images, load_image, read_file

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


@pytest.fixture()
def rgb():
    """A smooth (24, 32, 3) uint8 picture, so that lossy formats come close."""
    y, x = np.mgrid[0:24, 0:32]
    return np.stack([x * 7, y * 9, 255 - x * 4 - y * 4], axis=2).astype(np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_tensor(pixels) -> torch.Tensor:
    return torch.from_numpy(np.asarray(pixels).astype(np.float64).transpose(2, 0, 1) / 255).float()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA"])
def test_lossless_formats_give_the_pixels(rgb, kind):
    image = decode_image(encode(Image.fromarray(rgb), kind))
    assert image.shape == (3, 24, 32) and image.dtype == torch.float32
    torch.testing.assert_close(image, as_tensor(rgb))


def test_grayscale_is_repeated_over_three_channels(rgb):
    image = decode_image(encode(Image.fromarray(rgb[..., 0])))
    torch.testing.assert_close(image, as_tensor(rgb[..., [0, 0, 0]]))


def test_bilevel_images_are_black_and_white():
    bits = np.arange(64).reshape(8, 8) % 3 == 0
    image = decode_image(encode(Image.fromarray(bits)))
    torch.testing.assert_close(image, torch.from_numpy(bits).float().expand(3, 8, 8))


def test_palettes_are_looked_up(rgb):
    indexed = Image.fromarray(rgb).quantize(16)
    torch.testing.assert_close(decode_image(encode(indexed)), as_tensor(indexed.convert("RGB")))


def test_alpha_is_composited_over_white(rgb):
    alpha = np.linspace(0, 255, 24 * 32).reshape(24, 32).round()
    image = decode_image(encode(Image.fromarray(np.dstack([rgb, alpha.astype(np.uint8)]))))
    a = alpha[..., None] / 255
    expected = a * rgb / 255 + (1 - a)
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=1.1 / 255)


def test_gray_alpha_and_transparent_palettes_are_composited_too(rgb):
    gray_alpha = np.dstack([rgb[..., 0], np.full((24, 32), 0, np.uint8)])
    assert decode_image(encode(Image.fromarray(gray_alpha, "LA"))).min() == 1
    indexed = Image.fromarray(np.zeros((4, 4), np.uint8), "P")
    indexed.putpalette([10, 20, 30] * 256)
    assert decode_image(encode(indexed, transparency=0)).min() == 1
    assert decode_image(encode(indexed)).max() == pytest.approx(30 / 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_scaled_not_clipped(kind):
    values = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    image = decode_image(encode(Image.fromarray(values), kind))
    np.testing.assert_allclose(image[1].numpy(), values / 65535, atol=1e-7)


def test_sixteen_bit_color_is_scaled_not_clipped(rgb):
    png = sixteen_bit_png(rgb.astype(np.uint16) * 257)
    np.testing.assert_allclose(decode_image(png).permute(1, 2, 0).numpy(), rgb / 255, atol=1.1 / 255)


def sixteen_bit_png(pixels: np.ndarray) -> bytes:
    """A 48-bit PNG of (H, W, 3) uint16 pixels, which Pillow reads but cannot write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_float_pixels_are_taken_in_the_unit_range_and_refused_outside():
    values = np.linspace(0, 1, 30, dtype=np.float32).reshape(5, 6)
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(values), "TIFF"))[2].numpy(), values)
    for wrong in (values * 2, values - 0.5, np.where(values == 0, np.nan, values)):
        with pytest.raises(ImageError, match=r"float pixels must lie in \[0, 1\]"):
            decode_image(encode(Image.fromarray(wrong.astype(np.float32)), "TIFF"))


def test_cmyk_comes_back_as_the_colors_it_was_made_of(rgb):
    image = decode_image(encode(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=100))
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), rgb / 255, atol=8 / 255)


def test_the_first_frame_of_an_animation_is_taken(rgb):
    first, second = Image.fromarray(rgb), Image.fromarray(255 - rgb)
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        image = decode_image(encode(first, kind, save_all=True, append_images=[second], **options))
        atol = 0.2 if kind == "GIF" else 1e-6  # 256 colors
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), rgb / 255, atol=atol)


def test_exif_orientation_is_applied(rgb):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    image = decode_image(encode(Image.fromarray(rgb), exif=exif))
    torch.testing.assert_close(image, as_tensor(np.rot90(rgb, -1)))


def test_damaged_exif_does_not_cost_the_image(rgb):
    image = decode_image(encode(Image.fromarray(rgb), exif=b"Exif\0\0MM\0*garbage"))
    torch.testing.assert_close(image, as_tensor(rgb))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_images_are_an_error_not_a_half_gray_picture(kind):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), kind)
    with pytest.raises(ImageError):
        decode_image(data[: len(data) // 2])


def test_what_is_no_image_is_said_to_be_none(tmp_path):
    with pytest.raises(ImageError, match="not an image"):
        decode_image(b"<html>404</html>")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match="empty"):
        load_image(tmp_path / "empty.png")
    with pytest.raises(ImageError, match="No such file"):
        load_image(tmp_path / "absent.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageError, match="not a file"):
        load_image(tmp_path / "folder.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="not a file"):
        load_image(tmp_path / "pipe.png")


def test_random_damage_never_escapes_as_another_error(rgb):
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        whole = np.frombuffer(encode(Image.fromarray(rgb), kind), np.uint8)
        for _ in range(60):
            data = whole.copy()
            data[generator.integers(0, len(data), 4)] = generator.integers(0, 256, 4)
            try:
                image = decode_image(data.tobytes())
            except ImageError:
                continue
            assert image.shape[0] == 3 and 0 <= image.min() and image.max() <= 1


def test_a_file_is_known_again_by_its_bytes_and_time(tmp_path):
    (tmp_path / "abc.png").write_bytes(b"abc")
    os.utime(tmp_path / "abc.png", ns=(5, 7))
    data, fingerprint = read_file(tmp_path / "abc.png")
    assert data == b"abc" and (fingerprint.bytes, fingerprint.mtime_ns) == (3, 7)
    assert fingerprint.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_folders_are_listed_with_their_subfolders_in_sorted_order(tmp_path):
    for name in ("b/cat.jpg", "a/cat.jpg", "a/Dog.JPEG", "z.png", ".hidden.png", ".git/x.png", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    sources = list_images(tmp_path)
    assert [source.name for source in sources] == ["a/Dog.JPEG", "a/cat.jpg", "b/cat.jpg", "z.png"]
    assert sources[0].path == tmp_path / "a/Dog.JPEG"
    assert len(list_images(tmp_path, limit=2)) == 2


def test_lists_keep_their_order_and_are_relative_to_their_own_folder(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfb/2.png\r\n\r\na/1.png\r\nb/2.png\r\n/abs/3.png")
    sources = list_images(tmp_path / "list.txt")
    assert [source.name for source in sources] == ["b/2.png", "a/1.png", "/abs/3.png"]
    paths = [tmp_path / "b/2.png", tmp_path / "a/1.png", Path("/abs/3.png")]
    assert [source.path for source in sources] == paths


def test_nothing_to_read_is_said_at_once(tmp_path):
    with pytest.raises(ValueError, match="no images below"):
        list_images(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        list_images(tmp_path / "absent")
    (tmp_path / "list.txt").touch()
    with pytest.raises(ValueError, match="names no images"):
        list_images(tmp_path / "list.txt")
    with pytest.raises(ValueError, match="limit must be 1 or more, got 0"):
        list_images(tmp_path, limit=0)


def test_names_in_a_list_may_hold_what_else_ends_a_line_and_blanks_at_their_ends(tmp_path):
    names = ["a\x85b.png", "a\u2028b.png", "a\x0cb.png", "a\x1cb.png", " a.png", "a.png ", "\u00a0a.png"]
    for name in names:
        Image.new("RGB", (2, 2)).save(tmp_path / name, "PNG")
    for end in ("\n", "\r\n"):
        (tmp_path / "list.txt").write_bytes(end.join(["  b.png\t", *names, ""]).encode())
        assert [source.name for source in list_images(tmp_path / "list.txt")] == ["b.png", *names]


def test_heic_is_read_where_its_package_is_and_else_told(tmp_path, monkeypatch):
    """A folder of a telephone's is not taken for an empty one."""
    path = tmp_path / "telephone.HEIC"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    assert [source.name for source in list_images(tmp_path)] == ["telephone.HEIC"]
    monkeypatch.setattr(Image, "open", partial(Image.open, formats=["PNG"]))
    with pytest.raises(ImageError, match="pip install pi-heif, to read HEIC"):
        load_image(path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def walk(root, onerror, **options):
        onerror(PermissionError(13, "Permission denied", str(tmp_path / "closed")))
        return iter([])

    monkeypatch.setattr("timm_dvt.images.os.walk", walk)
    with pytest.raises(ImageError, match="closed cannot be read: Permission denied"):
        list_images(tmp_path)
