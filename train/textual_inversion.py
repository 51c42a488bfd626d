"""Textual inversion: teach a model a word. Nothing of the model changes; the word's vectors are all that is learnt.

    sdcore train textual-inversion --data photos --token "<molly>" --initial dog --model sd15 --out runs/molly

What trains: a few new rows [n, d] a text encoder, which stand beside its table (sdcore/embeddings.py) and are the only thing
that has a gradient and a place in the optimiser. They begin as the rows of a word that the model knows. The loss is that of
fine-tuning, on sentences that name the word and nothing else that the pictures show: everything common to the pictures has to go
into it. `--captions style` has sentences about the manner instead; with real captions, the word has to stand in each.

`--pivotal` trains a LoRA along with the word (train/lora.py, all its options): the vectors say which, the weights learn how.

Source: Gal et al. 2022, section 3 (the optimisation, several vectors), appendix (neutral sentences, which are our own here);
Roich et al. 2021 (pivotal tuning), as Simo Ryu brought it to LoRA.
Legend: n vectors of the word, d width of the text encoder, b examples, s tokens.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from sdcore.weights.embeddings import write_embedding
from torch import Tensor, nn

from sdcore import embeddings
from sdcore.embeddings import Embedding
from sdcore.errors import ConfigError, TrainingError
from sdcore.pipeline import Pipeline
from sdcore.prompt import cut
from sdcore.voices import Conditions

from .loop import run
from .lora import LoRAOptions, TrainLoRA
from .options import option, parse
from .tuning import load

SENTENCES = {
    "object": (
        "a photo of {}", "a picture of {}", "{}", "one {}", "this is {}", "here you see {}", "a snapshot of {}",
        "a clear photo of {}",
        "a blurred photo of {}", "a dark photo of {}", "a bright photo of {}", "{} from nearby", "{} from a distance",
        "{} in the middle of the picture", "a sharp picture of my {}", "the {} once more", "a small picture of the {}",
        "a carefully taken photo of {}", "a portrait of {}", "{}, photographed",
    ),
    "style": (
        "a picture in the style of {}", "in the manner of {}", "{} style", "something drawn as {} would", "a painting by {}",
        "a sketch in {} style", "art of the kind of {}", "a work of {}", "a scene as {} sees it",
        "a small work in the style of {}",
        "a large work in the style of {}", "a picture, {} style", "colours and lines of {}", "an image made in {} style",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class InversionOptions(LoRAOptions):
    """Teach a model a word by textual inversion."""

    lr: float = option(5e-3, "peak learning rate")
    weight_decay: float = option(0.0, "decoupled weight decay; 0: nothing pulls the word towards nothing")
    token: str = option("<mine>", "the word, as prompts will call it")
    initial: str = option("thing", "what its vectors begin as: one word or a few, over and over until there are enough")
    vectors: int = option(1, "vectors of the word: more hold more, and leave less room in a prompt")
    captions: str = option(
        "object",
        "object or style: neutral sentences with the word; or txt, filename, a table, which name it themselves",
    )
    pivotal: bool = option(False, "train a LoRA along with the word")
    lora_rate: float = option(0.1, "factor on the learning rate of that LoRA")


PRESETS: dict[str, dict[str, object]] = {
    # The chapter's notebook 02, on SD 1.5 (add --model sdxl --resolution 1024). It optimised the whole table and put the other
    # rows back after each pass, and had no seed: here the word's rows are all there is, and a run can be repeated.
    "chapter-textual-inversion": dict(
        model="sd15", resolution=512, captions="object", token="M*", initial="dog", variants=2, flip=True, steps=200, batch=4,
        accumulate=4, lr=5e-4, beta2=0.999, ema=0.0,
    )
}  # fmt: skip


class Words(nn.Module):
    """The vectors of the word, for every text encoder of a pipeline: `vectors.0` [n, d], `vectors.1`."""

    def __init__(self, pipe: Pipeline, initial: str, count: int):
        super().__init__()
        self.vectors = nn.ParameterList()
        for encoder, tokenizer in zip(pipe.text_encoders, pipe.tokenizers, strict=True):
            known = tokenizer.encode(initial)
            if not known or count < 1:
                raise ConfigError(
                    f"--initial {initial!r}, --vectors {count}: expected at least one word and one vector"
                )
            ids = [known[i % len(known)] for i in range(count)]
            table = encoder.text_model.embeddings.token_embedding.weight
            self.vectors.append(nn.Parameter(table[ids].detach().float().clone()))


class TextualInversion(TrainLoRA):
    """Fine-tuning in which the vectors of a word are all that trains, or the word and a LoRA."""

    options: InversionOptions

    def __init__(self, options: InversionOptions, pipe: Pipeline):
        sentences = SENTENCES.get(options.captions)
        if sentences:
            texts = "|".join(sentence.format(options.token) for sentence in sentences)
            options = replace(options, captions=f"text:{texts}")
        super().__init__(options, pipe)

    def begin(self) -> None:
        o = self.options
        self.words = Words(self.pipe, o.initial, o.vectors)
        embeddings.attach(
            self.pipe, Embedding(o.token, tuple(self.words.vectors))
        )  # prompts find them as they are at any time
        for caption in {caption for item in self.pictures.items for caption in item.captions}:
            if o.token.lower() not in caption.lower():
                raise TrainingError(
                    f"--captions: {caption!r:.80} does not name {o.token}; nothing would be learnt from it"
                )
        if o.pivotal:
            super().begin()
            self.modules["words"] = self.words
        else:
            self.modules = {"words": self.words}

    def rate_of(self, name: str) -> float:
        return 1.0 if name.startswith("words.") else self.options.lora_rate * super().rate_of(name)

    def listens(self) -> bool:
        return True

    def context(self, captions: list[str]) -> Conditions:
        """The text encoders, which are frozen but let gradients through, read the word's rows as they are now."""
        return self.hear(captions, *self.rows(captions))

    def rows(self, captions: list[str]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Encoder by encoder: token numbers [b, s], in which the word has numbers beyond the table, and the rows of these."""
        known, ids, extra = self.pipe.embeddings, [], []
        for e, (encoder, tokenizer) in enumerate(zip(self.pipe.text_encoders, self.pipe.tokenizers, strict=True)):
            named = embeddings.numbers(known, e, encoder.config.vocab)
            ids.append(torch.tensor([cut(caption, tokenizer, named)[0].ids for caption in captions]))
            extra.append(embeddings.table(known, e))
        return ids, extra

    def export(self, out: Path) -> None:
        """The word for A1111, ComfyUI and kohya under its own name, and as diffusers writes it; the LoRA where there is one."""
        word = Embedding(self.options.token, tuple(v.detach().cpu().clone() for v in self.words.vectors))
        bare = word.name.strip("<>")
        write_embedding(out / f"{bare}.safetensors", word, "a1111")
        if len(word.vectors) == 1:  # for two encoders diffusers reads the same names as A1111
            write_embedding(out / "learned_embeds.safetensors", word, "diffusers")
        if self.options.pivotal:
            super().export(out)


def main(argv: list[str] | None = None) -> int:
    """`sdcore train textual-inversion`."""
    options = parse(InversionOptions, argv, prog="sdcore train textual-inversion", presets=PRESETS)
    return run(TextualInversion(options, load(options)), options)
