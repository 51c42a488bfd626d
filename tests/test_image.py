"""Pictures: the peer's rounding, every kind of file that people have, metadata both ways, whole files or none."""

import io
import json
import os
import stat
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from sdcore.errors import ImageError, NonFiniteError
from sdcore.image import (
    Picture,
    fit,
    grid,
    open_mask,
    open_picture,
    parameters_text,
    parse_parameters,
    read_metadata,
    strip,
    to_mask,
    to_pictures,
    to_tensor,
    to_unit,
    write_whole,
)
from tests.timing import fastest

SETTINGS = {
    "prompt": "a red circle, above: a blue square\nsecond line", "negative": "blurry, 'ugly' \"x\"", "steps": 20,
    "sampler": "dpmpp_2m", "schedule": "karras", "guidance": 7.5, "seed": 2**63, "size": "64x48", "model": "my, model: v2",
}  # fmt: skip


@pytest.fixture
def picture():
    levels = torch.randint(0, 256, (48, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Picture(levels.numpy(), dict(SETTINGS))


# --- numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounds_as_diffusers(dtype):
    from diffusers.image_processor import VaeImageProcessor

    exact_halves = ((torch.arange(255) + 0.5) / 255 * 2 - 1).repeat(3, 4, 1)[None]
    noise = torch.randn(2, 3, 40, 255, generator=torch.Generator().manual_seed(0))
    pixels = torch.cat([exact_halves, noise[:, :, :4]]).to(dtype)
    theirs = VaeImageProcessor().postprocess(pixels, output_type="np")
    theirs = VaeImageProcessor.numpy_to_pil(theirs)
    for ours, peer in zip(to_pictures(pixels), theirs, strict=True):
        assert np.array_equal(ours, np.array(peer))


def test_reads_levels_as_diffusers(picture):
    from diffusers.image_processor import VaeImageProcessor

    assert torch.equal(to_tensor(picture), VaeImageProcessor().preprocess(picture.pil))
    assert torch.equal(to_unit(picture), VaeImageProcessor(do_normalize=False).preprocess(picture.pil))
    assert to_tensor([picture, picture]).shape == (2, 3, 48, 64)
    assert np.array_equal(to_pictures(to_tensor(picture))[0], picture)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_black_picture_of_nan(value):
    pixels = torch.zeros(1, 3, 8, 8)
    pixels[0, 1, 2, 3] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        to_pictures(pixels)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 8, 8, 3)])
def test_wrong_layout(shape):
    with pytest.raises(ImageError, match="expected"):
        to_pictures(torch.zeros(shape))


# --- metadata


def test_settings_round_trip(tmp_path, picture):
    picture.save(tmp_path / "a.png")
    assert read_metadata(tmp_path / "a.png") == SETTINGS
    found = open_picture(tmp_path / "a.png")
    assert np.array_equal(found, picture) and found.metadata == SETTINGS
    found.save(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_parameters_as_a1111_writes_them():
    text = parameters_text(SETTINGS)
    assert text.split("\n") == [
        "a red circle, above: a blue square", "second line", "Negative prompt: blurry, 'ugly' \"x\"",
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: karras, CFG scale: 7.5, Seed: 9223372036854775808, "
        'Size: 64x48, Model: "my, model: v2"',
    ]  # fmt: skip
    assert parse_parameters(text) == SETTINGS


def test_parameters_of_other_tools(tmp_path):
    text = (
        "portrait, (masterpiece:1.2)\nNegative prompt: lowres\nbad hands\nSteps: 28, Sampler: Euler a, CFG scale: 7, Seed: 123, "
        'Size: 512x768, Model hash: 6ce0161689, Model: v1-5-pruned, Lora hashes: "a: 12, b: 34", Steps2: x, Version: v1.9.4'
    )
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "theirs.png", pnginfo=info)
    assert read_metadata(tmp_path / "theirs.png") == {
        "prompt": "portrait, (masterpiece:1.2)", "negative": "lowres\nbad hands", "steps": 28, "sampler": "euler_a",
        "guidance": 7.0, "seed": 123, "size": "512x768", "model_hash": "6ce0161689", "model": "v1-5-pruned", "version": "v1.9.4",
    }  # fmt: skip


