"""Tiled decoding and encoding: the exact way is the whole, at any size and dtype; the fast way has no seams; no black picture.

`python -m tests.test_tiling decode exact 512 out.pt` runs the full-size SD autoencoder (random weights) once, writes what came
out, and prints seconds and the peak of memory; the tests of full size call it, each way in a process of its own.
`python -m tests.test_tiling` makes docs/reports/tiling.md.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sdcore
from sdcore import tiling
from sdcore.errors import ConfigError, ImageError, NonFiniteError
from sdcore.vae import SD_VAE, VAE, VAEConfig

SMALL = VAEConfig(channels=(32, 32, 64, 64), norm_groups=8)
X4 = VAEConfig(channels=(32, 64, 64), norm_groups=8, latent_channels=5)


@torch.no_grad()
def random_vae(config: VAEConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> VAE:
    """Random weights of the size that keeps activations near 1, every norm with a scale and shift of its own."""
    vae = VAE(config)
    generator = torch.Generator().manual_seed(seed)
    for name, p in vae.named_parameters():
        bound = 0.1 if p.ndim == 1 else (3 / p[0].numel()) ** 0.5
        p.uniform_(-bound, bound, generator=generator)
        if p.ndim == 1 and name.endswith("weight"):
            p.add_(1)
    return vae.to(dtype).eval().requires_grad_(False)


def inputs(config: VAEConfig, h: int, w: int, batch: int = 1, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Latents of h x w, and pixels of a picture as large. Both change from place to place, so that no tile is like the whole."""
    g = torch.Generator().manual_seed(seed)
    f = config.factor
    slope = torch.linspace(-1, 1, h)[:, None] + torch.linspace(-2, 1, w)
    z = torch.randn(batch, config.latent_channels, h, w, generator=g) + slope
    waves = torch.sin(slope.repeat_interleave(f, 0).repeat_interleave(f, 1) * 20)
    pixels = 0.5 * waves + 0.3 * torch.randn(batch, 3, f * h, f * w, generator=g)
    return z, pixels.clamp(-1, 1)


def furthest(a, b) -> float:
    """Largest difference, over mean and log-variance where there are both; not finite counts as infinitely far."""
    pairs = [(a, b)] if isinstance(a, Tensor) else list(zip(a, b, strict=True))
    assert all(x.shape == y.shape and x.dtype == y.dtype for x, y in pairs)
    worst = max((x.double() - y.double()).abs().max().item() for x, y in pairs)
    return worst if worst == worst else float("inf")


# --- exact


