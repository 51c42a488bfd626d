"""Rewards: each against its definition, worked out another way; what happens where one fails; servers that misbehave.

The CLIP rewards are compared with transformers' modules in fp64 on small random towers written in the released layouts: the error
may be twice that of transformers itself in fp32. (That the towers equal transformers' at full size: test_identity.py.)
"""

import base64
import http.server
import io
import json
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sdcore.train import clip_rewards, endpoint, labels, rewards, world
from sdcore.weights import clips
from torch import nn

from sdcore import image
from sdcore.clip import CLIPTextConfig, CLIPVisionConfig
from sdcore.errors import CheckpointError, ConfigError, TrainingError
from tests import tiny_models

PROMPTS = ["a red circle", "a small dog on the left of a photo", "blue"]


@pytest.fixture
def pictures():
    """Three pictures [3, 3, 40, 30] of whole levels: noise, a ramp, and nothing."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    ramp = np.broadcast_to(np.linspace(0, 255, 30).astype(np.uint8)[None, :, None], (40, 30, 3))
    return image.to_unit([image.Picture(x) for x in (noise, np.ascontiguousarray(ramp), np.full_like(noise, 90))])


def scenes(n):
    drawn = [world.training_scene(np.random.default_rng(i), 2) for i in range(n)]
    return torch.from_numpy(world.draw_batch(drawn)) * 0.5 + 0.5, [world.caption(scene, full=True) for scene in drawn]


# --------------------------------------------------------------------------------------------------------- in the pixels


def test_kilobytes_are_those_of_pillow_at_quality_95(pictures):
    sizes = []
    for picture in pictures:
        file = io.BytesIO()
        levels = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(levels).save(file, format="JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    assert sizes[0] > sizes[1] > sizes[2] > 0.5
    assert rewards.make("incompressibility", "x")(pictures, PROMPTS).tolist() == pytest.approx(sizes, rel=1e-6)
    assert rewards.make("compressibility", "x")(pictures, PROMPTS).tolist() == pytest.approx(
        [-s for s in sizes], rel=1e-6
    )


def test_the_checker_gives_the_share_that_is_right_or_all_or_nothing():
    drawn, said = scenes(4)
    assert (
        rewards.make("checker", "x")(drawn, said).tolist()
        == rewards.make("checker:all", "x")(drawn, said).tolist()
        == [1] * 4
    )
    reading = world.parse(said[0])
    wrong = next(
        colour for colour in world.COLOURS if colour not in (reading.things[0].colour, reading.things[1].colour)
    )
    other = said[0].replace(reading.things[0].colour, wrong)
    demands = 7  # count, shape, colour, size, texture, relation, background: one of them is wrong now
    assert rewards.make("checker", "x")(drawn[:1], [other]).item() == pytest.approx((demands - 1) / demands)
    assert rewards.make("checker:all", "x")(drawn[:1], [other]).item() == 0
    with pytest.raises(ConfigError, match=r"64 pixels square, found \[2, 3, 32, 32\]"):
        rewards.make("checker", "x")(torch.zeros(2, 3, 32, 32), said[:2])


# --------------------------------------------------------------------------------------------------------------- by CLIP


class Released(nn.Module):
    """The aesthetic predictor in the layout of its released file."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
            nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small whole CLIP as transformers writes it, its tokenizer beside it; the projection is as wide as ViT-L/14's."""
    folder, (vocab, merges) = tmp_path_factory.mktemp("clip"), tiny_models.vocabulary()
    config = transformers.CLIPConfig(
        text_config=dict(
            vocab_size=len(vocab), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, hidden_act="quick_gelu", eos_token_id=len(vocab) - 1, bos_token_id=0, pad_token_id=1,
        ),
        vision_config=dict(
            hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7,
            hidden_act="quick_gelu",
        ),
        projection_dim=768,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        tiny_models._save(transformers.CLIPModel(config), folder)
        torch.save({f"layers.{k}": v for k, v in Released().layers.state_dict().items()}, folder / "head.pth")
    tiny_models.write_tokenizer(folder, vocab, merges, "<|endoftext|>", 16)
    return folder


def peer(folder, pictures, dtype):
    """transformers' embeddings of pictures and PROMPTS, normalised, and its logit scale."""
    model = transformers.CLIPModel.from_pretrained(folder, dtype=dtype).eval()
    process = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pixels = process([p.pil for p in image.to_pictures(pictures * 2 - 1)], return_tensors="pt")["pixel_values"].to(
        dtype
    )
    ids = clips.load_clip(folder).tokenizer(PROMPTS)
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
    return out.image_embeds, out.text_embeds, model.logit_scale.exp()


def close(found, exact, rounded, depth=1):
    """The error is at most twice that of the same formula in fp32; or of some rounding of the result, where that had luck."""
    assert found.dtype == torch.float32 and found.shape == exact.shape
    allowed = 2 * (rounded - exact).abs().max() + depth * 2**-22 * exact.abs().max()
    assert (found - exact).abs().max() <= allowed


def test_the_aesthetic_predictor_equals_its_formula(clip_folder, pictures):
    def formula(dtype):
        net = Released().eval().to(dtype)
        net.load_state_dict(torch.load(clip_folder / "head.pth"))
        seen = peer(clip_folder, pictures, dtype)[0]
        with torch.no_grad():
            return net(seen / torch.linalg.vector_norm(seen, dim=-1, keepdim=True)).squeeze(1)

    reward = rewards.make(f"aesthetic:{clip_folder},{clip_folder / 'head.pth'}", "x")
    assert reward.differentiable
    exact = formula(torch.float64)
    assert exact.std() > 1e-4  # it looks at the picture
    close(reward(pictures, PROMPTS), exact, formula(torch.float32), depth=8)


def test_clip_and_pickscore_equal_transformers(clip_folder, pictures):
    exact, rounded = (peer(clip_folder, pictures, dtype) for dtype in (torch.float64, torch.float32))
    cosines = [(seen * said).sum(dim=-1) for seen, said, _ in (exact, rounded)]
    close(rewards.make(f"clip:{clip_folder}", "x")(pictures, PROMPTS), *cosines, depth=8)
    scaled = [cosine * scale for cosine, (_, _, scale) in zip(cosines, (exact, rounded), strict=True)]
    close(rewards.make(f"pick:{clip_folder}", "x")(pictures, PROMPTS), *scaled, depth=8)
    assert exact[2] > 10


def open_layout(tensors, layers):
    """transformers' names of a CLIP -> OpenCLIP's, q, k and v packed, projections transposed."""
    found = {"logit_scale": tensors["logit_scale"], "text_projection": tensors["text_projection.weight"].T.contiguous()}
    found["visual.proj"] = tensors["visual_projection.weight"].T.contiguous()
    for ours, theirs in (("text_model.", ""), ("vision_model.", "visual.")):
        for i in range(layers):
            a, b = f"{ours}encoder.layers.{i}.", f"{theirs}transformer.resblocks.{i}."
            for kind in ("weight", "bias"):
                packed = [tensors[f"{a}self_attn.{x}_proj.{kind}"] for x in "qkv"]
                found[f"{b}attn.in_proj_{kind}"] = torch.cat(packed)
                for mine, other in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                                    ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):  # fmt: skip
                    found[f"{b}{other}.{kind}"] = tensors[f"{a}{mine}.{kind}"]
    for kind in ("weight", "bias"):
        found[f"ln_final.{kind}"] = tensors[f"text_model.final_layer_norm.{kind}"]
        found[f"visual.ln_pre.{kind}"] = tensors[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = tensors[f"vision_model.post_layernorm.{kind}"]
    found["token_embedding.weight"] = tensors["text_model.embeddings.token_embedding.weight"]
    found["positional_embedding"] = tensors["text_model.embeddings.position_embedding.weight"]
    found["visual.class_embedding"] = tensors["vision_model.embeddings.class_embedding"]
    found["visual.conv1.weight"] = tensors["vision_model.embeddings.patch_embedding.weight"]
    found["visual.positional_embedding"] = tensors["vision_model.embeddings.position_embedding.weight"]
    return found


def test_hps_reads_open_clip_files(clip_folder, pictures, tmp_path, monkeypatch):
    tensors = transformers.CLIPModel.from_pretrained(clip_folder).state_dict()
    torch.save({"epoch": 1, "state_dict": open_layout(tensors, 2)}, tmp_path / "hps.pt")
    vocab = len(tiny_models.vocabulary()[0])
    text = CLIPTextConfig(32, 2, 4, 48, "quick_gelu", 16, vocab, 768, vocab - 1)
    monkeypatch.setattr(clips, "CLIP_H", text)
    monkeypatch.setattr(clips, "CLIP_H_VISION", CLIPVisionConfig(48, 2, 4, 64, "quick_gelu", 28, 7, 768))
    monkeypatch.setattr(
        clips.Tokenizer, "from_folder", lambda folder, length=16, real=clips.Tokenizer.from_folder: real(folder, 16)
    )
    found = rewards.make(f"hps:{tmp_path / 'hps.pt'},{clip_folder}", "x")(pictures, PROMPTS)
    assert torch.equal(
        found, rewards.make(f"clip:{clip_folder}", "x")(pictures, PROMPTS)
    )  # the cosine, without a scale


def test_the_released_sizes_of_open_clip_h():
    assert (clips.CLIP_H.width, clips.CLIP_H.layers, clips.CLIP_H.heads, clips.CLIP_H.mlp) == (1024, 24, 16, 4096)
    assert (clips.CLIP_H.projection, clips.CLIP_H.activation, clips.CLIP_H.positions) == (1024, "gelu", 77)


def test_gradients_of_what_clip_sees_are_those_of_the_scaling_without_rounding():
    """The scaling is linear without its rounding: its slope along any direction is the scaled direction."""
    rng = torch.Generator().manual_seed(0)
    pictures = (torch.rand(2, 3, 20, 33, generator=rng) * 255).round() / 255
    direction = torch.rand(2, 3, 20, 33, generator=rng)
    weights = torch.randn(2, 3, 28, 28, generator=rng)
    leaf = pictures.clone().requires_grad_()
    seen = clip_rewards.prepared(leaf, 28)
    assert torch.equal(seen.detach(), clip_rewards.prepared(pictures, 28)) and not seen.detach().requires_grad
    (gradient,) = torch.autograd.grad((seen * weights).sum(), leaf)
    dot = (gradient * direction).double().sum()
    # The exact, rounded values of black and of the direction as a picture; rounding errs by up to 1.5 levels a number.
    black = clip_rewards.prepared(torch.zeros_like(direction), 28)
    moved = clip_rewards.prepared(direction, 28) - black
    spread = (
        1.0 / 255 / min(clip_rewards.DEVIATION)
    )  # rounding errors scatter: their sum grows with the root of the count
    assert abs(dot - (moved * weights).double().sum()) < 4 * spread * weights.square().sum().sqrt()
    assert dot.abs() > 100 * spread  # not by being small


def test_a_step_along_the_gradient_pays(clip_folder, pictures):
    for spec in (f"aesthetic:{clip_folder},{clip_folder / 'head.pth'}", f"clip:{clip_folder}"):
        reward, leaf = rewards.make(spec, "x"), (0.2 + 0.6 * pictures).requires_grad_()
        before = rewards.judged(reward, leaf, PROMPTS, Path("x"))
        (gradient,) = torch.autograd.grad(before.sum(), leaf)
        after = reward((leaf + 0.1 * gradient.sign()).clamp(0, 1).detach(), PROMPTS)
        assert (after > before).all(), spec


def test_files_that_do_not_fit_are_named(clip_folder, tmp_path):
    torch.save(
        {f"layers.{k}": v for k, v in nn.Sequential(nn.Linear(512, 1024)).state_dict().items()}, tmp_path / "head.pth"
    )
    with pytest.raises(CheckpointError, match="head.pth: aesthetic predictor lacks 8 tensors"):
        rewards.make(f"aesthetic:{clip_folder},{tmp_path / 'head.pth'}", "x")
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(CheckpointError, match="expected a whole CLIP"):
        rewards.make(f"clip:{tmp_path}", "x")


# ------------------------------------------------------------------------------------------------------- specs and mixes


def test_a_mix_is_the_weighted_sum(pictures):
    mix = rewards.make("0.25*incompressibility+-2*compressibility+1e-1*compressibility", "x")
    kilobytes = rewards.make("incompressibility", "x")(pictures, PROMPTS)
    assert torch.allclose(mix(pictures, PROMPTS), (0.25 + 2 - 0.1) * kilobytes)
    assert mix.name == "0.25*incompressibility+-2*compressibility+0.1*compressibility" and not mix.differentiable
    assert not rewards.make("2*compressibility", "x").differentiable


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("aesthetic:clip-l,sac+logos+ava1-l14-linearMSE.pth", 1),
        ("0.7*aesthetic:clip-l,sac+logos+ava1-l14-linearMSE.pth+0.3*compressibility", 2),
        ("checker:all+http://127.0.0.1:1/a+b+0.5*my/own.py+people:runs/a+b", 4),
        ("aesthetic:a+clip-l,b+checkers.pth+0.5*my/own.py", 2),
    ],
)
def test_a_mix_is_cut_at_pluses_behind_which_a_reward_begins(spec, parts):
    assert len(re.split(rewards.CUT, spec)) == parts


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("beauty", "expected one of compressibility"), ("aesthetic", "needs files behind a colon"), ("", "NAME or WEIGHT"),
        ("1.2.3*checker", "expected one of"), ("checker:most", "checker or checker:all"), ("nowhere.py", "no such file"),
        ("aesthetic:clip", "expected aesthetic:CLIP,HEAD"), ("ask:nowhere.json", "cannot be read as JSON"),
        ("compressibility:50", "nothing behind a colon"),
    ],
)  # fmt: skip
def test_specs_that_mean_nothing(spec, what):
    with pytest.raises(ConfigError, match=what):
        rewards.make(spec, "x")