@pytest.mark.parametrize("text, settings", [
    ("", {"prompt": ""}),
    ("only a prompt", {"prompt": "only a prompt"}),
    ("Style: oil, mood: calm", {"prompt": "Style: oil, mood: calm"}),
    ("p\nSteps: many, Seed: 1e9, CFG scale: x, Sampler: Own", {"prompt": "p", "sampler": "Own"}),
    ("p\nSteps: 1, Sampler: DPM++ 2M Karras, Seed: 2",
     {"prompt": "p", "steps": 1, "sampler": "dpmpp_2m", "schedule": "karras", "seed": 2}),
    ("p\nSteps: 1, Sampler: LMS, Schedule type: SGM Uniform",
     {"prompt": "p", "steps": 1, "sampler": "lms", "schedule": "sgm_uniform"}),
    ("p\nSteps: 1, Sampler: LMS, Schedule type: Automatic", {"prompt": "p", "steps": 1, "sampler": "lms"}),
    ("p\nNegative prompt:\nSteps: 1, Seed: 2, Size: 8x8", {"prompt": "p", "negative": "", "steps": 1, "seed": 2, "size": "8x8"}),
])  # fmt: skip
def test_parameters_that_are_odd(text, settings):
    assert parse_parameters(text) == settings


def test_parameters_in_linear_time():
    """Milliseconds; a quadratic search would take hours."""
    for text in ("a" * 2**20, "a: " * 2**18, 'a: "' + "\\" * 2**20, "\n" * 2**20):
        assert fastest(lambda text=text: parse_parameters(text), tries=2) < 2


def test_hostile_text_stays_text(tmp_path):
    hostile = "<script>\x1b[31m../../etc/passwd\r\n{}"
    Picture(np.zeros((8, 8, 3), np.uint8), {"prompt": hostile, "größe": "é 漢"}).save(tmp_path / "a.png")
    assert read_metadata(tmp_path / "a.png") == {"prompt": hostile, "größe": "é 漢"}
    for text in ("[" * 100_000, "[1]", "{", "null"):
        info = PngImagePlugin.PngInfo()
        info.add_text("sdcore", text)
        Image.new("RGB", (8, 8)).save(tmp_path / "b.png", pnginfo=info)
        assert read_metadata(tmp_path / "b.png") == {}


# --- files that people have


def saved(path, image, **options):
    image.save(path, **options)
    return open_picture(path)


def test_modes(tmp_path):
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for mode in ("L", "P", "1", "RGB"):
        found = saved(tmp_path / f"{mode}.png", grey.convert(mode))
        assert np.array_equal(found, grey.convert(mode).convert("RGB")), mode
    deep = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    found = saved(tmp_path / "deep.png", Image.fromarray(deep))
    assert np.array_equal(np.asarray(found)[..., 0], np.round(deep / 257)) and np.asarray(found).max() == 254
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = np.asarray(saved(tmp_path / "cmyk.jpg", cmyk, quality=95))[8, 8]
    assert red[0] > 200 and red[1] < 60 and red[2] < 60
    assert saved(tmp_path / "a.webp", grey.convert("RGB"), lossless=True).size == (16, 16)


def test_transparency_hides(tmp_path):
    """The colour under full transparency is the background, whatever the file keeps there."""
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:8, :, 3] = 255  # above it is opaque, below it is half so at the left and clear at the right
    rgba[8:, :8, 3] = 128
    Image.fromarray(rgba).save(tmp_path / "a.png")
    white, green = open_picture(tmp_path / "a.png"), open_picture(tmp_path / "a.png", background=(0, 255, 0))
    assert np.asarray(white)[0, 0].tolist() == [200, 0, 0] and np.asarray(white)[9, 9].tolist() == [255, 255, 255]
    assert np.asarray(green)[9, 9].tolist() == [0, 255, 0] and np.asarray(green)[9, 0].tolist() == [100, 127, 0]
    la = Image.fromarray(rgba[..., [0, 3]])
    assert np.asarray(saved(tmp_path / "la.png", la))[9, 9].tolist() == [255, 255, 255]
    palette = Image.fromarray(rgba[..., :3]).convert("P", dither=Image.Dither.NONE)
    clear = palette.getpixel((0, 0))
    assert np.asarray(saved(tmp_path / "p.png", palette, transparency=clear)).min() == 255
    assert saved(tmp_path / "a.webp", Image.fromarray(rgba), lossless=True).pixels[9, 9].tolist() == [255, 255, 255]