@pytest.mark.parametrize("config", [SMALL, X4], ids=["f8", "f4"])
@pytest.mark.parametrize("h, w, rows", [(9, 6, 4), (8, 3, 4), (3, 5, 1), (3, 4, 4), (5, 4, 2)])
def test_exact_is_the_whole(config, h, w, rows):
    """In fp64, where rounding is 1e-16 and the network magnifies it a few hundred times, nothing is left between them."""
    vae = random_vae(config, torch.float64)
    z, pixels = (x.double() for x in inputs(config, h, w, batch=2))
    assert furthest(tiling.decode_exact(vae, z, rows), vae.decode(z)) < 1e-12
    assert furthest(tiling.encode_exact(vae, pixels, rows), vae.encode(pixels)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_rounds_no_worse_than_the_whole(dtype):
    """Against fp64, over all pixels: strips err as much as the whole decode in the same dtype (half more at most)."""
    vae = random_vae(SMALL, dtype)
    wide = random_vae(SMALL, dtype).double()  # the same rounded weights
    z, pixels = (x.to(dtype) for x in inputs(SMALL, 6, 5))
    true = wide.decode(z.double())
    strips, whole = (
        (x.double() - true).square().mean().sqrt() for x in (tiling.decode_exact(vae, z, 2), vae.decode(z))
    )
    assert strips <= 1.5 * whole
    true = wide.encode(pixels.double()).mean
    strips, whole = (
        (x.mean.double() - true).square().mean().sqrt()
        for x in (tiling.encode_exact(vae, pixels, 2), vae.encode(pixels))
    )
    assert strips <= 1.5 * whole


def test_queries_in_parts(monkeypatch):
    vae = random_vae(SMALL, torch.float64)
    z = inputs(SMALL, 12, 12)[0].double()
    monkeypatch.setattr(tiling, "QUERIES", 50)
    assert furthest(tiling.decode_exact(vae, z), vae.decode(z)) < 1e-12


def test_strips_are_used_up(monkeypatch):
    """At no time there is more parked than the widest plane and its shortcut together, give or take two strips."""
    vae = random_vae(SMALL)
    z, _ = inputs(SMALL, 32, 8)
    parked, most, add = [], 0, tiling.Plane.add

    def noted(plane, strip):
        nonlocal most
        add(plane, strip)
        parked.append(plane)
        most = max(most, sum(s.numel() for p in {id(p): p for p in parked}.values() for s in p.strips))

    monkeypatch.setattr(tiling.Plane, "add", noted)
    tiling.decode_exact(vae, z, rows=2)
    plane = 32 * (8 * 32) * (8 * 8)  # 32 channels of full resolution
    assert plane <= most <= plane * (1 + 2 / 16)


def test_parks_where_it_is_told():
    """The meta device holds no numbers: what was sent there cannot come back, so every strip is sent."""
    vae = random_vae(SMALL)
    plane = tiling.Plane(torch.device("meta"))
    plane.add(torch.ones(1, 3, 2, 2))
    assert plane.strips[0].is_meta
    with pytest.raises(NotImplementedError):
        tiling.decode_exact(vae, inputs(SMALL, 8, 8)[0], park=torch.device("meta"))
    assert tiling.parking(vae, torch.zeros(1, 4, 8, 8)) == torch.device("cpu")


# --- fast


def test_fast_of_one_tile_is_the_whole():
    vae = random_vae(SMALL)
    z, pixels = inputs(SMALL, 12, 10)
    assert furthest(tiling.decode_fast(vae, z, 12, 4), vae.decode(z)) < 1e-6
    assert furthest(tiling.encode_fast(vae, pixels, 12, 4), vae.encode(pixels)) < 1e-6


def test_fast_blends_without_seams():
    """A model that sees nothing but its tile's mean: the result may not jump by more than a ramp's step anywhere."""
    x = torch.arange(40.0).repeat(1, 3, 24, 1)

    def mean(tile):
        return tile.mean((2, 3), keepdim=True).expand(-1, -1, 2 * tile.shape[2], 2 * tile.shape[3])

    y = tiling.blended(mean, x, 1, 2, 16, 8)
    assert y.shape == (1, 3, 48, 80)
    steps = y.diff(dim=3).abs()
    assert 0 < steps.max() < 8 / 8  # means of neighbouring tiles are 8 apart, the ramp between them has 16 places
    assert y.diff(dim=2).abs().max() < 1e-4
    assert y[0, 0, 0, 0] == 7.5 and y[0, 0, 0, -1] == 31.5


@pytest.mark.parametrize("length, side, overlap", [(64, 64, 16), (65, 64, 16), (256, 64, 16), (40, 16, 8), (10, 16, 4)])
def test_tiles_cover(length, side, overlap):
    found = tiling.starts(length, side, overlap)
    ends = [start + min(side, length) for start in found]
    assert found[0] == 0 and ends[-1] == length
    assert all(end - start >= overlap for start, end in zip(found[1:], ends, strict=False))


# --- words and sides


def test_words():
    vae = random_vae(SMALL)
    z, pixels = inputs(SMALL, 9, 6)
    assert torch.equal(tiling.decode(vae, z), vae.decode(z))
    assert torch.equal(tiling.decode(vae, z, "exact"), tiling.decode_exact(vae, z))
    assert torch.equal(tiling.decode(vae, z, "fast"), tiling.decode_fast(vae, z))
    assert torch.equal(tiling.encode(vae, pixels).mean, vae.encode(pixels).mean)
    assert torch.equal(tiling.encode(vae, pixels, "exact").logvar, tiling.encode_exact(vae, pixels).logvar)
    assert torch.equal(tiling.encode(vae, pixels, "fast").logvar, tiling.encode_fast(vae, pixels).logvar)
    for wrong in ("tiled", "", True, 512):
        with pytest.raises(ConfigError, match="exact, fast or None"):
            tiling.decode(vae, z, wrong)
        with pytest.raises(ConfigError, match="exact, fast or None"):
            tiling.encode(vae, pixels, wrong)


@pytest.mark.parametrize("way", ["exact", "fast"])
def test_odd_sides(way):
    with pytest.raises(ImageError, match="multiples of 8, found 60 x 64"):
        tiling.encode(random_vae(SMALL), torch.zeros(1, 3, 64, 60), way)


# --- never a black picture


def overflowing(dtype: torch.dtype, **config) -> VAE:
    """An autoencoder whose middle reaches 1e5: too much for fp16, nothing to fp32 and bf16, and normed away at the end."""
    vae = random_vae(VAEConfig(channels=(32, 32, 64, 64), norm_groups=8, **config))
    for half in (vae.decoder, vae.encoder):
        for p in half.mid_block.resnets[1].conv2.parameters():
            p.mul_(1e5)
    return vae.to(dtype)


@pytest.mark.parametrize("way", [None, "exact", "fast"])
@pytest.mark.parametrize("known", [True, False])
def test_no_black_picture_in_half_precision(way, known):
    vae = overflowing(torch.float16, force_upcast=known)
    before = {name: p.clone() for name, p in vae.state_dict().items()}
    z, pixels = inputs(SMALL, 3, 4, batch=2)
    assert not vae.decode(z.half()).isfinite().all() and not vae.encode(pixels.half()).mean.isfinite().all()
    found, notice = tiling.decode_safely(vae, z, way)
    wide = overflowing(torch.float16).float()
    assert furthest(found, torch.cat([tiling.decode(wide, one, way) for one in z.split(1)])) == 0
    assert found.std() > 0.1 and "decoder" in notice and "float32" in notice and ("known" in notice) == known
    moments, notice = tiling.encode_safely(vae, pixels, way)
    assert furthest(moments, tiling.encode(wide, pixels, way)) < 1e-4 and "encoder" in notice
    assert all(torch.equal(p, before[name]) and p.dtype == torch.float16 for name, p in vae.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_does_not_overflow_is_left_alone(dtype):
    config = SMALL if dtype == torch.float16 else VAEConfig(channels=(32, 32, 64, 64), norm_groups=8, force_upcast=True)
    vae = random_vae(config, dtype)
    z, pixels = inputs(SMALL, 3, 4, batch=2)
    found, notice = tiling.decode_safely(vae, z)
    assert notice == "" and found.dtype == torch.float32
    assert torch.equal(found, torch.cat([vae.decode(one) for one in z.to(dtype).split(1)]).float())
    moments, notice = tiling.encode_safely(vae, pixels)
    assert notice == "" and moments.mean.dtype == moments.logvar.dtype == torch.float32


def test_in_the_pipeline():
    """`decode` and `encode_image` take the word, and tell whoever asked that a half-precision model was run in fp32."""
    pipe = sdcore.load("tiny", device="cpu")
    g = torch.Generator().manual_seed(0)
    latents, pixels = torch.randn(2, 4, 6, 5, generator=g), torch.rand(2, 3, 48, 40, generator=g) * 2 - 1
    notices: list[str] = []
    for way in ("exact", "fast"):
        assert furthest(pipe.decode(latents, tiling=way), pipe.decode(latents)) < 1e-4  # (fast: one tile)
        assert furthest(pipe.encode_image(pixels, tiling=way), pipe.encode_image(pixels)) < 1e-4
    fast = sdcore.accelerate(pipe)
    assert torch.equal(fast.decode(latents, notices, tiling="exact"), pipe.decode(latents, tiling="exact"))
    with pytest.raises(ConfigError, match="exact, fast or None"):
        pipe.decode(latents, tiling="tiles")
    assert notices == []

    pipe.vae = overflowing(torch.float16)
    assert pipe.decode(latents[:1], notices).isfinite().all() and len(notices) == 1
    assert pipe.encode_image(pixels[:1], notices=notices).isfinite().all() and len(notices) == 2
    assert "decoder overflowed in float16" in notices[0] and "encoder overflowed in float16" in notices[1]
    next(pipe.vae.decoder.parameters()).fill_(float("nan"))  # where fp32 does not help either, no picture at all
    with pytest.raises(NonFiniteError, match="the decoder, running in float16"):
        pipe.decode(latents[:1])


# --- full size, each way in a process of its own, so that the peak of its memory can be read


@torch.no_grad()
def run(what: str, way: str, size: int, target: str) -> None:
    """Decode or encode once at full width, write the result, print seconds and the peak of this process's memory."""
    vae = random_vae(SD_VAE)
    x = inputs(SD_VAE, size // 8, size // 8)[what == "encode"]
    before = peak()
    begin = time.perf_counter()
    work = {"decode": tiling.decode, "encode": tiling.encode}[what]
    if (way, size) == ("fast", 512):  # four tiles: one of the usual size would be the whole
        work = {"decode": tiling.decode_fast, "encode": tiling.encode_fast}[what]
        result = work(vae, x, 36, 8)
    else:
        result = work(vae, x, None if way == "whole" else way)
    print(json.dumps({"seconds": time.perf_counter() - begin, "before": before, "peak": peak()}))
    torch.save(result if what == "decode" else torch.cat(result, 1), target)


def peak() -> int:
    """The most memory that this process ever had, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def compared(what: str, size: int, folder: Path) -> dict[str, dict[str, float]]:
    """Every way at one size: seconds, peak of memory, and how far from the whole, in steps of 1/255."""
    found, whole = {}, None
    for way in ("whole", "exact", "fast"):
        target = folder / f"{way}.pt"
        command = [sys.executable, "-m", "tests.test_tiling", what, way, str(size), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        assert done.returncode == 0, done.stderr
        y = torch.load(target)
        whole = y if whole is None else whole
        apart = (y - whole).abs() * 127.5  # a picture's -1..1 is 0..255
        found[way] = json.loads(done.stdout) | {"max": apart.max().item(), "mean": apart.mean().item()}
        figures = found[way]
        print(
            f"\n{what} {size} px, {way}: {figures['seconds']:.1f} s, peak {figures['peak'] / 2**30:.2f} GiB "
            f"({figures['before'] / 2**30:.2f} before), from the whole: max {figures['max']:.4f}/255, "
            f"mean {figures['mean']:.4f}/255"
        )
    return found


def test_full_size_512(tmp_path, capsys):
    with capsys.disabled():
        found = compared("decode", 512, tmp_path)
    check(found, 0.8)


@pytest.mark.check
def test_full_size_2048(tmp_path, capsys):
    """And the report. The whole decode takes some 16 GiB."""
    with capsys.disabled():
        check(report(tmp_path)["decode", 2048], 0.6)


def check(found: dict[str, dict[str, float]], share: float) -> None:
    """The exact way is within 2/255 (by rounding alone, far within); both take at most that share of the whole's memory."""
    assert found["exact"]["max"] < 0.05
    assert found["fast"]["max"] > 0.05  # or it was not the fast way
    used = {way: figures["peak"] - figures["before"] for way, figures in found.items()}
    assert used["exact"] < share * used["whole"] and used["fast"] < share * used["whole"]


HEAD = """# Tiled decoding and encoding

`python -m tests.test_tiling`, {date}, torch {torch}, fp32 on the CPU. The SD autoencoder at full size with random weights, each
way in a process of its own; the peak is that process's (VmHWM), of which {before:.2f} GiB are torch and the weights.
Differences are from the whole, in steps of 1/255 of a picture's range (for encoding: of the mean and log-variance times 127.5).
Seconds are the clock's, whatever else the machine did meanwhile.

| what | way | seconds | peak, GiB | max difference | mean difference |
|---|---|---|---|---|---|
"""
TAIL = """
With random weights the fast way is as wrong as it can be: noise has another mean and variance in every tile. What it does to
pictures: the bundled autoencoder on a sheet of 8 x 8 pictures of its world (512 px), in tiles of 128 pixels that overlap by 32:
decode exact max {exact[0]:.4f}/255, mean {exact[1]:.5f}/255; fast max {fast[0]:.1f}/255, mean {fast[1]:.2f}/255.
"""


def report(folder: Path, sizes: tuple[int, ...] = (512, 2048)) -> dict[tuple[str, int], dict[str, dict[str, float]]]:
    """Every way at every size; the table is written to docs/reports/tiling.md."""
    jobs = [("decode", size) for size in sizes] + [("encode", 512)]
    found = {job: compared(*job, folder) for job in jobs}
    before = found["decode", sizes[0]]["whole"]["before"] / 2**30
    text = HEAD.format(date=time.strftime("%Y-%m-%d"), torch=torch.__version__.split("+")[0], before=before)
    for (what, size), ways in found.items():
        for way, f in ways.items():
            differs = f"{f['max']:.4f}/255 | {f['mean']:.5f}/255" if way != "whole" else "- | -"
            text += f"| {what} {size} | {way} | {f['seconds']:.0f} | {f['peak'] / 2**30:.2f} | {differs} |\n"
    exact, fast = bundled()
    Path(__file__).parents[1].joinpath("docs/reports/tiling.md").write_text(text + TAIL.format(exact=exact, fast=fast))
    return found


@torch.no_grad()
def bundled() -> tuple[tuple[float, float], tuple[float, float]]:
    """The largest and the mean difference of the exact and the fast way, on what the bundled autoencoder was trained for."""
    import numpy as np
    from sdcore.train import world
    from sdcore.weights.load import load_vae

    vae = load_vae(Path(__file__).parents[1] / "weights/tiny/vae", "cpu", torch.float32)
    pictures = torch.from_numpy(world.draw_batch([world.sample_scene(np.random.default_rng(i)) for i in range(64)]))
    sheet = pictures.view(8, 8, 3, 64, 64).permute(2, 0, 3, 1, 4).reshape(1, 3, 512, 512)
    z = vae.encode(sheet).mean
    whole = vae.decode(z)
    apart = [(y - whole).abs() * 127.5 for y in (tiling.decode_exact(vae, z), tiling.decode_fast(vae, z, 16, 4))]
    exact, fast = ((d.max().item(), d.mean().item()) for d in apart)
    return exact, fast


def test_the_bundled_autoencoder():
    (exact, _), (fast, mean) = bundled()
    print(f"bundled autoencoder, 512 px: exact max {exact:.4f}/255, fast max {fast:.1f}/255, mean {mean:.2f}/255")
    assert exact < 0.01 < mean < 20


if __name__ == "__main__":
    if len(sys.argv) == 5:
        run(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            report(Path(folder))
