"""Pictures: from pixels in -1..1 to a PNG that says how it was made, and from a stranger's file to pixels.

A `Picture` is an array of bytes and the settings that made it. `to_pictures` and `to_tensor` cross to the models' side
with the very arithmetic of diffusers' VaeImageProcessor. `open_picture` is the only way in. Its rules: PNG, JPEG or WebP
by content, not by name; sides of 8 to 16,384 pixels and at most 64 megapixels, asked before anything is decoded; turned as
EXIF says; transparency laid on a stated colour (white), so that what was hidden stays hidden; CMYK and palettes become RGB;
16-bit grey is scaled, 16-bit colour keeps its high byte; of an animation the first frame; colour profiles are not applied.

`open_mask` reads a mask by the same rules: white is repainted, black is kept, colours count by their brightness, and
transparency is laid on black, so what nobody painted is kept. A mask has the size of its picture. `fit` brings pictures
and masks to the size that is drawn; `to_tensor`, `to_unit` and `to_mask` hand them to the models.

`Picture.save` is the only way out: written beside, synced, renamed, so there is a whole file or none. The PNG carries
`sdcore` (JSON, exact: the picture can be made again) and `parameters` (the text that most other tools read).

Legend: b pictures, h height, w width; pixels [b, 3, h, w] in -1..1 on the models' side, [h, w, 3] uint8 on this one.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import secrets
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor

from .errors import ImageError, NonFiniteError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64_000_000
SIDES = (8, 16_384)  # pixels: the width of one latent value; more than anybody draws
WHITE = (255, 255, 255)


@dataclass
class Picture:
    """One picture, and what made it."""

    pixels: np.ndarray  # [h, w, 3] uint8
    metadata: dict[str, Any] = field(default_factory=dict)  # settings, kept in the PNG; see `parameters_text`

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.pixels.shape[1], self.pixels.shape[0]

    @property
    def pil(self) -> Image.Image:
        """The picture as Pillow knows it."""
        return Image.fromarray(self.pixels)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.pixels, dtype=dtype, copy=True if copy is None else copy)

    def _repr_png_(self) -> bytes:  # notebooks show it
        return self.png()

    def png(self) -> bytes:
        """The file's bytes, metadata included: the same picture gives the same bytes."""
        chunks = PngImagePlugin.PngInfo()
        if self.metadata:
            chunks.add_text("parameters", parameters_text(self.metadata))
            chunks.add_text("sdcore", json.dumps(self.metadata))
        file = io.BytesIO()
        self.pil.save(file, "PNG", pnginfo=chunks)
        return file.getvalue()

    def save(self, path: str | Path) -> None:
        """Write a PNG, whole or not at all. Raises ImageError where the name is no .png or the folder cannot be written."""
        write_whole(check_target(path), self.png())


def check_target(path: str | Path) -> Path:
    """Return the path if a picture can be saved there; ImageError otherwise. Long work asks before it begins."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ImageError(f"{path}: pictures are saved as PNG, which keeps their settings; name it {path.stem}.png")
    try:
        if path.is_dir():
            raise ImageError(f"{path}: is a folder; name a file in it")
        if not path.parent.is_dir():
            raise ImageError(f"{path}: there is no folder {path.parent}; make it, or choose another name")
        if not os.access(path.parent, os.W_OK):
            raise ImageError(f"{path}: the folder {path.parent} may not be written; choose another name")
    except (OSError, ValueError) as error:  # a name too long, or with a NUL in it
        raise ImageError(f"{path}: no name for a file ({getattr(error, 'strerror', None) or error})") from None
    return path


def to_pictures(pixels: Tensor) -> list[Picture]:
    """Return b pictures of pixels [b, 3, h, w]; what lies outside -1..1 is clamped, halves round to even, as in diffusers.

    Raises NonFiniteError rather than making a black picture of NaN, ImageError for another shape.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ImageError(f"pixels: expected [pictures, 3, height, width], found {list(pixels.shape)}")
    if not pixels.isfinite().all():
        raise NonFiniteError("pixels: NaN or infinity in the decoded picture; try dtype float32 (or bfloat16)")
    levels = ((pixels.detach() * 0.5 + 0.5).clamp(0, 1).cpu().float() * 255).round().to(torch.uint8)
    return [Picture(np.ascontiguousarray(picture)) for picture in levels.permute(0, 2, 3, 1).numpy()]


def to_tensor(pictures: Picture | Sequence[Picture]) -> Tensor:
    """Return pixels [b, 3, h, w] in -1..1, float32, of pictures of one size. Raises ImageError where the sizes differ."""
    return 2.0 * to_unit(pictures) - 1.0