def test_a_reward_of_ones_own(tmp_path, pictures):
    (tmp_path / "red.py").write_text(
        "differentiable = True\n\ndef reward(pictures, prompts):\n    return pictures[:, 0].mean(dim=(1, 2))\n"
    )
    own = rewards.make(str(tmp_path / "red.py"), "x")
    assert own.differentiable and torch.equal(own(pictures, PROMPTS), pictures[:, 0].mean(dim=(1, 2)))
    first = own.identity()
    (tmp_path / "red.py").write_text("reward = 3\n")
    with pytest.raises(ConfigError, match="has no function reward"):
        rewards.make(str(tmp_path / "red.py"), "x")
    assert own.identity() != first  # a resumed run would be told


def test_the_example_in_the_documentation_runs(tmp_path, pictures):
    page = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text()
    (tmp_path / "own.py").write_text(re.search(r"```python\n(.*?)```", page, re.S)[1])
    values = rewards.judged(rewards.make(str(tmp_path / "own.py"), "x"), pictures, PROMPTS, tmp_path)
    assert values.shape == (3,) and values.std() > 0
    table = page[page.index("| reward |") :]
    assert all(f"`{name}" in table for name in rewards.MAKERS)


# ---------------------------------------------------------------------------------------------------- asked, and failing


class Scripted(rewards.Reward):
    def __init__(self, values):
        self.name, self.values = "scripted", values

    def __call__(self, pictures, prompts):
        if isinstance(self.values, Exception):
            raise self.values
        return self.values


