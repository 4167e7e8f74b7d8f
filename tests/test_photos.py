"""Photos from disk: what counts as one, what metadata may do to it, how bits and transparency become RGB."""

import io
import mimetypes
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps, features

import dataset
from dataset import DatasetError, list_images, read_image, to_rgb


@pytest.fixture(scope="module")
def photo():
    """48x32 RGB, smooth, so that lossy formats keep it, and not its own mirror image."""
    y, x = np.mgrid[:32, :48]
    return Image.fromarray(np.stack([5 * x, 7 * y, 2 * x + 3 * y], axis=2).astype(np.uint8))


def pixels(image):
    return np.asarray(image).astype(int)


def png(photo, *chunks, color_type=2, depth=8, rows=None, size=None):
    """A PNG of a photo or of raw rows with further chunks: name, content, whether the checksum is right."""

    def chunk(name, content, good=True):
        checksum = zlib.crc32(name + content) ^ (not good)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    width, height = size or (photo.size if photo else (4, len(rows)))
    rows = rows or [row.tobytes() for row in np.asarray(photo)]
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    content = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(chunk(*one) for one in chunks)
        + content
        + chunk(b"IEND", b"")
    )


def jpeg(photo, *segments):
    """A JPEG with further segments, each the last byte of its marker and its content."""
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=95)
    data = buffer.getvalue()
    more = b"".join(struct.pack(">BBH", 0xFF, code, len(content) + 2) + content for code, content in segments)
    return data[:2] + more + data[2:]


def exif(orientation):
    content = Image.Exif()
    content[274] = orientation
    return content


# --- What is a photo ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suffix",
    "jpg jpeg jfif jpe jp2 j2k png apng bmp dib tif tiff gif webp avif ppm pnm pgm tga qoi pcx "
    "sgi im dds ico".split(),
)
def test_what_pillow_decodes_is_listed_and_read(suffix, photo, tmp_path):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    square = photo.resize((48, 48))  # an icon is square
    path = tmp_path / f"photo.{suffix.upper()}"
    (square.convert("L") if suffix == "pgm" else square).save(
        path, Image.registered_extensions()[f".{suffix}"]
    )
    assert list_images(tmp_path) == [path]
    expected = square.convert("L").convert("RGB") if suffix == "pgm" else square
    assert np.abs(pixels(read_image(path)) - pixels(expected)).mean() < (12 if suffix == "gif" else 4)


@pytest.mark.parametrize("suffix", "heic heif jxl dng nef arw cr2 cr3 raf orf rw2 raw svg wmf".split())
def test_other_images_are_listed_and_refused_by_name(suffix, photo, tmp_path):
    path = tmp_path / f"photo.{suffix}"
    photo.save(path, "TIFF")  # raw files are TIFFs whose first picture is a thumbnail
    assert list_images(tmp_path) == [path]
    with pytest.raises(DatasetError, match=rf"photo.{suffix}: Pillow .* does not read .{suffix}; convert it"):
        read_image(path)


@pytest.mark.parametrize("suffix", [".avif", ".webp", ".jp2"])
def test_formats_that_this_pillow_lacks_are_named(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "PHOTO_SUFFIXES", dataset.PHOTO_SUFFIXES - {suffix})
    monkeypatch.setattr(mimetypes, "guess_type", lambda name: (None, None))  # older Pythons do not know them
    (tmp_path / f"a{suffix}").write_bytes(b"x")
    with pytest.raises(DatasetError, match="does not read"):
        read_image(list_images(tmp_path)[0])


