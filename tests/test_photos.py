"""Photos from disk: the formats that are read, and what metadata, bits, transparency and damage may do."""
import errno
import io
import struct
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, features

import dataset
from dataset import DatasetError, find_images, read_image, to_rgb

FORMATS = {"jpg": "JPEG", "jfif": "JPEG", "mpo": "MPO", "png": "PNG", "webp": "WEBP", "bmp": "BMP",
           "tif": "TIFF", "gif": "GIF", "ppm": "PPM", "jp2": "JPEG2000", "avif": "AVIF"}


@pytest.fixture(scope="module")
def photo():
    """48x32 RGB, smooth, so that lossy formats keep it, and not its own mirror image."""
    y, x = np.mgrid[:32, :48]
    return Image.fromarray(np.stack([5 * x, 7 * y, 2 * x + 3 * y], axis=2).astype(np.uint8))


def pixels(image):
    return np.asarray(image, dtype=int)


# --- Formats and bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, kind", FORMATS.items())
def test_each_format_is_found_and_read(suffix, kind, photo, tmp_path):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    path = tmp_path / f"photo.{suffix.upper()}"
    second = {"save_all": True, "append_images": [photo.convert("L").convert("RGB")]} if kind == "MPO" else {}
    photo.save(path, kind, **second)
    assert find_images(tmp_path) == ([path], [])
    read = read_image(path)
    assert (read.mode, read.size, read.info) == ("RGB", (48, 32), {})
    assert np.abs(pixels(read) - pixels(photo)).mean() < (12 if kind == "GIF" else 4)


def test_postscript_under_a_photos_name_never_runs(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    run = Mock(return_value=Image.new("RGB", (9, 9)).im)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", run)
    with pytest.raises(DatasetError, match="a.jpg: cannot identify"):
        read_image(tmp_path / "a.jpg")
    assert not run.called


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_grey_palette_and_cmyk_become_rgb(mode, photo, tmp_path):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    photo.convert(mode).save(path)
    assert np.array_equal(read_image(path), photo.convert(mode).convert("RGB"))


def png_of_16_bits(path):
    """RGB of 12 bits in 16, of which Pillow keeps the upper 8: it would read 4095 as 15."""
    rows = (b"\0" + struct.pack(">12H", *[4095] * 12)) * 4
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in (*chunks, (b"IEND", b""))))


def tiff_of_16_bits(path):
    """RGB, uncompressed: 8 tags, then three depths and the pixels, 4 by 4."""
    tags = ((256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 3, 110), (259, 3, 1, 1), (262, 3, 1, 2),
            (273, 4, 1, 116), (277, 3, 1, 3), (279, 4, 1, 96))
    content = struct.pack("<4sIH", b"II*", 8, 8) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    path.write_bytes(content + bytes(4) + struct.pack("<3H", 16, 16, 16) + struct.pack("<48H", *[4095] * 48))


def saved(dtype):
    return lambda path: Image.fromarray(np.arange(16, dtype=dtype).reshape(4, 4)).save(path)


@pytest.mark.parametrize("name, write", [
    ("colour.png", png_of_16_bits), ("colour.tif", tiff_of_16_bits), ("grey.png", saved(np.uint16)),
    ("grey.tif", saved(np.uint16)), ("int32.tif", saved(np.int32)), ("float.tif", saved(np.float32)),
])
def test_more_than_8_bits_are_refused_by_name(name, write, tmp_path):
    write(tmp_path / name)
    with pytest.raises(DatasetError, match=f"{name}: it has more than 8 bits a channel; save it with 8"):
        read_image(tmp_path / name)


# --- EXIF ---------------------------------------------------------------------------------------------------


def exif(orientation):
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + struct.pack("<II", orientation, 0)


TURNS = {3: lambda a: np.rot90(a, 2), 5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 3), 8: np.rot90}


