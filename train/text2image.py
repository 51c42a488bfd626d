"""Train the UNet of the bundled model on captioned pictures of the world.

    sdcore train text2image --vae runs/vae --text runs/text --out runs/text2image
    sdcore train text2image --data pictures --model sd15        # on pictures of one's own: train/finetune.py

What trains: the UNet, between an autoencoder and a text encoder that stay as they are, as in the released models. The loss: the
squared error of the predicted velocity (v), weighted so that nearly clean latents, where the text has nothing left to decide,
do not crowd out the rest (in the spirit of min-SNR). One caption in ten is replaced by the empty one, which is what
classifier-free guidance needs. Timesteps are spread over a batch with one common random shift: every batch sees all noise
levels, so its loss is steadier.

The pictures are drawn and encoded once, before the first step, into a cache of latents and token numbers (`build_cache`).

Source: Rombach et al. 2022; v: Salimans & Ho 2022, appendix D; min-SNR: Hang et al. 2023; guidance: Ho & Salimans 2022.
Legend: b batch, k captions a picture, s tokens, z latent channels, h w latent size.
"""

import hashlib
import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sdcore.weights import configs, files
from torch import Tensor, nn
from tqdm import tqdm

from sdcore.clip import CLIPText
from sdcore.errors import TrainingError
from sdcore.pipeline import Pipeline
from sdcore.scheduler import SchedulerConfig, alpha_bars
from sdcore.tokenizer import Tokenizer
from sdcore.unet import UNet, UNetConfig
from sdcore.vae import VAE

from . import judge, objectives, world
from .loop import LoopOptions, Loss, Part, Task, channels_last, run, sha256
from .options import option, parse

SHARD = 4096  # pictures in one file of the cache
UNET = UNetConfig(
    sample_size=8, channels=(64, 128), layers=1, depths=(1, 1), heads=(4, 4), context_dim=128, linear_projection=True,
    cross_only=(False, False), norm_groups=8,
)  # fmt: skip
MIDDLE, WIDTH = 0.0, 1.2  # of the logit of t / T in training
SCHEDULER = SchedulerConfig(prediction_type="v_prediction", sampler="ddim")


@dataclass(frozen=True)
class TextToImageOptions(LoopOptions):
    """Train a UNet on captioned pictures of the world."""

    out: str = option("runs/text2image", "folder of the run; the finished model is written to its subfolder model/")
    steps: int = option(12000, "steps of the whole run (may be changed on resume, before the cooldown has begun)")
    batch: int = option(32, "pictures a step")
    warmup: int = option(200, "steps in which the learning rate rises to its peak")
    ema: float = option(0.998, "decay of the moving average of the weights, which is what is evaluated and exported")
    cooldown: int = option(1000, "last steps, in which the learning rate falls linearly to nearly nothing")
    eval_every: int = option(1000, "steps between evaluations of the averaged weights; 0: never")
    prompts: int = option(64, "held-out prompts of each evaluation")
    vae: str = option("runs/vae", "folder that holds the trained vae/")
    text: str = option("runs/text", "folder that holds the trained text_encoder/ and its tokenizer/")
    start: str | None = option(
        None, "folder of a model whose unet/ is the starting point; from nothing where it is not given"
    )
    cache: str = option("runs/cache", "folder of encoded pictures; made where it is missing")
    shards: int = option(6, f"files of {SHARD} pictures in the cache")
    captions: int = option(4, "captions a picture")
    dropout: float = option(0.1, "share of captions replaced by the empty one")
    gamma: float = option(5.0, "cap of the weight of nearly clean timesteps, see objectives.capped_v")


# ------------------------------------------------------------------------------------------------------------- the loss


def diffusion_loss(
    unet: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    noise: Tensor,
    context: Tensor,
    alpha_bar: Tensor,
    weights: Tensor,
) -> Tensor:
    """Weighted squared error of v, a mean over everything.

    x, noise [b, z, h, w]; t [b]; context [b, s, d]; alpha_bar, weights [timesteps].
    """
    wanted = objectives.target("v_prediction", x, noise, alpha_bar[t])
    found = unet(objectives.noised(x, noise, alpha_bar[t]), t, context)
    return (weights[t] * objectives.squared(found, wanted).flatten(1).mean(dim=1)).mean()


# ------------------------------------------------------------------------------------------------------------ the cache