@pytest.mark.parametrize(
    "name", ["notes.txt", "clip.mp4", "page.pdf", "data.h5", "drawing.eps", "jpg", ".hidden.jpg", "._a.jpg"]
)
def test_other_files_are_no_photos(name, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    assert list_images(tmp_path) == []


def test_folders_and_broken_links_named_like_images_are_named(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    expected = ("folder.jpg: is a folder", "link.jpg: no such file; check the path")
    for path, words in zip(list_images(tmp_path), expected, strict=True):
        with pytest.raises(DatasetError, match=words):
            read_image(path)


def test_order_is_natural_and_never_left_to_the_file_system(tmp_path):
    names = ["1.jpg", "01.jpg", "2.jpg", "10.JPG", "a2.png", "a10.png"]
    for name in reversed(names):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in list_images(tmp_path)] == ["01.jpg", *names[:1], *names[2:]]


def test_a_folder_that_cannot_be_listed_says_so(tmp_path):
    with pytest.raises(DatasetError, match="cannot be listed"):
        list_images(tmp_path / "gone")


def test_postscript_under_a_photos_name_never_runs(tmp_path):
    (tmp_path / "a.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(DatasetError, match="cannot be read as an image"):
        read_image(tmp_path / "a.jpg")


# --- Metadata -----------------------------------------------------------------------------------------------

NOT_TIFF = b"Exif\0\0this is no TIFF header"
CUT_OFF = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"
CYCLE = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\xff\xff\xff\xff\x08\0\0\0\x08\0\0\0"
MPF = b"MPF\0II*\0\x08\0\0\0\x01\0\x01\xb0\x04\0\x01\0\0\0\xff\xff\xff\xff\0\0\0\0"


@pytest.mark.parametrize(
    "segments",
    [
        [(0xE1, NOT_TIFF)],
        [(0xE1, b"Exif\0\0")],
        [(0xE1, CUT_OFF)],
        [(0xE1, CYCLE)],
        [(0xE1, CUT_OFF), (0xE1, NOT_TIFF)],
        [(0xE2, MPF)],
        [(0xE2, b"MPF\0garbage")],
        [(0xE2, b"ICC_PROFILE\0")],
        [(0xE2, b"ICC_PROFILE\0\x09\x02xx")],
        [(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0\0\0\0\x02xx")],
        [(0xE1, b"http://ns.adobe.com/xap/1.0/\0<")],
        [(0xFE, b"")],
        [(0xE1, b"")],
    ],
    ids=lambda segments: f"{segments[0][0]:X} {segments[0][1][:4]}",
)
def test_a_jpegs_metadata_never_decide_whether_it_is_read(segments, photo, tmp_path):
    for name, data in (("plain.jpg", jpeg(photo)), ("odd.jpg", jpeg(photo, *segments))):
        (tmp_path / name).write_bytes(data)
    assert np.array_equal(read_image(tmp_path / "odd.jpg"), read_image(tmp_path / "plain.jpg"))


@pytest.mark.parametrize(
    "chunk",
    [
        (b"eXIf", NOT_TIFF[6:], True),
        (b"eXIf", b"", True),
        (b"eXIf", CUT_OFF[6:], True),
        (b"eXIf", exif(1).tobytes()[6:], False),
        (b"tEXt", b"Software\0x", False),
        (b"zTXt", b"a\0\0garbage", True),
        (b"zTXt", b"a\0\x07x", True),
        (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21)), True),
        (b"iCCP", b"p\0\0garbage", True),
        (b"iCCP", b"p", True),
        (b"iTXt", b"a\0\x01\0\0\0garbage", True),
        (b"gAMA", b"", True),
        (b"cHRM", b"xx", True),
        (b"pHYs", b"x", True),
        (b"tEXt", b"Raw profile type exif\0exif\nzz", True),
        (b"acTL", b"", True),
        (b"acTL", b"\0\0\0\x05\0\0\0\0", True),
        (b"sRGB", b"", True),
        (b"tIME", b"", False),
    ],
    ids=lambda chunk: f"{chunk[0].decode()} {len(chunk[1])} {chunk[2]}",
)
def test_a_pngs_metadata_never_decide_whether_it_is_read(chunk, photo, tmp_path):
    (tmp_path / "a.png").write_bytes(png(photo, chunk))
    assert np.array_equal(read_image(tmp_path / "a.png"), photo)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_upright(orientation, suffix, photo, tmp_path):
    path = tmp_path / f"a.{suffix}"
    photo.save(path, exif=exif(orientation))
    expected = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    read = read_image(path)
    assert read.size == ((32, 48) if orientation > 4 else (48, 32)) and np.array_equal(read, expected)
    assert np.array_equal(to_rgb(read), read), "turned twice"


@pytest.mark.parametrize(
    "data",
    [
        lambda photo: png(photo, (b"eXIf", exif(6).tobytes()[6:], True), (b"tEXt", b"a\0b", False)),
        lambda photo: jpeg(photo, (0xE1, exif(6).tobytes()), (0xE2, MPF)),
    ],
    ids=["png", "jpeg"],
)
def test_a_photo_stays_upright_where_other_metadata_are_damaged(data, photo, tmp_path):
    (tmp_path / "photo").write_bytes(data(photo))
    assert read_image(tmp_path / "photo").size == (32, 48)


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_is_none_leaves_the_photo_as_it_is(orientation, photo, tmp_path):
    photo.save(tmp_path / "a.png", exif=exif(orientation))
    assert read_image(tmp_path / "a.png").size == (48, 32)


def test_what_was_read_carries_no_metadata(photo, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(photo, (0xE1, NOT_TIFF)))
    assert read_image(tmp_path / "a.jpg").info == {}
    assert to_rgb(Image.open(tmp_path / "a.jpg")).info == {}


# --- Bits and floats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("high", "white"),
    [
        (255, 255),
        (256, 1023),
        (1023, 1023),
        (1024, 4095),
        (4095, 4095),
        (10000, 16383),
        (16384, 65535),
        (65535, 65535),
        (10**6, 2**24 - 1),
        (2**31 - 1, 2**32 - 1),
    ],
)
@pytest.mark.parametrize("name", ["int32.tif", "uint16.tif", "uint16.png", "big_endian.tif", "uint16.pgm"])
def test_integers_are_scaled_by_the_bits_that_hold_them(name, high, white, tmp_path):
    if high > 65535 and name != "int32.tif":
        pytest.skip("does not fit")
    if name == "uint16.pgm" and high != 65535:
        pytest.skip("Pillow scales a PGM by the white it states")
    values = np.linspace(0, high, 48 * 32).round().reshape(32, 48)
    image = Image.fromarray(
        values.astype(np.int32 if "int32" in name else ">u2" if "big" in name else np.uint16)
    )
    image.save(tmp_path / name)
    grey = pixels(read_image(tmp_path / name))
    assert np.abs(grey - (values * 255 / white)[..., None]).max() <= 0.501


def test_unsigned_32_bits_are_not_taken_for_negative(tmp_path):
    image = Image.fromarray(np.linspace(0, 2**32 - 1, 64).astype(np.uint32).view(np.int32).reshape(8, 8))
    image.save(tmp_path / "a.tif", tiffinfo={339: 1})
    data = bytearray((tmp_path / "a.tif").read_bytes())
    place = data.index(struct.pack("<HHI", 339, 3, 1)) + 8
    data[place] = 1  # Pillow always writes "signed"
    (tmp_path / "a.tif").write_bytes(data)
    grey = pixels(read_image(tmp_path / "a.tif"))[..., 0].ravel()
    assert grey[0] == 0 and grey[-1] == 255 and (np.diff(grey) > 0).all()


@pytest.mark.parametrize("low", [0, 30, 100])
def test_eight_bits_are_never_rescaled(low, tmp_path):
    grey = np.arange(low, low + 64, dtype=np.uint8).reshape(8, 8)
    for name, values in (("a.png", grey), ("a.tif", grey), ("int32.tif", grey.astype(np.int32))):
        Image.fromarray(values).save(tmp_path / name)
        assert np.array_equal(pixels(read_image(tmp_path / name))[..., 0], grey), name


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (np.linspace(0, 1, 64), 1),
        (np.linspace(0, 0.2, 64), 1),
        (np.zeros(64), 1),
        (np.linspace(0, 255, 64), 255),
        (np.linspace(0, 60, 64), 255),
    ],
    ids=["0..1", "0..0.2", "zero", "0..255", "0..60"],
)
def test_floats_are_scaled_by_1_or_255(values, white, tmp_path):
    Image.fromarray(values.astype(np.float32).reshape(8, 8)).save(tmp_path / "a.tif")
    assert (
        np.abs(pixels(read_image(tmp_path / "a.tif"))[..., 0].ravel() - values * 255 / white).max() <= 0.501
    )