@pytest.mark.parametrize("suffix, orientation", [("jpg", 5), ("jpg", 6), ("png", 3), ("webp", 8), ("tif", 6)])
def test_photos_are_upright(suffix, orientation, photo, tmp_path):
    for name, options in (("lying", {}), ("a", {"exif": exif(orientation)})):
        photo.save(tmp_path / f"{name}.{suffix}", **options)
    read = read_image(tmp_path / f"a.{suffix}")
    assert np.array_equal(read, TURNS[orientation](pixels(Image.open(tmp_path / f"lying.{suffix}"))))
    assert np.array_equal(to_rgb(read), read), "turned twice"


NOT_TIFF = b"Exif\0\0this is no TIFF header"
CUT_OFF = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"
CYCLE = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\xff\xff\xff\xff\x08\0\0\0\x08\0\0\0"


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize("damaged", [NOT_TIFF, CUT_OFF, CYCLE, exif(9)],
                         ids=["no tiff", "cut off", "cycle", "orientation 9"])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_with_damaged_exif_a_photo_is_taken_as_it_lies(damaged, suffix, photo, tmp_path):
    for name, options in (("plain", {}), ("odd", {"exif": damaged})):
        photo.save(tmp_path / f"{name}.{suffix}", **options)
    odd = tmp_path / f"odd.{suffix}"
    assert damaged[6:] in odd.read_bytes()
    assert np.array_equal(read_image(odd), read_image(tmp_path / f"plain.{suffix}"))


# --- Transparency -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "LA", "palette"])
def test_nothing_under_alpha_0_reaches_the_network(mode, photo, tmp_path):
    """The photo's left half over noise under alpha 0."""
    rgba = photo.convert("RGBA")
    noise = np.random.default_rng(0).integers(0, 256, (32, 24, 3), dtype=np.uint8)
    rgba.paste(Image.fromarray(noise), (24, 0))
    rgba.putalpha(Image.fromarray(np.repeat(np.uint8([[255, 0]]), 24, axis=1).repeat(32, axis=0)))
    (rgba.quantize(64) if mode == "palette" else rgba.convert(mode)).save(tmp_path / "a.png")
    rgb, expected = pixels(read_image(tmp_path / "a.png")), photo.convert("L") if mode == "LA" else photo
    assert (rgb[:, 24:] == dataset.GREY).all()
    assert np.abs(rgb[:, :24] - pixels(expected.convert("RGB"))[:, :24]).mean() < 8


def test_half_transparent_is_half_grey_and_one_transparent_colour_all_grey(tmp_path):
    rgb = to_rgb(Image.new("RGBA", (4, 4), (228, 28, 128, 128)))
    assert rgb.getpixel((0, 0)) == pytest.approx((178, 78, 128), abs=1)
    Image.new("RGB", (4, 4), (200, 100, 50)).save(tmp_path / "a.png", transparency=(200, 100, 50))
    assert (pixels(read_image(tmp_path / "a.png")) == dataset.GREY).all()


# --- Damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"this is no photo", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_named_with_the_remedy(content, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DatasetError, match="a.jpg: .*; save it anew"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_half_a_photo_is_named(suffix, photo, tmp_path):
    path = tmp_path / f"a.{suffix}"
    photo.resize((300, 200)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DatasetError, match=f"a.{suffix}: .*; save it anew"):
        read_image(path)


class FailingDisk(io.BytesIO):
    """A file whose second half lies on bad sectors."""

    def read(self, size=-1):
        if self.tell() + max(size, 0) > len(self.getbuffer()) // 2:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(size)


def refused(path):
    with pytest.raises(DatasetError) as error:
        read_image(path)
    assert "save it anew" not in str(error.value)  # of a file that may be fine
    return str(error.value)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_the_systems_reason_stands_as_it_is(suffix, photo, tmp_path, monkeypatch):
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)  # longer than what Pillow reads at once
    content = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda *args, **options: FailingDisk(content))
        assert f"{path}: Input/output error" in refused(path)
    assert "No such file" in refused(tmp_path / "gone.jpg")
    if Path("/proc/self/mem").exists():  # which not even root can read from its beginning
        (tmp_path / "unreadable.jpg").symlink_to("/proc/self/mem")
        assert "nput/output error" in refused(tmp_path / "unreadable.jpg")