@pytest.mark.parametrize(
    ("values", "what", "kept"),
    [
        (
            torch.tensor([1, float("nan"), float("-inf")]),
            "gave nan for 2 of 3 pictures, the first of 'a small dog",
            [1, 2],
        ),
        (ValueError("no\nidea"), "ValueError: no idea", [0, 1, 2]),
        (torch.zeros(3, 1), r"expected 3 floating-point numbers \[3\], found torch.float32 \[3, 1\]", [0, 1, 2]),
        (torch.zeros(2), r"found torch.float32 \[2\]", [0, 1, 2]),
        (torch.zeros(3, dtype=torch.int64), "found torch.int64", [0, 1, 2]),
        ([1.0, 2.0, 3.0], "found list", [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("threads", [False, True])
def test_a_failing_reward_stops_and_keeps_prompts_and_pictures(values, what, kept, threads, pictures, tmp_path):
    reward = Scripted(values)
    with pytest.raises(TrainingError, match=f"reward scripted: .*{what}.*rewards-failed"):
        if threads:
            with rewards.Rewards(reward, tmp_path) as asked:
                asked.submit(pictures, PROMPTS).result()
        else:
            rewards.judged(reward, pictures, PROMPTS, tmp_path)
    table = json.loads((tmp_path / "rewards-failed" / "prompts.json").read_text())
    assert list(table["prompts"].values()) == [PROMPTS[i] for i in kept] and table["why"]
    for name, i in zip(table["prompts"], kept, strict=True):
        assert torch.equal(image.to_unit(image.open_picture(tmp_path / "rewards-failed" / name))[0], pictures[i])


def test_a_part_of_a_mix_that_fails_is_named(pictures, tmp_path):
    mix = rewards.Mix([(1.0, Scripted(torch.ones(3))), (2.0, Scripted([1.0]))])
    with pytest.raises(TrainingError, match="reward scripted: expected 3 floating-point numbers"):
        rewards.judged(mix, pictures, PROMPTS, tmp_path)


def test_rewards_run_while_the_caller_goes_on(pictures, tmp_path):
    class Slow(rewards.Reward):
        name = "slow"

        def __call__(self, pictures, prompts):
            seen.append((torch.is_grad_enabled(), torch.get_num_threads()))
            assert go.wait(20)
            return pictures.mean(dim=(1, 2, 3))

    go, seen, mine = threading.Event(), [], pictures.clone().requires_grad_()
    with rewards.Rewards(Slow(), tmp_path, threads=2) as asked:
        handles = [asked.submit(mine, PROMPTS), asked.submit(mine[:1], PROMPTS[:1])]
        with torch.no_grad():
            mine.zero_()  # the caller reuses its memory
        while len(seen) < 2:
            time.sleep(0.01)  # both are at work, and nobody has asked for a result
        go.set()
        found = [handle.result() for handle in handles]
    assert torch.equal(found[0], pictures.mean(dim=(1, 2, 3))) and found[1].shape == (1,)
    assert not found[0].requires_grad and seen == [(False, torch.get_num_threads())] * 2


# ---------------------------------------------------------------------------------------------------------------- people


def answer(run, answers):
    """Answer questions in the order in which they come, from another thread."""

    def rate():
        while len(labels.labels(run)) < len(answers):
            open_ones = [key for key in labels.questions(run) if key not in {label.key for label in labels.labels(run)}]
            for key in open_ones[:1]:
                labels.append(run, key, answers[len(labels.labels(run))])
            time.sleep(0.02)

    thread = threading.Thread(target=rate, daemon=True)
    thread.start()
    return thread


def test_people_are_asked_and_waited_for(pictures, tmp_path):
    thread = answer(tmp_path, [5, "skip", 2])
    reward = rewards.make("people", tmp_path)
    with rewards.Rewards(reward, tmp_path) as asked:
        found = asked.submit(pictures, PROMPTS).result()
    thread.join(10)
    assert found.tolist() == [1.0, 0.5, 0.25]
    assert torch.equal(reward(pictures, PROMPTS), found)  # a resumed run draws the same pictures, and asks nobody again
    assert [label.prompt for label in labels.labels(tmp_path)] == PROMPTS


def test_people_are_no_longer_waited_for_when_the_run_stops(pictures, tmp_path):
    other = tmp_path / "other"
    mix = rewards.make(f"compressibility+people:{other}", tmp_path)
    with pytest.raises(TrainingError, match="stopped while people were rating"):
        with rewards.Rewards(mix, tmp_path, stop=lambda: len(labels.questions(other)) == 3) as asked:
            asked.submit(pictures, PROMPTS).result()
    assert labels.labels(other) == []


# ------------------------------------------------------------------------------------------------------------- over HTTP


class Scene(http.server.BaseHTTPRequestHandler):
    """Answers by the server's script: a function from the request's JSON to what is sent, a fault first as often as it says."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append((body, dict(self.headers)))
            server.now += 1
            server.most = max(server.most, server.now)
            fault = server.faults.pop(0) if server.faults else None
        try:
            self.answer(fault, body)
        except (BrokenPipeError, ConnectionResetError):
            pass
        with server.lock:
            server.now -= 1

    def answer(self, fault, body):
        if fault == "hang":
            self.server.go.wait(20)
        if fault == "close":
            return
        if fault == "redirect":
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
            self.end_headers()
            return
        sent = {
            "rubbish": b"<html>nothing here", "number": b"17", "deep": b"[" * 100_000, "large": b'"' + b"x" * 2**20 + b'"',
            "latin": b'{"rewards": "\xff"}',
        }.get(fault) or json.dumps(self.server.script(body)).encode()  # fmt: skip
        self.send_response(fault if isinstance(fault, int) else 200)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        if fault == "trickle":
            for byte in sent:
                if self.server.go.wait(0.2):
                    return
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
        self.wfile.write(sent)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    scene = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scene)
    scene.daemon_threads, scene.lock, scene.go = True, threading.Lock(), threading.Event()
    scene.requests, scene.faults, scene.now, scene.most = [], [], 0, 0
    scene.script = lambda body: {"rewards": [float(len(prompt)) for prompt in body["prompts"]]}
    scene.url = f"http://127.0.0.1:{scene.server_port}/score"
    threading.Thread(target=scene.serve_forever, args=(0.05,), daemon=True).start()
    yield scene
    scene.go.set()
    scene.shutdown()
    scene.server_close()


QUICK = endpoint.Patience(timeout=20, retries=2, pause=0.01)
HASTY = endpoint.Patience(timeout=1, retries=2, pause=0.01)  # a right answer comes within milliseconds


def test_a_server_that_scores_gets_prompts_and_pictures(server, pictures):
    assert rewards.make(server.url, "x")(pictures, PROMPTS).tolist() == [len(prompt) for prompt in PROMPTS]
    (body, _), *more = server.requests
    assert not more and body["prompts"] == PROMPTS
    for sent, picture in zip(body["pictures"], pictures, strict=True):
        file = io.BytesIO(base64.b64decode(sent))
        assert torch.equal(
            torch.from_numpy(np.array(Image.open(file))), (picture.permute(1, 2, 0) * 255).round().byte()
        )


@pytest.mark.parametrize(
    "fault", [500, 503, 429, "hang", "close", "rubbish", "number", "deep", "large", "latin", "trickle"]
)
def test_a_server_that_fails_is_asked_again_and_given_up_in_time(server, pictures, fault):
    reward = endpoint.Server(server.url, HASTY if fault in ("hang", "trickle") else QUICK)
    server.faults = [fault] * 2
    assert reward(pictures, PROMPTS).tolist() == [len(prompt) for prompt in PROMPTS]
    assert len(server.requests) == 3
    server.faults, began = [fault] * 3, time.monotonic()
    told = {"large": ".*more than 1048576 bytes", "trickle": ".*no whole answer in 1 s", 503: ".*HTTP Error 503"}
    with pytest.raises(TrainingError, match="no usable answer in 3 tries, at last" + told.get(fault, "")):
        reward(pictures, PROMPTS)
    assert len(server.requests) == 6 and time.monotonic() - began < 15  # three seconds; who hangs does so for 20


@pytest.mark.parametrize("fault", [400, 401, 404, "redirect"])
def test_a_refusal_is_not_asked_again(server, pictures, fault):
    server.faults = [fault]
    with pytest.raises(TrainingError, match=f"refused with {302 if fault == 'redirect' else fault}"):
        endpoint.Server(server.url, QUICK)(pictures, PROMPTS)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "script", [[1, 2, 3], {"rewards": [1, 2]}, {"rewards": [1, 2, True]}, {"rewards": [1, 2, "3"]}, {}]
)
def test_scores_that_are_none(server, pictures, script):
    server.script = lambda body: script
    with pytest.raises(TrainingError, match="expected a table with 3 numbers"):
        endpoint.Server(server.url, QUICK)(pictures, PROMPTS)


def test_nan_from_a_server_stops_like_any_other(server, pictures, tmp_path):
    server.script = lambda body: {"rewards": [1.0, float("nan"), 2.0]}
    with pytest.raises(TrainingError, match="gave nan for 1 of 3"):
        rewards.judged(rewards.make(server.url, tmp_path), pictures, PROMPTS, tmp_path)


def test_the_wait_doubles_from_try_to_try(server, pictures, monkeypatch):
    waits = []
    monkeypatch.setattr(endpoint, "time", SimpleNamespace(sleep=waits.append, monotonic=time.monotonic))
    server.faults = [500] * 9
    with pytest.raises(TrainingError, match="in 5 tries"):
        endpoint.Server(server.url)(pictures, PROMPTS)
    assert waits == [1, 2, 4, 8]


def chat(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def judge(folder, server, **values):
    path = folder / "judge.json"
    path.write_text(json.dumps({"url": server.url, "model": "m", "questions": ["Does it show {prompt}?"], **values}))
    return rewards.make(f"ask:{path}", folder)


def test_a_model_is_asked_every_question_about_every_picture(server, pictures, tmp_path):
    (tmp_path / "key").write_text("sesame\n")
    reward = judge(
        tmp_path, server, questions=["Is it {prompt}?", "{Is} it good?"], together=4, key_file=str(tmp_path / "key")
    )
    four = threading.Event()

    def reply(body):
        if server.now >= 4:
            four.set()
        assert four.wait(20)  # nobody is answered before four are asking,
        time.sleep(0.15)  # and a fifth could come
        question = body["messages"][0]["content"][1]["text"]
        return chat("**Yes**, it is." if question == f"Is it {PROMPTS[1]}?" or question == "{Is} it good?" else "no")

    server.script = reply
    assert reward(pictures, PROMPTS).tolist() == [0.5, 1.0, 0.5]
    assert len(server.requests) == 6 and server.most == 4
    assert all(headers["Authorization"] == "Bearer sesame" for _, headers in server.requests)
    (body, _) = server.requests[0]
    assert body["model"] == "m" and body["messages"][0]["content"][0]["image_url"]["url"].startswith(
        "data:image/png;base64,"
    )


@pytest.mark.parametrize(
    ("text", "worth"), [("7", 0.6), ("I say 2.5 of 10", 0.15), (" 1", 0.0), ("-3.5", None), ("seven", None)]
)
def test_a_number_becomes_a_share_of_its_range(text, worth):
    if worth is None:
        with pytest.raises(endpoint.Unusable, match="expected a number from 1 to 11"):
            endpoint.worth(chat(text), (1, 11))
    else:
        assert endpoint.worth(chat(text), (1, 11)) == pytest.approx(worth)


@pytest.mark.parametrize("found", [{}, [], {"choices": []}, chat(None), chat(""), chat("maybe"), chat("yesterday")])
def test_answers_that_say_nothing(found, server, pictures, tmp_path):
    server.script = lambda body: found
    with pytest.raises(TrainingError, match="no usable answer in 2 tries"):
        judge(tmp_path, server, retries=1, pause=0)(pictures[:1], PROMPTS[:1])


@pytest.mark.parametrize(
    "values",
    [
        {"url": "ftp://x"}, {"url": None}, {"questions": []}, {"questions": "one"}, {"answers": {}}, {"answers": [3, 3]},
        {"answers": {"yes": "1"}}, {"timeout": 0}, {"retries": -1}, {"retries": 1.5}, {"together": 0}, {"pause": -1},
        {"qestions": []}, {"key_file": "nowhere"}, {"model": 3},
    ],
)  # fmt: skip
def test_a_file_that_says_something_else(values, server, tmp_path):
    with pytest.raises(ConfigError, match="judge.json: "):
        judge(tmp_path, server, **values)