def deep_png(levels: np.ndarray, kind: int, *chunks: bytes) -> bytes:
    """A PNG of 16 bits a channel: levels [h, w, c], kind 2 for colour, 4 for grey with alpha, 6 for colour with alpha."""
    h, w, _ = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_deep_colour_keeps_its_high_byte(tmp_path):
    levels = np.random.default_rng(0).integers(0, 65536, (9, 11, 4))
    levels[4:, :, 3], levels[:4, :, 3] = 0, 65535
    (tmp_path / "a.png").write_bytes(deep_png(levels[..., :3], 2))
    assert np.array_equal(open_picture(tmp_path / "a.png"), levels[..., :3] >> 8)
    (tmp_path / "a.png").write_bytes(deep_png(levels, 6))
    found = np.asarray(open_picture(tmp_path / "a.png"))
    assert np.array_equal(found[:4], levels[:4, :, :3] >> 8) and found[4:].min() == 255
    (tmp_path / "a.png").write_bytes(deep_png(levels[..., [0, 3]], 4))
    found = np.asarray(open_picture(tmp_path / "a.png"))
    assert np.array_equal(found[:4, :, 1], levels[:4, :, 0] >> 8) and found[4:].min() == 255


def test_colour_profiles_are_not_applied(tmp_path, picture):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    assert np.array_equal(saved(tmp_path / "a.png", picture.pil, icc_profile=profile), picture)


def test_the_name_says_nothing(tmp_path, picture):
    picture.pil.save(tmp_path / "a.webp", "PNG")
    assert np.array_equal(open_picture(tmp_path / "a.webp"), picture)
    picture.pil.save(tmp_path / "b.png", "JPEG")
    assert open_picture(tmp_path / "b.png").size == picture.size


@pytest.mark.parametrize("w, h", [(1, 1), (7, 64), (64, 7), (16_385, 8), (50_000, 8), (50_000, 1), (8, 50_000)])
def test_sides(tmp_path, w, h):
    Image.new("L", (w, h)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=f"a.png: {w} x {h} pixels; expected sides from 8 to 16384") as error:
        open_picture(tmp_path / "a.png")
    assert str(error.value).count("a.png") == 1  # said once, and not that the file is damaged
    with pytest.raises(ImageError, match=f"a.png: {w} x {h} pixels"):
        open_mask(tmp_path / "a.png")


def test_sides_just_allowed(tmp_path):
    for size in ((8, 8), (16_384, 8), (8, 16_384)):
        assert saved(tmp_path / "a.png", Image.new("L", size)).size == size


# --- masks


def test_masks(tmp_path, picture):
    """White is repainted; colours by their brightness; what nobody painted, in a layer with alpha, is kept."""
    levels = np.arange(0, 256, 4, dtype=np.uint8)[None].repeat(48, 0)
    Image.fromarray(levels).save(tmp_path / "grey.png")
    mask = open_mask(tmp_path / "grey.png", picture)
    assert np.array_equal(mask.pixels, levels[..., None].repeat(3, 2))
    found = to_mask(mask)
    assert found.shape == (1, 1, 48, 64) and torch.equal(found[0, 0], torch.from_numpy(levels.astype(np.float32) / 255))

    Image.fromarray(levels > 200).save(tmp_path / "bits.png")
    assert np.array_equal(open_mask(tmp_path / "bits.png").pixels[..., 0], (levels > 200) * 255)

    colour = np.zeros((48, 64, 3), np.uint8)
    colour[:24] = 255, 255, 0
    Image.fromarray(colour).save(tmp_path / "colour.png")
    found = open_mask(tmp_path / "colour.png").pixels
    assert found[0, 0].tolist() == [226] * 3 and found[-1, 0].tolist() == [0] * 3

    layer = np.full((48, 64, 4), 255, np.uint8)
    layer[:, 32:, 3] = 0  # white, but clear
    layer[:, 16:32, 3] = 100
    Image.fromarray(layer).save(tmp_path / "layer.png")
    assert open_mask(tmp_path / "layer.png").pixels[0, ::16, 0].tolist() == [255, 100, 0, 0]


def test_mask_as_diffusers(tmp_path, picture):
    from diffusers.image_processor import VaeImageProcessor

    picture.pil.save(tmp_path / "a.png")
    theirs = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True).preprocess(picture.pil)
    assert torch.equal((to_mask(open_mask(tmp_path / "a.png")) >= 0.5).float(), theirs)


