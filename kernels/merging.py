"""Token merging: self-attention over fewer tokens. Lossy.

    fast = sdcore.accelerate(pipe, merge=0.5)       # half of the tokens at full resolution go with another one

Neighbouring tokens of a picture are much alike, and attention costs the square of their number. So before a self-attention the
tokens that are most like another one are merged with it, and behind it everyone of a group gets the group's answer:

    one token of every 2 x 2 square is kept (its upper left one); the three others may go
    each of the others looks for the kept one that it resembles most, by the cosine of the normed tokens
    the share of all tokens that resemble theirs most go: a group's token is the mean of its members

What is merged is found anew in every layer and step, from the tokens alone: the same picture is merged the same way. Only the
self-attentions of the highest resolution that has any are treated, where the tokens are many.

Source: Bolya & Hoffman 2023 (2303.17604), sections 3 and 4.1, with fixed in place of random corners; Bolya et al. 2022
(2210.09461), appendix D, for the matching.

Legend: b batch, h w height and width of the map, s = h w tokens, d width; r go, t may go, u = s - t are kept.
"""

from collections.abc import Iterator

import torch
from sdcore.kernels.fused import TransformerLayer
from torch import Tensor, nn

from sdcore import variants
from sdcore.unet import KeysValues, Transformer, UNet

MOST = 0.75  # three tokens of every four


class Merge:
    """Who goes with whom among tokens [b, s, d] of a map h x w, at most a share of them."""

    def __init__(self, tokens: Tensor, h: int, w: int, share: float):
        place = torch.arange(h * w, device=tokens.device)
        kept = (place // w % 2 == 0) & (place % w % 2 == 0)
        u = ((h + 1) // 2) * ((w + 1) // 2)
        order = torch.argsort(kept, descending=True, stable=True)  # without asking the device how many there are
        self.kept, self.others = order[:u], order[u:]
        unit = tokens / tokens.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(tokens.dtype).tiny)
        likeness, nearest = (unit[:, self.others] @ unit[:, self.kept].mT).max(dim=-1)  # [b, t]
        r = min(int(share * h * w), len(self.others))
        order = likeness.argsort(dim=-1, descending=True, stable=True)
        self.gone, self.stays = order[:, :r, None], order[:, r:, None]  # among the others
        self.to = nearest[..., None].gather(1, self.gone)  # whom each goes with, among the kept

    def merged(self, x: Tensor) -> Tensor:
        """[b, s, d] -> [b, s - r, d]: those that stay, then the kept, as means of their groups."""
        d, kept, others = x.shape[-1], x[:, self.kept], x[:, self.others]
        stays, gone = (others.gather(1, at.expand(-1, -1, d)) for at in (self.stays, self.gone))
        return torch.cat([stays, kept.scatter_reduce(1, self.to.expand(-1, -1, d), gone, "mean")], dim=1)

    def apart(self, y: Tensor) -> Tensor:
        """[b, s - r, d] -> [b, s, d]: everyone gets the answer of its group."""
        d, n = y.shape[-1], self.stays.shape[1]
        stays, kept = y[:, :n], y[:, n:]
        others = y.new_empty(len(y), len(self.others), d)
        others.scatter_(1, self.stays.expand(-1, -1, d), stays)
        others.scatter_(1, self.gone.expand(-1, -1, d), kept.gather(1, self.to.expand(-1, -1, d)))
        x = y.new_empty(len(y), len(self.kept) + len(self.others), d)
        x[:, self.kept], x[:, self.others] = kept, others
        return x


class Sized:
    """What the layers of a transformer are told of the text, in turn, and the size of its map."""

    def __init__(self, kv: Iterator[KeysValues], size: tuple[int, int]):
        self.kv, self.size = kv, size

    def __iter__(self) -> Iterator[KeysValues]:
        return self

    def __next__(self) -> KeysValues:
        return next(self.kv)


class MergingTransformer(Transformer):
    """`unet.Transformer` that tells its layers the size of the map."""

    def forward(self, x: Tensor, kv: Iterator[KeysValues]) -> Tensor:
        return super().forward(x, Sized(kv, (x.shape[-2], x.shape[-1])))


class MergingLayer(TransformerLayer):
    """`fused.TransformerLayer` whose tokens are merged before they look at themselves."""

    share: float

    def forward(self, x: Tensor, kv: Sized) -> Tensor:  # type: ignore[override]
        if self.attn1.cross:  # the upscaler's look at the text instead
            return super().forward(x, kv)
        tokens = self.norm1(x)
        merge = Merge(tokens, *kv.size, self.share)
        return self.behind(x + merge.apart(self.attn1(merge.merged(tokens))), kv)


def merging(twin: UNet, share: float) -> UNet:
    """A fused twin of a UNet (`fused.mirror`) whose self-attentions at the highest resolution merge a share of the tokens."""
    level = next(i for i, depth in enumerate(twin.config.depths) if depth)

    def change(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, (Transformer, TransformerLayer)):
            return None
        children = {name: variants.mirror(child, change) for name, child in module.named_children()}
        changed = variants.with_children(module, children)
        changed.__class__ = MergingTransformer if isinstance(module, Transformer) else MergingLayer
        changed.share = share  # type: ignore[assignment]
        return changed

    def at(blocks: nn.ModuleList, i: int) -> nn.ModuleList:
        return nn.ModuleList(variants.mirror(block, change) if j == i else block for j, block in enumerate(blocks))

    down, up = at(twin.down_blocks, level), at(twin.up_blocks, len(twin.up_blocks) - 1 - level)
    return variants.twin_of(twin, down_blocks=down, up_blocks=up)
