"""From what a picture is drawn: noise alone, or a picture too, and which parts of it are to stay.

    pipe(prompt, image=picture, strength=0.6)                     image to image
    pipe(prompt, image=picture, strength=map)                     the same, place by place
    pipe(prompt, image=picture, mask=mask)                        inpainting; `outpaint` makes both for painting beyond the edge
    pipe(prompt, image=picture, depth=map)                        models with a depth map beside the latent
    pipe(prompt, image=picture, guidance=Guidance(7.5, image=1.5))   models that follow an instruction
    pipe(prompt, image=small, noise_level=20)                     the upscaler
    pipe(prompt, image=latents, span=(0.8, 1.0))                  the last fifth of a way that another model began

`Canvas` is what the arguments come to: tensors of one size, checked. `begin` is the latent to start from, `hold` keeps what is to
stay at the noise level of every step, `beside` are the further input channels of those UNets that have them, and `finish` puts
the pixels that were to stay back in their place, bit for bit. The random numbers are drawn in the order in which diffusers'
pipelines draw them, so the same seed is the same picture.

Source: Meng et al. 2021 (image to image), Lugmayr et al. 2022 (what is to stay, noised anew at every step), Levin & Fried 2023
(strength by place), Brooks et al. 2022 (instructions), Rombach et al. 2022 (masks and small pictures beside the latent).

Legend: b pictures, m pictures handed in (b or 1), H W pixels, h w latent height and width, z latent channels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdcore.controlnet import Control, ControlNet
from sdcore.errors import ConfigError, ImageError
from sdcore.guidance import Guidance
from sdcore.ip_adapter import ImagePrompt
from sdcore.samplers import Noise, Step, add_noise, make_steps
from sdcore.scheduler import alpha_bars, check_count

if TYPE_CHECKING:
    from sdcore.pipeline import Pipeline

KINDS = {0: "text", 1: "depth", 3: "upscale", 4: "instruct", 5: "inpaint"}  # by a UNet's channels beside the latent
IMAGE_GUIDANCE = 1.5  # of instruct-pix2pix where none is given
MAX_NOISE_LEVEL = 350  # of the released upscaler
STRENGTH = 0.8  # of image to image where none is given; a mask's places are painted from noise


@dataclass(frozen=True)
class Canvas:
    """The pictures of a call: checked, of one size, fp32."""

    kind: str  # of the UNet: one of KINDS
    size: tuple[int, int]  # what is drawn, in pixels (W, H): multiples of what a latent value is wide
    asked: tuple[int, int]  # what was asked for: up to one latent value less at the right and the bottom
    pixels: Tensor | None = None  # the picture [m, 3, H, W] in -1..1; the upscaler's, smaller
    latents: Tensor | None = None  # the picture, encoded already [m, z, h, w]
    mask: Tensor | None = None  # what is to be painted [m, 1, H, W], 0 or 1
    depth: Tensor | None = None  # how near things are [m, 1, H, W], in any unit
    strength: float = 1.0  # share of the way that is walked
    by_place: Tensor | None = None  # the same, place by place [m, 1, H, W]
    feather: int = 0  # pixels inside the mask over which painted passes into what stays


# ------------------------------------------------------------------------------------------------ what was handed in


def canvas(
    pipe: "Pipeline",
    pictures: int,
    size: tuple[int, int] | None,
    image: Any,
    mask: Any,
    depth: Any,
    strength: Any,
    feather: int,
) -> Canvas:
    """What the arguments of `Pipeline.steps` come to. ConfigError or ImageError where they do not fit each other or the model."""
    kind = kind_of(pipe)
    encoded = isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == pipe.vae.config.latent_channels
    latents = image.float() if encoded else None
    picture = None if encoded or image is None else pixels_of(image, "image", 3, -1.0)
    check_kind(pipe, kind, picture, latents, mask, depth)
    asked = size_of(pipe, kind, size, picture, latents)

    painted = None if mask is None else (fitted(mask, "mask", asked) >= 0.5).float()
    if painted is not None and not painted.any():
        raise ImageError("mask: all black, so there is nothing to paint; white is what is painted")
    near = None if depth is None else fitted(depth, "depth", asked, -math.inf)
    if near is not None and (near.amax((1, 2, 3)) == near.amin((1, 2, 3))).any():
        raise ImageError(
            "depth: the same everywhere, so it says nothing of what is near; give a map with near and far in it"
        )
    if strength is None:
        strength = 1.0 if mask is not None or image is None or kind in ("instruct", "upscale") else STRENGTH
    share, places = strength_of(strength, asked)
    if image is None and share < 1:
        raise ConfigError("strength: has no meaning without image=")
    if isinstance(feather, bool) or not isinstance(feather, int) or feather < 0:
        raise ConfigError(f"feather: expected a whole number of pixels from 0, found {feather!r:.80}")
    for name, value in (("image", picture), ("image", latents), ("mask", painted), ("strength", places)):
        if value is not None and len(value) not in (1, pictures):
            raise ConfigError(f"{name}: expected one, or one a picture ({pictures}), found {len(value)}")

    factor = pipe.vae.config.factor
    drawn = (-(-asked[0] // factor) * factor, -(-asked[1] // factor) * factor)
    if picture is not None and kind != "upscale":
        picture = filled(picture, drawn)
    painted, near, places = (None if x is None else filled(x, drawn) for x in (painted, near, places))
    return Canvas(kind, drawn, asked, picture, latents, painted, near, share, places, feather)


def check_kind(
    pipe: "Pipeline", kind: str, picture: Tensor | None, latents: Tensor | None, mask: Any, depth: Any
) -> None:
    """ConfigError where a model of this kind needs what was not given, or was given what it does not know."""
    blank = picture is None and latents is None
    missing = {"inpaint": mask is None, "instruct": blank, "upscale": blank, "depth": depth is None}
    if missing.get(kind):
        needed = {"inpaint": "mask", "instruct": "image", "upscale": "image", "depth": "depth"}[kind]
        raise ConfigError(
            f"this {pipe.family} model draws from a picture, not from a prompt alone (its UNet takes "
            f"{pipe.unet.config.in_channels} channels where text to image has {pipe.unet.config.out_channels}): give {needed}="
        )
    if kind in ("instruct", "upscale") and picture is None:
        raise ConfigError(f"image: this {pipe.family} model looks at pixels, found latents; decode them first")
    if depth is not None and kind != "depth":
        raise ConfigError(f"depth: this {pipe.family} model has no channel for it; a depth ControlNet has")
    if mask is not None and blank:
        raise ConfigError("image: missing; a mask says which part of it to paint")
    if mask is not None and kind in ("instruct", "upscale"):
        raise ConfigError(f"mask: this {pipe.family} model knows none")


def size_of(
    pipe: "Pipeline", kind: str, size: tuple[int, int] | None, picture: Tensor | None, latents: Tensor | None
) -> tuple[int, int]:
    """What is asked for in pixels (W, H): that of the picture, or `size`, or the model's own. ConfigError where they differ."""
    if picture is None and latents is None:
        return pipe.full_size(size)
    image, small = (latents, True) if picture is None else (picture, kind == "upscale")
    assert image is not None
    W, H = (side * (pipe.vae.config.factor if small else 1) for side in (image.shape[-1], image.shape[-2]))
    given = pipe.full_size(size) if size is not None else (W, H)
    if (W, H) != given:
        raise ConfigError(
            f"image: {W}x{H} where size= says {given[0]}x{given[1]}; scale it first (sdcore.image.fit), or leave size out"
        )
    pipe.check_sides((W, H), 1)
    return W, H