def encode_shard(index: int, vae_folder: str, tokenizer: Tokenizer, captions: int, seed: int, cache: Path) -> None:
    """Draw, encode and caption the pictures of one shard, and write it. A function of its arguments alone."""
    torch.set_num_threads(1)
    vae = load_vae(vae_folder)
    rng = np.random.default_rng([seed, index])
    scenes = [world.training_scene(rng) for _ in range(SHARD)]
    ids = tokenizer([world.caption(scene, rng) for scene in scenes for _ in range(captions)])
    mean, std = [], []
    with torch.no_grad():
        for i in range(0, SHARD, 16):
            moments = vae.encode(torch.from_numpy(world.draw_batch(scenes[i : i + 16])))
            mean.append(moments.mean)
            std.append((moments.logvar / 2).exp())
    tensors = {
        "mean": torch.cat(mean).mul(vae.config.scaling_factor).half(),
        "std": torch.cat(std).mul(vae.config.scaling_factor).half(),
        "ids": ids.view(SHARD, captions, -1).to(torch.int16),
    }
    files.write(shard_path(cache, index), tensors)


def shard_path(cache: Path, index: int) -> Path:
    return cache / f"shard-{index:03d}.safetensors"


def build_cache(options: TextToImageOptions, tokenizer: Tokenizer) -> None:
    """Make the shards that are missing, a process a thread. TrainingError where the cache was made otherwise."""
    cache = Path(options.cache)
    cache.mkdir(parents=True, exist_ok=True)
    recipe = {
        "vae": sha256(Path(options.vae) / "vae" / files_name("vae")), "captions": options.captions, "seed": options.seed,
        "tokens": hashlib.sha256(repr([tokenizer.encode(word) for word in world.VOCABULARY]).encode()).hexdigest(),
        "world": world.fingerprint(),
    }  # fmt: skip
    note = cache / "recipe.json"
    if note.exists() and json.loads(note.read_text()) != recipe:
        raise TrainingError(
            f"{cache}: made from another autoencoder, seed or world; remove it or choose another --cache"
        )
    note.write_text(json.dumps(recipe, indent=1) + "\n")
    missing = [i for i in range(options.shards) if not shard_path(cache, i).exists()]
    if missing:
        work = partial(
            encode_shard,
            vae_folder=options.vae,
            tokenizer=tokenizer,
            captions=options.captions,
            seed=options.seed,
            cache=cache,
        )
        with multiprocessing.get_context("fork").Pool(min(options.threads, len(missing))) as pool:
            for _ in tqdm(
                pool.imap_unordered(work, missing), total=len(missing), disable=None, desc="encoding pictures"
            ):
                pass


# ----------------------------------------------------------------------------------------------------------- the method


def files_name(part: str) -> str:
    """The weight file of a part in the diffusers layout."""
    return "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors"


def load_text(folder: str) -> CLIPText:
    """The text encoder that an earlier run left in `folder`/text_encoder."""
    part = Path(folder) / "text_encoder"
    text = CLIPText(configs.text_config(configs.read_json(part / "config.json"), part / "config.json"))
    text.load_state_dict({k: v.float() for k, v in files.read(part / files_name("text_encoder")).tensors.items()})
    return text.eval().requires_grad_(False)


def load_vae(folder: str) -> VAE:
    """The autoencoder that an earlier run left in `folder`/vae."""
    part = Path(folder) / "vae"
    vae = VAE(configs.vae_config(configs.read_json(part / "config.json"), part / "config.json"))
    vae.load_state_dict({k: v.float() for k, v in files.read(part / files_name("vae")).tensors.items()})
    channels_last(vae)
    return vae.eval().requires_grad_(False)