@pytest.mark.parametrize("level, size, says", [
    (0, (64, 48), "nothing in this mask is white"), (127, (64, 48), "nothing in this mask is white"),
    (255, (48, 64), "the mask is 48 x 64, its picture 64 x 48 pixels"),
])  # fmt: skip
def test_masks_that_are_none(tmp_path, picture, level, size, says):
    Image.new("L", size, level).save(tmp_path / "mask.png")
    with pytest.raises(ImageError, match=says) as error:
        open_mask(tmp_path / "mask.png", picture)
    assert "mask.png" in str(error.value) and "\n" not in str(error.value)


# --- to size


SIZES = [(64, 48), (48, 64), (100, 100), (33, 127), (9, 8), (130, 8), (8, 90), (200, 61)]


@pytest.mark.parametrize("how, theirs", [("crop", "crop"), ("stretch", "default"), ("pad", "fill")])
def test_fit_as_diffusers(how, theirs):
    from diffusers.image_processor import VaeImageProcessor

    g = np.random.default_rng(0)
    for w, h in SIZES:
        picture = Picture(g.integers(0, 256, (h, w, 3), dtype=np.uint8), dict(SETTINGS))
        for size in [(64, 64), (72, 40), (48, 104), (w, h)]:
            found = fit(picture, *size, how)
            peer = np.array(VaeImageProcessor().resize(picture.pil, size[1], size[0], resize_mode=theirs))
            assert found.size == size and found.metadata == SETTINGS
            if how == "pad":  # diffusers sharpens its border outwards; here it goes on as it is
                w2, h2 = min(size[0], w * size[1] // h), min(size[1], h * size[0] // w)
                left, top = size[0] // 2 - w2 // 2, size[1] // 2 - h2 // 2
                inside = (slice(top, top + h2), slice(left, left + w2))
                assert np.array_equal(found.pixels[inside], peer[inside]), (w, h, size)
                margins = ((top, size[1] - top - h2), (left, size[0] - left - w2), (0, 0))
                assert np.array_equal(found, np.pad(peer[inside], margins, mode="edge"))
            else:
                assert np.array_equal(found, peer), (w, h, size)


def test_fit_of_what_fits_is_itself(picture):
    for how in ("crop", "pad", "stretch"):
        assert np.array_equal(fit(picture, 64, 48, how), picture)


def test_fit_says_what_is_wrong(picture):
    with pytest.raises(ImageError, match="expected crop, pad or stretch, found 'fill'"):
        fit(picture, 64, 64, "fill")
    with pytest.raises(ImageError, match="16000 to 8 is too long to fit 512 x 512"):
        fit(Picture(np.zeros((8, 16000, 3), np.uint8)), 512, 512, "pad")
    assert fit(Picture(np.zeros((8, 16000, 3), np.uint8)), 512, 512, "stretch").size == (512, 512)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_exif_says(tmp_path, orientation):
    upright = np.zeros((24, 16, 3), np.uint8)
    upright[:12, :8] = 255  # white in the upper left, wherever the camera put it
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpose that makes the stored one from the upright
    stored = Image.fromarray(upright)
    stored = stored.transpose(undo[orientation]) if orientation > 1 else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = saved(tmp_path / "a.jpg", stored, exif=exif, quality=95)
    assert found.size == (16, 24)
    assert np.asarray(found)[4, 3].min() > 240 and np.asarray(found)[20, 12].max() < 15


def test_damaged_exif_is_no_reason_to_refuse(tmp_path, picture):
    picture.pil.save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff" + b"\xff" * 40)
    assert open_picture(tmp_path / "a.jpg").size == picture.size


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        with pytest.warns(UserWarning, match="animated"):
            assert np.asarray(open_picture(tmp_path / name))[0, 0].tolist() == [255, 0, 0]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(w, h, *chunks):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(chunks)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


HOSTILE = {
    "8001 x 8000": (bomb(8001, 8000), "64 megapixels"),
    "20000 x 20000": (bomb(20000, 20000), "64 megapixels"),
    "0 x 8": (bomb(0, 8), "a.png"),
    "text bomb": (bomb(8, 8, chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * 2**24))), "damaged"),
    "cut off": (bomb(64, 64), "damaged or cut off"),
    "gif": (b"GIF89a" + b"\0" * 100, "expected PNG, JPEG or WebP"),
    "pdf": (b"%PDF-1.4\n" + b"\0" * 100, "expected PNG, JPEG or WebP"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "expected PNG, JPEG or WebP"),
    "tiff": (b"II*\0\x08\0\0\0" + b"\0" * 100, "expected PNG, JPEG or WebP"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "expected PNG, JPEG or WebP"),
    "empty": (b"", "expected PNG, JPEG or WebP"),
    "text": (b"hello", "expected PNG, JPEG or WebP"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path, name):
    data, says = HOSTILE[name]
    (tmp_path / "a.png").write_bytes(data)

    def refused():
        with pytest.raises(ImageError, match=says) as error:
            open_picture(tmp_path / "a.png")
        assert "a.png" in str(error.value) and "\n" not in str(error.value)

    assert fastest(refused, tries=2) < 1