def strength_of(strength: Any, size: tuple[int, int]) -> tuple[float, Tensor | None]:
    """The share of the way that is walked, and where it was given by place, that [m, 1, H, W]. ConfigError, ImageError."""
    places = None
    if isinstance(strength, Tensor) or hasattr(strength, "pixels"):
        places = fitted(strength, "strength", size)
        strength = places.max().item()
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
        raise ConfigError(f"strength: expected a number from 0 to 1, found {strength!r:.80}")
    return float(strength), places


def kind_of(pipe: "Pipeline") -> str:
    """What a model's UNet takes beside the latent: one of KINDS. ConfigError for a number of channels that no model has."""
    config = pipe.unet.config
    more = config.in_channels - pipe.vae.config.latent_channels
    if more not in KINDS:
        raise ConfigError(
            f"this {pipe.family} model's UNet takes {config.in_channels} channels, which no known task fills"
        )
    return KINDS[more]


def pixels_of(value: Any, name: str, channels: int, low: float) -> Tensor:
    """A picture or tensor [m, c, H, W] (m and c may be missing) as fp32 [m, c, H, W]; a `Picture` becomes low..1.

    ImageError where it is neither, has no area, or holds NaN; numbers outside low..1 are refused too.
    """
    if hasattr(value, "pixels"):  # an `image.Picture`
        found = torch.from_numpy(value.pixels).permute(2, 0, 1)[None].float() / 255
        found = found.mean(1, keepdim=True) if channels == 1 else found
        found = found * 2 - 1 if low == -1.0 else found
    elif isinstance(value, Tensor):
        found = value.detach().float()
        found = found[None] if found.ndim == 2 else found
        found = (
            found[None] if found.ndim == 3 and len(found) == channels else found[:, None] if found.ndim == 3 else found
        )
    else:
        raise ImageError(
            f"{name}: expected a picture (sdcore.image.open_picture) or a tensor, found {type(value).__name__}"
        )
    if found.ndim != 4 or found.shape[1] != channels or not found.numel():
        raise ImageError(f"{name}: expected [pictures, {channels}, height, width], found {list(value.shape)}")
    if not torch.isfinite(found).all():
        raise ImageError(f"{name}: holds NaN or infinity")
    if low > -math.inf and (found.min() < low - 1e-6 or found.max() > 1 + 1e-6):
        raise ImageError(f"{name}: expected numbers from {low:g} to 1, found {found.min():.3g} to {found.max():.3g}")
    return found