class TextToImage(Task):
    """What trains and what the loss is."""

    def __init__(self, options: TextToImageOptions):
        self.options = options
        self.folder = Path(options.out) / "model"
        shutil.copytree(Path(options.text) / "tokenizer", self.folder / "tokenizer", dirs_exist_ok=True)
        self.tokenizer = Tokenizer.from_folder(self.folder / "tokenizer")
        build_cache(options, self.tokenizer)
        shards = [files.read(shard_path(Path(options.cache), i)).tensors for i in range(options.shards)]
        self.mean, self.std, self.ids = (
            torch.cat([shard[name] for shard in shards]) for name in ("mean", "std", "ids")
        )
        self.empty = self.tokenizer([""])[0]
        self.alpha_bar = alpha_bars(SCHEDULER).float()
        self.weights = objectives.capped_v(self.alpha_bar, options.gamma)

        torch.manual_seed(options.seed)
        self.vae = load_vae(options.vae)
        self.text = load_text(options.text)
        self.unet = UNet(UNET)
        channels_last(self.unet)
        if options.start:
            self.unet.load_state_dict(files.read(Path(options.start) / "unet" / files_name("unet")).tensors)
        else:
            self.begin()
        self.modules = {"unet": self.unet, "text_encoder": self.text}

    def begin(self) -> None:
        """Start as nearly the identity: what each block adds to its shortcut begins at zero, as does the prediction."""
        for name, module in self.unet.named_modules():
            if name.endswith(("conv2", "proj_out", "conv_out")):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def identity(self) -> dict[str, object]:
        shards = [sha256(shard_path(Path(self.options.cache), i)) for i in range(self.options.shards)]
        return {
            "cache": hashlib.sha256("".join(shards).encode()).hexdigest(), "pictures": len(self.mean),
            "text": sha256(Path(self.options.text) / "text_encoder" / files_name("text_encoder")), "start": self.options.start,
        }  # fmt: skip

    def rows(self, step: int) -> Tensor:
        """The pictures of a step: every epoch goes through all of them in its own order."""
        batches = len(self.mean) // self.options.batch
        epoch, place = divmod(step, batches)
        if getattr(self, "epoch", None) != epoch:
            order = torch.Generator().manual_seed(self.options.seed * 1_000_003 + epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.mean), generator=order)
        return self.order[place * self.options.batch : (place + 1) * self.options.batch]

    def loss(self, part: Part) -> Loss:
        rng, rows = part.common(), self.rows(part.step)
        b, shape = len(rows), (len(rows), *self.mean.shape[1:])
        x = self.mean[rows].float() + self.std[rows].float() * torch.randn(shape, generator=rng)
        ids = self.ids[rows, torch.randint(self.options.captions, (b,), generator=rng)].long()
        ids = torch.where((torch.rand(b, generator=rng) < self.options.dropout)[:, None], self.empty, ids)
        t = objectives.logit_normal(b, SCHEDULER.train_steps, rng, MIDDLE, WIDTH)
        noise = torch.randn(shape, generator=rng)
        x, ids, t, noise = part.of(x), part.of(ids), part.of(t), part.of(noise)
        with torch.no_grad():
            context = self.text(ids).last
        return Loss(diffusion_loss(self.unet, x, t, noise, context, self.alpha_bar, self.weights), len(x))

    def pipeline(self) -> Pipeline:
        """The model as it is now."""
        return Pipeline(self.unet, self.vae, [self.text], [self.tokenizer], SCHEDULER)

    def evaluate(self, step: int, out: Path) -> dict[str, float]:
        """The checker's verdict on held-out prompts, in short; a sheet of pictures."""
        start = time.perf_counter()
        verdict = judge.prompts(self.pipeline(), self.options.prompts, steps=20, sheet=out / "sheet.png")
        return {**verdict, "judged_in": round(time.perf_counter() - start, 1)}

    def export(self, out: Path) -> None:
        write_model(self.folder, self.unet, self.text, Path(self.options.vae) / "vae")
        print(f"the model is in {self.folder}", file=sys.stderr)


def write_model(folder: Path, unet: UNet, text: CLIPText, vae: Path) -> None:
    """Write the diffusers layout around tokenizer/, which is there already; weights in fp16."""
    special = {
        "bos_token_id": text.config.vocab - 2,
        "eos_token_id": text.config.eos_id,
        "pad_token_id": text.config.eos_id,
        "dtype": "float32",  # of the computation: left to itself, transformers takes that of the file, and diffusers does not
        "torch_dtype": "float32",  # the same, as transformers before version 5 calls it
    }
    tables = {
        "unet": configs.unet_table(unet.config), "text_encoder": configs.text_table(text.config) | special,
        "vae": json.loads((vae / "config.json").read_text()),
    }  # fmt: skip
    tensors = {
        "unet": unet.state_dict(),
        "text_encoder": text.state_dict(),
        "vae": files.read(vae / files_name("vae")).tensors,
    }
    for part, table in tables.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(table, indent=2) + "\n")
        files.write(folder / part / files_name(part), tensors[part], {"format": "pt"}, dtype=torch.float16)
    (folder / "scheduler").mkdir(exist_ok=True)
    text_of = json.dumps(configs.scheduler_table(SCHEDULER), indent=2) + "\n"
    (folder / "scheduler" / "scheduler_config.json").write_text(text_of)
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False,
        "safety_checker": [None, None], "scheduler": ["diffusers", configs.CLASSES[SCHEDULER.sampler]],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """`sdcore train text2image`; with --data, of a folder, it is the fine-tuning of train/finetune.py."""
    words = sys.argv[1:] if argv is None else argv
    if any(word.split("=")[0] == "--data" for word in words):
        from . import finetune

        return finetune.main(words)
    options = parse(TextToImageOptions, argv, prog="sdcore train text2image")
    return run(TextToImage(options), options)


if __name__ == "__main__":
    raise SystemExit(main())
