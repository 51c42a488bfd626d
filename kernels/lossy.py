"""Faster by leaving work out: the picture changes. Nothing here acts unless it is asked for.

    fast = sdcore.accelerate(pipe, deep_every=3)

**DeepCache.** From one step to the next the deep levels of the UNet change little. With `deep_every=k` they run at every k-th
step only; between, the outermost residual block of the way up takes what entered it last time, beside a fresh latent. Source: Ma
et al. 2023 (2312.00858), section 3.3 with the outermost skip branch.

**Guidance skipping** needs no code here: `guidance_interval=(low, high)` of the pipeline leaves the negative half out outside an
interval of noise levels (2404.07724).

What either does to pictures, and how much time it spares, is measured in docs/reports/engine-cpu.md.

Legend: b pictures, r rows of conditions, c channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sdcore.unet import Attention, KeysValues, UNet, Up, widen


class DeepCache:
    """`UNet.step` whose deep part runs at every `every`-th step. One for each picture: it remembers."""

    def __init__(self, unet: UNet, every: int):
        self.unet, self.every = unet, every
        self.deep: Tensor | None = None  # what entered the outermost residual block [r, c, h, w]

    def step(self, x: Tensor, shifts: Sequence[Tensor], keys_values: Sequence[KeysValues], i: int) -> Tensor:
        """Step number `i`; the other arguments are those of `UNet.step`."""
        rows = len(keys_values[0][0])
        if i % self.every == 0 or self.deep is None or len(self.deep) < rows:
            self.deep, skips = self.inner(x, shifts, keys_values)
        else:
            skips = [self.unet.conv_in(x)]
        deep, outermost = self.deep[-rows:], self.blocks()[-1]
        y = outermost.resnets[-1](torch.cat([deep, widen(skips[0], deep)], dim=1), shifts[-1])
        for attention in list(outermost.attentions)[-1:]:
            own = sum(isinstance(part, Attention) and part.cross for part in attention.modules())
            y = attention(y, iter(keys_values[-own:]))
        return self.unet.conv_out(self.unet.conv_norm_out(y, silu=True))

    def inner(
        self, x: Tensor, shifts: Sequence[Tensor], keys_values: Sequence[KeysValues]
    ) -> tuple[Tensor, list[Tensor]]:
        """`UNet.step` up to the outermost residual block: what enters it, and the one kept result that is left for it."""
        shift, kv = iter(shifts), iter(keys_values)
        x, skips = self.unet.down(self.unet.conv_in(x), shift, kv)
        *blocks, outermost = self.blocks()
        for block in blocks:
            x, skips = block(x, skips, shift, kv)
        for i, resnet in enumerate(list(outermost.resnets)[:-1]):
            x = resnet(torch.cat([x, widen(skips[-1], x)], dim=1), next(shift))
            skips = skips[:-1]
            if outermost.attentions:
                x = outermost.attentions[i](x, kv)
        return x, skips

    def blocks(self) -> list[Up]:
        """The levels of the way up."""
        return list(self.unet.up_blocks)  # type: ignore[arg-type]