def to_unit(pictures: Picture | Sequence[Picture]) -> Tensor:
    """Return pixels [b, 3, h, w] in 0..1, float32, as ControlNets take them. Raises ImageError where the sizes differ."""
    pictures = [pictures] if isinstance(pictures, Picture) else list(pictures)
    _one_size(pictures)
    levels = np.stack([picture.pixels for picture in pictures]).astype(np.float32) / 255.0
    return torch.from_numpy(levels).permute(0, 3, 1, 2).contiguous()


def to_mask(mask: Picture) -> Tensor:
    """Return a mask [1, 1, h, w] in 0..1, float32: 1 is repainted, 0 is kept."""
    levels = np.array(mask.pil.convert("L")).astype(np.float32) / 255.0
    return torch.from_numpy(levels)[None, None]


def open_picture(path: str | Path, background: tuple[int, int, int] = WHITE) -> Picture:
    """Read a PNG, JPEG or WebP by the rules above; transparent parts show `background`.

    Raises ImageError for anything else, for what is cut off, and for sides and sizes beyond the limits. Warns about a second
    frame.
    """
    with _opened(path) as (file, metadata):
        if not all(SIDES[0] <= side <= SIDES[1] for side in file.size):
            w, h = file.size
            raise ImageError(
                f"{path}: {w} x {h} pixels; expected sides from {SIDES[0]} to {SIDES[1]}; scale or crop it"
            )
        if (frames := getattr(file, "n_frames", 1)) > 1:
            warnings.warn(f"{path}: animated; only the first of {frames} frames is used", stacklevel=2)
        file.load()
        return Picture(np.array(_rgb(_upright(file, path), background)), metadata)


def open_mask(path: str | Path, picture: Picture | None = None) -> Picture:
    """Read a mask for `picture` by the rules above, as grey [h, w, 3]: white is repainted, black and transparent is kept.

    Raises ImageError as `open_picture` does; for a mask of another size than the picture; for one in which nothing is white.
    """
    mask = Picture(np.array(open_picture(path, background=(0, 0, 0)).pil.convert("L").convert("RGB")))
    if picture is not None and mask.size != picture.size:
        (w, h), (w2, h2) = mask.size, picture.size
        raise ImageError(f"{path}: the mask is {w} x {h}, its picture {w2} x {h2} pixels; make them one size")
    if mask.pixels.max() < 128:
        raise ImageError(
            f"{path}: nothing in this mask is white, so nothing would be repainted; paint white what shall change"
        )
    return mask


def fit(picture: Picture, w: int, h: int, how: str = "crop") -> Picture:
    """Return the picture (or mask) at w x h pixels, its metadata kept; scaled by Lanczos' filter, as diffusers does.

    "crop" keeps the proportions and cuts off what hangs over, the same at both ends; "pad" keeps them and all of the picture,
    and goes on with the colours of its border; "stretch" keeps neither. Raises ImageError for another word, and where the
    picture is so long that "pad" would leave nothing of its short side.
    """
    if how not in ("crop", "pad", "stretch"):
        raise ImageError(f"fit: expected crop, pad or stretch, found {how!r:.80}")
    w2, h2 = picture.size
    if how == "stretch":
        w2, h2 = w, h
    elif (w2 * h > w * h2) == (
        how == "crop"
    ):  # of a picture that is wider than wished the height must do, or else the width
        w2, h2 = w2 * h // h2, h
    else:
        w2, h2 = w, h2 * w // w2
    if not w2 or not h2:
        long, short = max(picture.size), min(picture.size)
        raise ImageError(f"picture: {long} to {short} is too long to fit {w} x {h} pixels whole; crop it")
    pixels = np.array(picture.pil.resize((w2, h2), Image.Resampling.LANCZOS))
    left, top = w // 2 - w2 // 2, h // 2 - h2 // 2
    pixels = pixels[max(-top, 0) : h - top, max(-left, 0) : w - left]
    beyond = [(max(top, 0), max(h - top - h2, 0)), (max(left, 0), max(w - left - w2, 0)), (0, 0)]
    return Picture(np.ascontiguousarray(np.pad(pixels, beyond, mode="edge")), dict(picture.metadata))


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the settings that a PNG carries: our own exactly, another tool's as far as its `parameters` say; {} if none.

    Values of strangers are plain numbers and texts, never followed or run. Raises ImageError as `open_picture` does.
    """
    with _opened(path) as (_, metadata):
        return metadata


def read_parameters(path: str | Path) -> dict[str, str]:
    """Return the last line of a PNG's `parameters` in pairs, just as another tool wrote it; {} if none. Errors as above."""
    with _opened(path) as (file, _):
        text = getattr(file, "info", {}).get("parameters")
    return split_parameters(text)[1] if isinstance(text, str) and len(text) < 2**20 else {}