def fitted(value: Any, name: str, size: tuple[int, int], low: float = 0.0) -> Tensor:
    """A map of one channel as `pixels_of` gives it. ImageError where it has not the picture's size (W, H)."""
    found = pixels_of(value, name, 1, low)
    if found.shape[-2:] != (size[1], size[0]):
        raise ImageError(
            f"{name}: {found.shape[-1]}x{found.shape[-2]}, expected the picture's {size[0]}x{size[1]}; scale it to that"
        )
    return found


def filled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """x [m, c, H, W] carried on beyond its right and lower edge up to a size (W, H)."""
    right, below = size[0] - x.shape[-1], size[1] - x.shape[-2]
    return F.pad(x, (0, right, 0, below), mode="replicate") if right or below else x


def outpaint(pixels: Tensor, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0) -> tuple[Tensor, Tensor]:
    """A picture [m, 3, H, W] with margins to be painted: the larger one, its edge carried on, and the mask [1, 1, H', W']."""
    margins = (left, right, top, bottom)
    if any(isinstance(side, bool) or not isinstance(side, int) or side < 0 for side in margins) or not any(margins):
        raise ConfigError(f"outpaint: expected whole numbers of pixels from 0, one of them above it, found {margins}")
    mask = torch.zeros(1, 1, *pixels.shape[-2:])
    return F.pad(pixels, margins, mode="replicate"), F.pad(mask, margins, value=1.0)


def controls(pipe: "Pipeline", given: Canvas, pictures: int, control: Sequence[Control]) -> tuple[Control, ...]:
    """The controls of a call, their pictures in the size that is drawn. ConfigError where one belongs to another model."""
    found = []
    unet = pipe.unet.config
    for each in control:
        if not isinstance(each, Control):
            raise ConfigError(f"control: expected sdcore.controlnet.Control objects, found {type(each).__name__}")
        own: Any = each.net.config
        if isinstance(each.net, ControlNet) and (own.context_dim, own.channels) != (unet.context_dim, unet.channels):
            raise ConfigError(
                f"control: is for a UNet of widths {own.channels} that hears {own.context_dim} numbers a token, this "
                f"{pipe.family} model has {unet.channels} and {unet.context_dim}; take the control of its family"
            )
        for name, x in (("image", each.image), ("mask", each.mask)):
            if x is not None and ((x.shape[-1], x.shape[-2]) != given.asked or len(x) not in (1, pictures)):
                raise ConfigError(
                    f"control: {name} is {len(x)} of {x.shape[-1]}x{x.shape[-2]}, expected one (or {pictures}) in the size "
                    f"that is drawn, {given.asked[0]}x{given.asked[1]}; scale it, or give size="
                )
        mask = None if each.mask is None else filled(each.mask, given.size)
        found.append(replace(each, image=filled(each.image, given.size), mask=mask))
    return tuple(found)


def prompts(pipe: "Pipeline", image_prompts: Sequence[ImagePrompt]) -> tuple[ImagePrompt, ...]:
    """The picture prompts of a call. AdapterError where one was made for another UNet."""
    for each in image_prompts:
        if not isinstance(each, ImagePrompt):
            raise ConfigError(
                f"image_prompts: expected sdcore.ip_adapter.ImagePrompt objects, found {type(each).__name__}"
            )
        each.adapter.check(pipe.unet.config)
    return tuple(image_prompts)


