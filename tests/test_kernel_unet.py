"""The UNet with all its operations run by kernels: the same numbers, and one graph under `torch.compile` and `torch.export`.
And the engine's twin of it, whose products are kernels too, with what follows them.

Channels last, as the engine runs it: the norms' kernels take nothing else.
"""

from dataclasses import replace

import torch
from sdcore.kernels import conv, engine, for_ops, fp8, fused, gemm

from sdcore import ops, unet
from tests import peers
from tests.interpreted import DEVICE, interpreted, run_in_interpreter

test_in_the_interpreter = run_in_interpreter(__file__)


FEW = {
    "channels": (32, 64),
    "heads": (2, 2),
    "norm_groups": 4,
    "layers": 1,
    "mid_depth": 1,
    "cross_only": (False, False),
}
CONFIG = replace(peers.small(unet.SD15), depths=(1, 0), **FEW)


@interpreted
@torch.no_grad()
def test_unet_on_kernels():
    config = CONFIG
    model = peers.twins(config)[0].to(DEVICE, memory_format=torch.channels_last)
    (x, t, context, _, _), _ = peers.inputs(config, (4, 4), batch=1, tokens=5)
    x, t, context = (tensor.to(DEVICE) for tensor in (x, t, context))
    given = (x.contiguous(memory_format=torch.channels_last), t, context)
    plain = model(*given)
    names = {"attention", "group_norm", "group_norm_silu", "layer_norm", "geglu"}
    torch._dynamo.reset()
    with ops.using(**for_ops()):
        exported = torch.export.export(model, given)
        # Every operation is in the graph as ours, none as PyTorch's.
        called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
        targets = set(called)
        torchs = [t for t in targets if any(a in t for a in ("group_norm", "layer_norm", "dot_product", "gelu"))]
        assert all(t.startswith("sdcore.") for t in torchs), torchs
        assert sum(t.startswith("sdcore.") for t in targets) >= len(names) - 1, targets
        attentions = sum(isinstance(part, unet.Attention) for part in model.modules())
        assert sum(t.startswith("sdcore.attention.") for t in called) == attentions > 0
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        runs = {"kernels": model(*given), "compiled": compiled(*given), "exported": exported.module()(*given)}
    for name, got in runs.items():
        assert (got - plain).norm() <= 1e-4 * plain.norm(), name
    assert torch.equal(runs["kernels"], runs["compiled"]) and torch.equal(runs["kernels"], runs["exported"])
    assert not torch.equal(runs["kernels"], plain)  # it was the kernels that ran


@interpreted
@torch.no_grad()
def test_the_engines_products_are_kernels(monkeypatch):
    """Every linear layer with its gate or shortcut, every convolution with the time or its shortcut, every doubling; in fp8 as
    its definition draws it."""
    ran = []

    def counted(file, name, what=lambda *given: ""):
        run = getattr(file, name)
        monkeypatch.setattr(file, name, lambda *given: (ran.append(what(*given)), run(*given))[1])

    counted(
        gemm,
        "forward",
        lambda x, w, b, residual, gated: f"gemm{' gated' * gated}{' residual' * (residual is not None)}",
    )
    counted(
        conv,
        "forward",
        lambda x, w, b, s, r, stride: f"conv{' shift' * (s is not None)}{' residual' * (r is not None)}",
    )
    counted(conv, "upsample_forward", lambda *_: "upsample")
    counted(fp8, "linear_forward", lambda *_: "fp8 linear")
    counted(fp8, "conv_forward", lambda *_: "fp8 conv")
    model, device = peers.twins(CONFIG)[0].to(DEVICE), torch.device(DEVICE)
    (x, t, context, _, _), _ = peers.inputs(CONFIG, (4, 6), batch=1, tokens=5)
    x = x.to(DEVICE).contiguous(memory_format=torch.channels_last)
    context = torch.cat([context, -context]).to(DEVICE)
    kv, shifts = model.keys_values(context), model.time_shifts(model.embed_time(t.to(DEVICE)))

    def draw(products):
        with ops.using(**for_ops()):
            return fused.mirror(model, fused.replacement(products)).step(x, shifts, kv)

    want, exact = model.step(x, shifts, kv), engine.products("triton", device)
    got = draw(exact)
    assert (got - want).norm() <= 1e-4 * want.norm()
    layers = [m for m in model.modules() if isinstance(m, unet.TransformerLayer)]
    blocks = [m for m in model.modules() if isinstance(m, unet.Resnet)]
    attentions = 2 * len(layers)
    assert ran.count("gemm gated") == len(layers) and ran.count("upsample") == 1
    assert ran.count("gemm residual") == len(layers) + attentions  # the feed-forward's second product and each to_out
    assert ran.count("gemm") >= attentions  # q, or q, k and v; and the 1 x 1 convolutions
    assert ran.count("conv residual") == ran.count("conv shift") == len(blocks)
    ran.clear()
    ours = draw(engine.lossy_products("triton", device, exact))
    assert ran.count("fp8 linear") >= 4 * len(layers) and ran.count("fp8 conv") >= 2 * len(blocks) and "upsample" in ran
    theirs = draw(engine.lossy_products("torch", device, exact))
    assert 3 * (ours - theirs).norm() < (theirs - want).norm()  # roundings of activations that were at a tie
