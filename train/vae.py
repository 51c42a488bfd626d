"""Train the autoencoder of the bundled model on pictures of the world.

    sdcore train vae --out runs/vae                        # encoder and decoder together
    sdcore train vae --out runs/decoder --start runs/vae --decoder-only     # then the decoder alone, while the UNet learns

What trains: everything, or with --decoder-only what lies behind the latents, so that a UNet that learns on latents of the
frozen encoder stays right. The loss: absolute and squared error of the pixels (the one keeps edges sharp, the other is the
PSNR), absolute error of edges, and a little of the divergence to N(0, 1), which keeps latents small and neighbours alike.
Source: Kingma & Welling 2014, equation 10; Rombach et al. 2022, appendix G.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sdcore.weights import configs, files
from torch import Tensor

from sdcore.vae import VAE, VAEConfig

from . import world
from .loop import LoopOptions, Loss, Part, Task, channels_last, run
from .options import option, parse

CONFIG = VAEConfig(channels=(32, 32, 64, 64), layers=1, sample_size=world.SIDE, norm_groups=8)

MEASURED = 512  # pictures from which the latents' mean and deviation are measured at the end


@dataclass(frozen=True)
class VAEOptions(LoopOptions):
    """Train an autoencoder on pictures of the world."""

    out: str = option("runs/vae", "folder of the run")
    steps: int = option(2400, "steps of the whole run (may be changed on resume, before the cooldown has begun)")
    batch: int = option(16, "pictures a step")
    cooldown: int = option(400, "last steps, in which the learning rate falls linearly to nearly nothing")
    ema: float = option(0.995, "decay of the moving average of the weights, which is what is evaluated and exported")
    eval_every: int = option(200, "steps between evaluations of the averaged weights; 0: never")
    save_every: int = option(100, "steps between checkpoints")
    close_steps: int = option(
        0, "steps at the start that look at windows of 32 x 32 around the things: four times as cheap"
    )
    kl: float = option(1e-4, "weight of the divergence to N(0, 1), a mean over latent values")
    start: str | None = option(None, "folder of an earlier run whose result is the starting point")
    decoder_only: bool = option(False, "leave the encoder as it is")


class TrainVAE(Task):
    """What trains and what the loss is."""

    def __init__(self, options: VAEOptions):
        self.options = options
        torch.manual_seed(options.seed)
        self.vae = VAE(CONFIG)
        if options.start:
            self.vae.load_state_dict(
                files.read(Path(options.start) / "vae" / "diffusion_pytorch_model.safetensors").tensors
            )
        channels_last(self.vae)
        self.modules = {"vae": self.vae}
        if options.decoder_only:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)

    def identity(self) -> dict[str, object]:
        return {"world": world.fingerprint(), "start": self.options.start}

    def loss(self, part: Part) -> Loss:
        rng, o = part.common(), self.options
        seed = int(torch.randint(2**62, (1,), generator=rng))
        x = torch.from_numpy(pictures(np.random.default_rng(seed), o.batch, close=part.step < o.close_steps))
        noise = torch.randn(
            len(x), CONFIG.latent_channels, *(side // CONFIG.factor for side in x.shape[2:]), generator=rng
        )
        x, noise = (
            part.of(whole.unflatten(0, (o.batch, -1))).flatten(0, 1) for whole in (x, noise)
        )  # windows of a picture
        x = x.contiguous(memory_format=torch.channels_last)
        y, moments = self.vae(x, noise)
        absolute, squared = F.l1_loss(y, x), F.mse_loss(y, x)
        kl = 0.5 * (moments.mean**2 + moments.logvar.exp() - 1 - moments.logvar).mean()
        edges = edge_loss(y, x)
        figures = {"absolute": absolute.item(), "squared": squared.item(), "edges": edges.item(), "kl": kl.item()}
        return Loss(absolute + squared + edges + o.kl * kl, len(x), figures)

    def evaluate(self, step: int, out: Path) -> dict[str, float]:
        """PSNR of 128 pictures never trained on; a sheet with every original above its reconstruction."""
        x = torch.from_numpy(world.vae_pictures(np.random.default_rng(10**9), 128))
        means = [self.vae.encode(part).mean for part in x.split(16)]
        y = torch.cat([self.vae.decode(mean) for mean in means]).clamp(-1, 1)
        rows = torch.stack([x[:32].view(4, 8, *x.shape[1:]), y[:32].view(4, 8, *x.shape[1:])], dim=1).flatten(0, 2)
        Image.fromarray(world.sheet(rows.numpy(), scale=2)).save(out / "reconstructions.png")
        return {"psnr": psnr(y, x), "latent_std": torch.cat(means).std().item()}

    def export(self, out: Path) -> None:
        """Write vae/ in the diffusers layout; its latents have mean 0 and the scaling factor gives them unit variance."""
        x = torch.from_numpy(world.vae_pictures(np.random.default_rng(10**9 + 1), MEASURED))
        mean = torch.cat([self.vae.encode(part).mean for part in x.split(16)])
        if not self.options.decoder_only:  # a frozen encoder stays as it is, to the bit
            standardise(self.vae, mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3)))
            mean = torch.cat([self.vae.encode(part).mean for part in x.split(16)])
        table = configs.vae_table(CONFIG) | {"scaling_factor": round(1 / mean.std().item(), 5)}
        folder = out / "vae"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(table, indent=2) + "\n")
        state = {name: tensor.contiguous() for name, tensor in self.vae.state_dict().items()}
        files.write(folder / "diffusion_pytorch_model.safetensors", state)


def pictures(rng: np.random.Generator, n: int, close: bool) -> np.ndarray:
    """A batch [n, 3, 64, 64] in -1..1; or, `close`, two windows [2n, 3, 32, 32] of every picture, each with a thing in it.

    Most of a picture is empty background, which is learned at once; the things are what takes time.
    """
    scenes = [world.vae_scene(rng) for _ in range(n)]
    x = world.draw_batch(scenes)
    if not close:
        return x
    side, windows = world.SIDE // 2, []
    for picture, scene in zip(x, scenes, strict=True):
        for thing in (scene.things[0], scene.things[-1]):
            middle = np.array([thing.y, thing.x]) + rng.uniform(-8, 8, 2)
            corner = (
                np.rint((middle - side / 2) / CONFIG.factor).astype(int) * CONFIG.factor
            )  # textures keep their place
            top, left = np.clip(corner, 0, world.SIDE - side)
            windows.append(picture[:, top : top + side, left : left + side])
    return np.stack(windows)


def edge_loss(y: Tensor, x: Tensor) -> Tensor:
    """Absolute error of the differences between neighbouring pixels: a blurred edge costs as much as a shifted one."""
    return F.l1_loss(y.diff(dim=2), x.diff(dim=2)) + F.l1_loss(y.diff(dim=3), x.diff(dim=3))


def standardise(vae: VAE, mean: Tensor, std: Tensor) -> None:
    """Give every latent channel mean 0 and deviation 1, in place, changing no reconstruction.

    The latents' channels come out of one 1 x 1 convolution and go into another, which undo each other's shift and scale. A UNet
    learns faster on such latents, and no released format has room for a mean and scale per channel. mean, std [z].
    """
    z = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    assert before.bias is not None and after.bias is not None
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std.view(1, z, 1, 1)
    before.weight[:z] /= std.view(z, 1, 1, 1)
    before.bias[:z] = (before.bias[:z] - mean) / std
    before.bias[z:] -= 2 * std.log()


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise ratio in dB of pictures in -1..1: the mean over pictures."""
    return (10 * torch.log10(4 / ((a - b) ** 2).flatten(1).mean(dim=1))).mean().item()


def main(argv: list[str] | None = None) -> int:
    """`sdcore train vae`."""
    options = parse(VAEOptions, argv, prog="sdcore train vae")
    return run(TrainVAE(options), options)


if __name__ == "__main__":
    raise SystemExit(main())