def hot(value, n=1):
    values = np.linspace(0, 0.9, 200)
    values[:n] = value
    return values.astype(np.float32)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (hot(1e6), "to 1e\\+06"),
        (hot(2), "to 2"),
        (hot(254, n=2), "1.00% above 1"),
        (hot(256, n=100), "to 256"),
        (hot(-1), "of -1 to 0.9"),
        (hot(np.inf), "to inf"),
        (hot(-np.inf), "of -inf"),
        (hot(np.nan), "0.9.* 1 NaN"),
        (hot(np.nan, n=200), "200 NaN"),
        (np.full(200, -5, np.int32), "of -5 to -5"),
        (np.arange(-100, 100, dtype=np.int32), "of -100 to 99"),
    ],
    ids=lambda value: "" if isinstance(value, np.ndarray) else value,
)
def test_values_that_no_rule_explains_are_refused_with_their_range(values, words, tmp_path):
    Image.fromarray(values.reshape(10, 20)).save(tmp_path / "a.tif")
    with pytest.raises(DatasetError, match=f"a.tif: has values .*{words}.*save 8 bits"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("high", "fits"), [(65535, True), (16384, True), (16383, False), (4095, False), (255, False)]
)
def test_colours_of_16_bits_are_not_read_as_black(high, fits, tmp_path):
    row = struct.pack(">12H", *[high] * 12)  # 12 bits in 16, of which Pillow keeps the upper 8
    (tmp_path / "a.png").write_bytes(png(None, depth=16, rows=[row] * 4))
    if fits:
        assert pixels(read_image(tmp_path / "a.png")).max() == high >> 8
    else:
        with pytest.raises(DatasetError, match="a.png: has colours of 16 bits.*save 8 bits"):
            read_image(tmp_path / "a.png")