def guide_of(given: Canvas, guide: Guidance) -> Guidance:
    """Models that follow an instruction always weigh the picture too. ConfigError where another model is told to."""
    if guide.image is not None and given.kind != "instruct":
        raise ConfigError("guidance: image= is for models that follow instructions; leave it out")
    return replace(guide, image=IMAGE_GUIDANCE) if given.kind == "instruct" and guide.image is None else guide


# ------------------------------------------------------------------------------------------------ which steps


def walk(
    pipe: "Pipeline", given: Canvas, steps: int, sampler: str | None, schedule: str | None, span: Any, options: dict
) -> list[Step]:
    """The steps that are made: of all of them the last `strength`, and of those what lies in `span`.

    `span` (begin, end) counts timesteps: (0, 0.8) stops when a fifth of them is left. ConfigError where no step is left.
    """
    own = next((options[name] for name in ("timesteps", "sigma_list") if options.get(name) is not None), None)
    steps = check_count(steps if own is None else len(own), pipe.scheduler.train_steps)
    start = options.pop("start", None)
    if start is None:
        start = steps - min(int(steps * given.strength), steps)
        if start == steps:
            raise ConfigError(f"strength: {given.strength:g} of {steps} steps is less than one; ask for more of either")
    whole = (
        isinstance(span, Sequence)
        and len(span) == 2
        and all(isinstance(x, (int, float)) for x in span)
        and 0 <= span[0] < span[1] <= 1
    )
    if not whole:
        raise ConfigError(f"span: expected (begin, end) with 0 <= begin < end <= 1, found {span!r:.80}")
    begin, end = (pipe.scheduler.train_steps * (1 - share) for share in span)

    def way(start: int) -> list[Step]:
        return make_steps(pipe.scheduler, steps, sampler, schedule, start=start, **options)

    if span[0] > 0:
        later = [first for first in range(steps) if way(first)[0].t < round(begin)]
        start = later[0] if later else steps
    made = way(start) if start < steps else []
    made = made if span[1] == 1 else [step for step in made if step.t >= round(end)]
    if not made:
        raise ConfigError(f"span: no step of {steps} lies in {span[0]:g} to {span[1]:g}; ask for more steps")
    return made


# ------------------------------------------------------------------------------------------------ where it begins


@dataclass(frozen=True)
class Begin:
    """Where a picture begins, and what is the same in every step."""

    x: Tensor  # [b, z, h, w] fp32, at the level of the first step
    beside: Tensor | None  # further input channels of the UNet [b or r, c', h, w]
    labels: Tensor | None  # the upscaler's noise level, int64 [1]
    edit: Callable[[Tensor, Step | None], Tensor] | None  # see `samplers.sample`


