"""The bench of LoRA training: everyone takes the same step, on a model small enough for a CPU."""

import json

import torch
from sdcore.kernels import models
from sdcore.train import bench
from sdcore.train.lora import ChangeOptions, LoRA

CPU = torch.device("cpu")


def test_a_step_of_everyone_is_timed(tmp_path, capsys):
    """The command, on a CPU: nobody fails, and the file holds what was printed."""
    assert bench.main(["small", "--rounds", "2", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["by"] for row in rows] == [bench.OURS, bench.THEIRS]
    assert all(row["ms"] > 0 and row["its"] == 1e3 / row["ms"] for row in rows), rows
    assert rows[1]["times"] == 1 and rows[0]["times"] == rows[1]["ms"] / rows[0]["ms"]
    printed = capsys.readouterr().out
    assert all(models.line(row) in printed for row in rows)


def test_both_train_a_lora_of_the_same_layers(monkeypatch):
    """As many numbers with a gradient, and from zero the same loss in the first step."""
    pipe = models.build("small", CPU, torch.float32)
    learned, losses, sizes = LoRA(pipe, ChangeOptions(rank=bench.RANK), seed=0), [], []
    whole = bench.Given.loss

    def noted(self, unet):
        losses.append(whole(self, unet))
        return losses[-1]

    monkeypatch.setattr(bench.Given, "loss", noted)
    clip = torch.nn.utils.clip_grad_norm_

    def counted(parameters, most):
        parameters = list(parameters)
        sizes.append(sum(p.numel() for p in parameters))
        return clip(parameters, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", counted)
    bench.ours(pipe, learned, pipe.unet, False, "fp32")()
    bench.theirs(pipe, False, torch.float32)()
    assert sizes[0] == sizes[1] > 0
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