def test_every_cut_is_an_image_error(tmp_path, picture):
    for kind in ("PNG", "JPEG", "WEBP"):
        file = io.BytesIO()
        picture.pil.save(file, kind)
        whole = file.getvalue()
        for length in range(0, len(whole) - 20, 97):  # (a PNG's last 20 bytes hold no pixels)
            (tmp_path / "cut").write_bytes(whole[:length])
            with pytest.raises(ImageError, match="cut"):
                open_picture(tmp_path / "cut")


@pytest.mark.parametrize("path", ["missing.png", ".", "a\0b.png"])
def test_no_file(tmp_path, path):
    with pytest.raises(ImageError):
        open_picture(f"{tmp_path}/{path}")


# --- sheets


def test_grid_and_strip(picture):
    sheet = grid([picture] * 3)
    assert sheet.size == (64 * 2 + 4, 48 * 2 + 4) and sheet.metadata == SETTINGS
    assert np.array_equal(np.asarray(sheet)[52:, :64], picture) and np.asarray(sheet)[52:, 64:].min() == 255
    made = strip([picture] * 12, [f"step {i}\nnoise 1.5" for i in range(12)])
    assert made.size == (10 * (64 + 4) - 4, 2 * (48 + 28 + 4) - 4)
    assert (
        np.array_equal(np.asarray(made)[:48, :64], picture) and np.asarray(made)[48:76, :64].min() < 100
    )  # a label is there
    large = Picture(np.zeros((256, 512, 3), np.uint8))
    assert strip([large], ["x"]).size == (128, 64 + 28)
    for wrong in ([], [picture, large]):
        with pytest.raises(ImageError, match="one size"):
            grid(wrong)


# --- saving


def test_mode_follows_the_umask_and_links_stay(tmp_path, picture):
    old = os.umask(0o027)
    try:
        picture.save(tmp_path / "a.png")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o640
    (tmp_path / "link.png").symlink_to("a.png")
    Picture(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink() and open_picture(tmp_path / "a.png").size == (8, 8)


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_nothing_is_lost_when_writing_fails(tmp_path, monkeypatch, call):
    """Disk full at any call: the old file is there whole, nothing lies beside it."""
    (tmp_path / "a.png").write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    if call == "write":
        real = open

        class Full(io.RawIOBase):
            write = fail

        monkeypatch.setattr(
            "builtins.open", lambda f, mode="r", *a, **k: Full() if mode == "xb" else real(f, mode, *a, **k)
        )
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(ImageError, match="No space left"):
        write_whole(tmp_path / "a.png", b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.png", b"old")]


def test_order_of_a_save(tmp_path, monkeypatch):
    calls = []
    sync, rename = os.fsync, os.replace

    def noted(fd):
        calls.append(("sync", stat.S_IFMT(os.fstat(fd).st_mode), os.fstat(fd).st_size))
        sync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("rename"), rename(*names)))
    write_whole(tmp_path / "a.png", b"data")
    assert calls[:2] == [("sync", stat.S_IFREG, 4), "rename"]  # all bytes, then the name
    assert calls[2][:2] == ("sync", stat.S_IFDIR)  # then the folder that holds the name


@pytest.mark.parametrize("name, says", [
    ("a.jpg", "saved as PNG"), ("nowhere/a.png", "no folder"), ("folder.png", "is a folder"),
    ("file/a.png", "no folder"), ("x" * 300 + ".png", "too long"), ("a\0.png", "null"),
])  # fmt: skip
def test_where_it_cannot_be_written(tmp_path, picture, name, says):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ImageError, match=says):
        picture.save(tmp_path / name)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder.png"]


def test_metadata_is_json(tmp_path, picture):
    """The chunk that makes a picture again is plain JSON for any reader."""
    picture.save(tmp_path / "a.png")
    assert json.loads(Image.open(tmp_path / "a.png").info["sdcore"]) == SETTINGS