def begin(
    pipe: "Pipeline",
    given: Canvas,
    way: Sequence[Step],
    draw: Noise,
    noise: Tensor | None,
    noise_level: int,
    begun: bool,
) -> Begin:
    """The latent to start from, and what goes with it. `begun`: the picture is a latent at the level of the first step."""
    b, factor = len(draw.generators), pipe.vae.config.factor
    shape = (pipe.vae.config.latent_channels, given.size[1] // factor, given.size[0] // factor)
    pure = (
        given.strength == 1 and given.mask is not None and not begun
    )  # a picture without a mask shows through even at 1
    small = labels = z = None
    if given.kind == "upscale":
        small, labels = blurred(pipe, given, draw, noise_level)
    stays = given.mask is not None and given.kind != "inpaint" or given.by_place is not None
    shown = (given.pixels is not None or given.latents is not None) and given.kind not in ("upscale", "instruct")
    if shown and (stays or not pure):
        z = given.latents if given.latents is not None else pipe.encode_image(repeated(given.pixels, b), draw)
        z = repeated(z, b).to(pipe.device)
    if noise is None:
        noise = draw.draw(*shape)
    elif noise.shape != (b, *shape):
        raise ConfigError(f"noise: expected [{b}, {', '.join(map(str, shape))}], found {list(noise.shape)}")
    noise = noise.to(pipe.device, torch.float32)
    if begun:
        if z is None or given.latents is None:
            raise ConfigError(
                "span: beginning later than at 0 needs image=, the latents that the first part ended with"
            )
        x = z
    else:
        x = noise * way[0].start_scale if pure or z is None else add_noise(z, noise, way[0])
    edit = hold(given, z, noise, len(way)) if stays and z is not None else None
    return Begin(x, small if small is not None else beside(pipe, given, draw, shape), labels, edit)


def repeated(x: Tensor | None, b: int) -> Tensor:
    """One picture a row: x [m, ...] -> [b, ...]."""
    assert x is not None
    return x if len(x) == b else x.expand(b, *x.shape[1:])


def hold(given: Canvas, z: Tensor, noise: Tensor, steps: int) -> Callable[[Tensor, Step | None], Tensor]:
    """What is to stay is put back after every step, at the noise level of the next one, with the noise of the start.

    With a strength by place, a place is free once the rest of the whole way is no longer than its strength.
    """
    size = z.shape[-2:]
    paint = None if given.mask is None else F.interpolate(given.mask, size=size).to(z)
    places = None if given.by_place is None else F.interpolate(given.by_place, size=size, mode="area").to(z)

    def edit(x: Tensor, step: Step | None) -> Tensor:
        free = torch.ones_like(x[:1, :1]) if paint is None else paint
        if places is not None:
            left = 0.0 if step is None else given.strength * (1 - step.i / steps)
            free = free * (places >= max(left, 1e-6))
        was = z if step is None else add_noise(z, noise, step)
        return (1 - free) * was + free * x

    return edit


def beside(pipe: "Pipeline", given: Canvas, draw: Noise, shape: Sequence[int]) -> Tensor | None:
    """The further channels of the UNet's input: [b, c', h, w]; with instructions [3 b, z, h, w], one lot a branch of guidance."""
    b, size = len(draw.generators), tuple(shape[1:])
    if given.kind == "inpaint":
        assert given.mask is not None
        if given.pixels is None:
            raise ConfigError("image: this model looks at the pixels around the mask, found latents; decode them first")
        mask = F.interpolate(given.mask, size=size)
        left = pipe.encode_image(repeated(given.pixels * (given.mask < 0.5), b), draw)
        return torch.cat([repeated(mask, b).to(left), left], dim=1)
    if given.kind == "depth":
        assert given.depth is not None
        near = F.interpolate(given.depth, size=size, mode="bicubic", align_corners=False)
        low, high = near.amin((1, 2, 3), keepdim=True), near.amax((1, 2, 3), keepdim=True)
        return repeated(2 * (near - low) / (high - low) - 1, b).to(pipe.device)
    if given.kind == "instruct":
        z = pipe.encode_image(repeated(given.pixels, b))
        z = z / pipe.vae.config.scaling_factor  # so it was trained: not scaled
        return torch.cat([torch.zeros_like(z), z, z])
    return None


def blurred(pipe: "Pipeline", given: Canvas, draw: Noise, noise_level: int) -> tuple[Tensor, Tensor]:
    """The upscaler's small picture with noise on it [b, 3, h, w], and that noise's level [1].

    The released model noises it by the betas that it was trained with itself.
    """
    if isinstance(noise_level, bool) or not isinstance(noise_level, int) or not 0 <= noise_level <= MAX_NOISE_LEVEL:
        raise ConfigError(
            f"noise_level: expected a whole number from 0 to {MAX_NOISE_LEVEL}, found {noise_level!r:.80}"
        )
    assert given.pixels is not None
    small = repeated(given.pixels, len(draw.generators))
    kept = alpha_bars(pipe.scheduler)[noise_level]
    noisy = small * kept.sqrt() + draw.draw(*small.shape[1:]) * (1 - kept).sqrt()
    return noisy.to(pipe.device), torch.tensor([noise_level], device=pipe.device)


# ------------------------------------------------------------------------------------------------ how it ends


def finish(given: Canvas, pixels: Tensor) -> Tensor:
    """Decoded pixels [b, 3, H, W] -> those asked for: cut to size, and what was to stay put back, bit for bit."""
    W, H = given.asked
    kept = given.mask is not None or given.by_place is not None
    if kept and given.pixels is not None and given.kind in ("text", "inpaint", "depth"):
        share = torch.ones(1, 1, *pixels.shape[-2:]) if given.mask is None else feathered(given.mask, given.feather)
        if given.by_place is not None:
            share = share * (given.by_place > 0)
        share, was = share.to(pixels), given.pixels.to(pixels)
        pixels = torch.where(share == 0, was, torch.where(share == 1, pixels, was + share * (pixels - was)))
    return pixels[..., :H, :W]


def feathered(mask: Tensor, pixels: int) -> Tensor:
    """A mask [m, 1, H, W] of 0 and 1 that rises from its border inwards over so many pixels; outside it stays 0."""
    rings = [mask]
    for _ in range(pixels):
        rings.append(1 - F.max_pool2d(1 - rings[-1], 3, stride=1, padding=1))  # a pixel narrower
    return torch.stack(rings[1:] or rings).mean(0) if pixels else mask