# --- Transparency -------------------------------------------------------------------------------------------


def holes(photo, mode):
    """The photo's left half over noise under alpha 0, as an image of a mode with transparency."""
    rgba = photo.convert("RGBA")
    noise = np.random.default_rng(0).integers(0, 256, (32, 24, 3), dtype=np.uint8)
    rgba.paste(Image.fromarray(noise), (24, 0))
    rgba.putalpha(Image.fromarray(np.repeat(np.uint8([[255, 0]]), 24, axis=1).repeat(32, axis=0)))
    if mode == "palette":
        return rgba.quantize(64)
    if mode == "PA":  # Pillow's own conversion to it drops the alpha
        grey = rgba.convert("LA").convert("PA")
        grey.putalpha(rgba.getchannel("A"))
        return grey
    return rgba.convert("LA").convert(mode) if mode in ("LA", "La") else rgba.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa", "palette"])
def test_nothing_under_alpha_0_reaches_the_network(mode, photo):
    image = holes(photo, mode)
    rgb = pixels(to_rgb(image))
    assert (rgb[:, 24:] == dataset.GREY).all()
    expected = photo.convert("L").convert("RGB") if mode in ("LA", "PA", "La") else photo
    assert np.abs(rgb[:, :24] - pixels(expected)[:, :24]).mean() < 8


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "gif", "tga"])
def test_nothing_under_alpha_0_of_a_file_reaches_the_network(suffix, photo, tmp_path):
    holes(photo, "RGBA").save(tmp_path / f"a.{suffix}")
    assert (pixels(read_image(tmp_path / f"a.{suffix}"))[:, 24:] == dataset.GREY).all()


