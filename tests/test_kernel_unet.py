"""The UNet with all its operations run by kernels: the same numbers, and one graph under `torch.compile` and `torch.export`.

Channels last, as the engine runs it: the norms' kernels take nothing else.
"""

from dataclasses import replace

import torch
from sdcore.kernels import for_ops

from sdcore import ops, unet
from tests import peers
from tests.interpreted import DEVICE, interpreted, run_in_interpreter

test_in_the_interpreter = run_in_interpreter(__file__)


@interpreted
@torch.no_grad()
def test_unet_on_kernels():
    few = {"channels": (32, 64), "heads": (4, 4), "layers": 1, "mid_depth": 1, "cross_only": (False, False)}
    config = replace(peers.small(unet.SD15), depths=(1, 0), **few)
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
        targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
        torchs = [t for t in targets if any(a in t for a in ("group_norm", "layer_norm", "dot_product", "gelu"))]
        assert all(t.startswith("sdcore.") for t in torchs), torchs
        assert sum(t.startswith("sdcore.") for t in targets) >= len(names) - 1, targets
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        runs = {"kernels": model(*given), "compiled": compiled(*given), "exported": exported.module()(*given)}
    for name, got in runs.items():
        assert (got - plain).norm() <= 1e-4 * plain.norm(), name
    assert torch.equal(runs["kernels"], runs["compiled"]) and torch.equal(runs["kernels"], runs["exported"])
    assert not torch.equal(runs["kernels"], plain)  # it was the kernels that ran