def grid(pictures: Sequence[Picture], columns: int | None = None, gap: int = 4) -> Picture:
    """Return the pictures side by side on white, `columns` a row (as square as it gets), with the first one's metadata."""
    w, h = _one_size(pictures)
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * (h + gap), i % columns * (w + gap)
        sheet[y : y + h, x : x + w] = picture.pixels
    return Picture(sheet, dict(pictures[0].metadata))


def strip(pictures: Sequence[Picture], labels: Sequence[str], columns: int = 10, side: int = 128) -> Picture:
    """Return small copies (the longer side at most `side`) in rows of `columns`, each over its label of one or two lines."""
    _one_size(pictures)
    tiles = []
    for picture, label in zip(pictures, labels, strict=True):
        small = picture.pil
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        tile = Image.new("RGB", (max(small.width, 64), small.height + 28), WHITE)
        tile.paste(small, ((tile.width - small.width) // 2, 0))
        font = ImageFont.load_default(10)
        ImageDraw.Draw(tile).multiline_text((2, small.height + 1), label, (0, 0, 0), font, spacing=1)
        tiles.append(Picture(np.array(tile), picture.metadata))
    return grid(tiles, min(columns, len(tiles)))


# --- settings as text, in the form that A1111's web UI began and most tools read

SAMPLER_NAMES = {
    "ddpm": "DDPM", "ddim": "DDIM", "pndm": "PLMS", "lms": "LMS", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun",
    "dpm2": "DPM2", "dpm2_a": "DPM2 a", "dpmpp_2m": "DPM++ 2M", "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2s_a": "DPM++ 2S a", "dpmpp_3m_sde": "DPM++ 3M SDE", "unipc": "UniPC", "deis": "DEIS", "lcm": "LCM", "tcd": "TCD",
}  # fmt: skip
EMPHASIS_NAMES = {"a1111": "Original", "no-norm": "No norm", "none": "None"}
SCHEDULE_NAMES = {"align your steps": "ays", "uniform": "linspace"}  # where it is not their name in small letters
# What A1111's "Automatic" means for a sampler; for all others, the model's own.
AUTOMATIC = {
    "dpmpp_2m": "karras", "dpmpp_sde": "karras", "dpmpp_2s_a": "karras", "dpm2": "karras", "dpm2_a": "karras",
    "dpmpp_2m_sde": "exponential", "dpmpp_3m_sde": "exponential",
}  # fmt: skip


def clip_skip(text: str) -> int:
    """A1111 counts the layer that it reads, from the last; here it is how many are left out."""
    return int(text) - 1


# our key, theirs, how a text becomes a value
FIELDS = (
    ("steps", "Steps", int), ("sampler", "Sampler", str), ("schedule", "Schedule type", str), ("guidance", "CFG scale", float),
    ("seed", "Seed", int), ("size", "Size", str), ("model", "Model", str), ("model_hash", "Model hash", str),
    ("clip_skip", "Clip skip", clip_skip), ("emphasis", "Emphasis", str), ("version", "Version", str),
)  # fmt: skip
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def parameters_text(settings: dict[str, Any]) -> str:
    """Return the settings as `prompt`, `Negative prompt: ...` and a last line `Steps: 20, Sampler: Euler, ...`."""
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative"):
        lines.append(f"Negative prompt: {settings['negative']}")
    pairs = []
    for ours, theirs, _ in FIELDS:
        if settings.get(ours) is not None and (ours, settings[ours]) not in (("clip_skip", 0), ("emphasis", "a1111")):
            text = str(settings[ours] + 1 if ours == "clip_skip" else settings[ours])
            text = {"sampler": SAMPLER_NAMES, "emphasis": EMPHASIS_NAMES}.get(ours, {}).get(text, text)
            pairs.append(f"{theirs}: {json.dumps(text) if set(text) & set(',:') else text}")
    return "\n".join([*lines, ", ".join(pairs)])


def parse_parameters(text: str) -> dict[str, Any]:
    """Return our settings of such a text. Lines that are none belong to the prompts; what does not parse is left out."""
    lines, found = split_parameters(text)
    prompt, mark, negative = ("\n" + "\n".join(lines)).partition("\nNegative prompt:")
    settings: dict[str, Any] = {"prompt": prompt.strip()} | ({"negative": negative.strip()} if mark else {})
    ours_by_name = {theirs.lower(): ours for ours, theirs in SAMPLER_NAMES.items()}
    for ours, theirs, kind in FIELDS:
        try:
            value = found[theirs]
            settings[ours] = kind(json.loads(value) if value.startswith('"') else value.strip())
        except (KeyError, ValueError):
            continue
    if "sampler" in settings:
        name, _, curve = settings["sampler"].rpartition(" ")  # older files say "DPM++ 2M Karras" in one
        if curve in ("Karras", "Exponential"):
            settings |= {"sampler": name, "schedule": curve}
        settings["sampler"] = ours_by_name.get(settings["sampler"].lower(), settings["sampler"])
    schedule = settings.pop("schedule", "").lower()
    schedule = AUTOMATIC.get(settings.get("sampler", ""), "") if schedule == "automatic" else schedule
    if schedule:
        settings["schedule"] = SCHEDULE_NAMES.get(schedule, schedule.replace(" ", "_"))
    if "emphasis" in settings:
        by_name = {theirs.lower(): ours for ours, theirs in EMPHASIS_NAMES.items()}
        settings["emphasis"] = by_name.get(settings["emphasis"].lower(), settings["emphasis"])
    return settings


def split_parameters(text: str) -> tuple[list[str], dict[str, str]]:
    """The lines of the prompts, and the pairs of the last line as they stand there."""
    lines, last = text.strip().split("\n"), ""
    # Fewer than three could be words of a prompt ("Style: oil, mood: calm"); a longer line takes a pattern quadratic time.
    if len(lines[-1]) <= 4096 and len(PAIR.findall(lines[-1])) >= 3:
        last = lines.pop()
    return lines, {key: value.strip() for key, value in PAIR.findall(last)}


# --- files


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside, sync it, rename it into place: a reader, or a power cut, finds the old file or the new, whole.

    Raises ImageError naming the path and what is in the way; nothing is left behind.
    """
    try:
        path = Path(os.path.realpath(path))  # through a link, so that the link stays one
        beside = path.with_name(f".{secrets.token_hex(8)}.part")
        try:
            with open(beside, "xb") as file:  # (its mode comes from the umask, as for any new file)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        if hasattr(os, "O_DIRECTORY"):  # the new name itself must reach the disk too
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        problem = getattr(error, "strerror", None) or error
        raise ImageError(f"{path}: cannot be written ({problem}); choose another name") from None


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    """The undecoded picture and its settings; whatever a decoder raises, here or in the caller, becomes an ImageError."""
    problem = "damaged or cut off ({}); copy it again"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower, and an error
            file = Image.open(path, formats=FORMATS)
        with file:
            w, h = file.size
            if not 0 < w * h <= MAX_PIXELS:
                raise Image.DecompressionBombError
            yield file, _metadata(file)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        problem = f"more than {MAX_PIXELS // 10**6} megapixels, or none; make it smaller"
    except Image.UnidentifiedImageError:
        problem = "no picture that can be read; expected PNG, JPEG or WebP"
    except OSError as error:
        problem = error.strerror or problem.format(error)
    except Exception as error:  # decoders raise SyntaxError, ValueError, struct.error, zlib.error, ...
        problem = problem.format(error)
    else:
        return
    raise ImageError(f"{path}: {problem}")


def _metadata(file: Image.Image) -> dict[str, Any]:
    text = getattr(file, "info", {})
    try:
        ours = json.loads(text.get("sdcore", "null"))
    except (ValueError, RecursionError, TypeError):
        ours = None
    if isinstance(ours, dict):
        return ours
    parameters = text.get("parameters")
    return parse_parameters(parameters) if isinstance(parameters, str) and len(parameters) < 2**20 else {}


def _upright(file: Image.Image, path: str | Path) -> Image.Image:
    try:
        return ImageOps.exif_transpose(file)
    except Exception as error:  # the pixels are fine, only the camera's note is not
        warnings.warn(f"{path}: EXIF data is damaged ({error}); the picture is used as it lies", stacklevel=3)
        return file


def _rgb(file: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if file.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
        return Image.fromarray((np.array(file).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if file.has_transparency_data:
        behind = Image.new("RGBA", file.size, (*background, 255))
        return Image.alpha_composite(behind, file.convert("RGBA")).convert("RGB")
    return file.convert("RGB")


def _one_size(pictures: Sequence[Picture]) -> tuple[int, int]:
    sizes = {picture.size for picture in pictures}
    if len(sizes) != 1:
        raise ImageError(f"pictures: expected one or more of one size, found {sorted(sizes) or 'none'}")
    return sizes.pop()