def test_half_transparent_is_half_grey():
    assert to_rgb(Image.new("RGBA", (4, 4), (228, 28, 128, 128))).getpixel((0, 0)) == pytest.approx(
        (178, 78, 128), abs=1
    )


@pytest.mark.parametrize(
    ("color_type", "depth", "row", "color"),
    [
        (0, 1, b"\xf0", 1),
        (0, 2, b"\xff", 3),
        (0, 4, b"\xff\xff", 15),
        (0, 8, b"\xc8" * 4, 200),
        (0, 16, b"\xc8\x64" * 4, 0xC864),
        (2, 8, b"\xc8\x64\x32" * 4, (200, 100, 50)),
        (2, 16, b"\xc8\x01\x64\x02\x32\x03" * 4, (0xC801, 0x6402, 0x3203)),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else str(value),
)
def test_the_one_transparent_colour_of_a_png_becomes_grey(color_type, depth, row, color, tmp_path):
    key = struct.pack(f">{3 if color_type == 2 else 1}H", *(color if color_type == 2 else (color,)))
    (tmp_path / "a.png").write_bytes(
        png(None, (b"tRNS", key), color_type=color_type, depth=depth, rows=[row] * 4)
    )
    assert (pixels(read_image(tmp_path / "a.png")) == dataset.GREY).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_modes_without_transparency_become_rgb(mode, photo):
    assert np.array_equal(to_rgb(photo.convert(mode)), photo.convert(mode).convert("RGB"))


# --- Size and damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "size"), [(10392, "108.0"), (20000, "400.0")])
def test_too_large_a_photo_is_told_to_shrink(side, size, tmp_path):
    (tmp_path / "a.png").write_bytes(png(None, rows=[b""], size=(side, side)))
    with pytest.raises(DatasetError, match=f"a.png: has {size} megapixels, the limit is 89.5; shrink it"):
        read_image(tmp_path / "a.png")


def test_the_limit_holds_in_threads_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")

    def read(_):
        with pytest.raises(DatasetError, match="shrink it"):
            read_image(tmp_path / "a.png")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(64)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read as an image"),
        (b"this is no photo", "cannot be read as an image"),
        (b"\xff\xd8\xff", "cannot be read"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read"),
        (b"\xff\xd8" + b"\xff\xe1\0\0" * 99, "cannot be read"),
    ],
    ids=["empty", "text", "jpeg marker", "png marker", "segments without end"],
)
def test_what_is_no_image_is_refused(content, words, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DatasetError, match=f"a.jpg: {words}.*replace or remove it"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("cut", [0.5, 0.9])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp"])
def test_half_a_photo_is_refused(suffix, cut, photo, tmp_path):
    path = tmp_path / f"a.{suffix}"
    photo.resize((300, 200)).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
    with pytest.raises(DatasetError, match="cannot be read as an image"):
        read_image(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone.jpg", "no such file"),
        ("x" * 300, "(?i)too long"),
        ("loop.jpg", "(?i)symbolic links"),
        ("file.txt/a.jpg", "(?i)not a directory"),
    ],
)
def test_the_systems_refusals_are_passed_on(name, words, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_bytes(b"x")
    os.symlink("loop.jpg", tmp_path / "loop.jpg")
    with pytest.raises(DatasetError, match=words):
        read_image(tmp_path / name)


def test_one_pixel_is_no_photo(tmp_path):
    Image.new("RGB", (1, 5)).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match="1x5 pixels, expected 2x2 or more"):
        read_image(tmp_path / "a.png")
