"""Training data: every fault listed before the first step, buckets, visits as pure functions, caches that cannot pair wrongly."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sdcore.train import caches, data, ranks
from sdcore.train.checkpoints import sha256

from sdcore.clip import CLIPText, CLIPTextConfig
from sdcore.errors import TrainingError
from sdcore.vae import VAE, VAEConfig


def picture(path: Path, w: int, h: int, seed: int = 0, **options) -> Path:
    """A picture that says where it is: red is the column, green the row, blue the seed."""
    x, y = np.meshgrid(np.arange(w) % 256, np.arange(h) % 256)
    Image.fromarray(np.stack([x, y, np.full_like(x, seed)], axis=-1).astype(np.uint8)).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    """Nine pictures of several shapes, each with its caption."""
    (tmp_path / "pictures/sub").mkdir(parents=True)
    for i, (w, h) in enumerate(
        [(96, 96), (100, 97), (200, 100), (190, 101), (100, 200), (120, 96), (96, 120), (300, 170), (128, 128)]
    ):
        name = f"{'sub/' * (i % 2)}p{i}"
        picture(tmp_path / f"pictures/{name}.png", w, h, seed=i)
        (tmp_path / f"pictures/{name}.txt").write_text(f"picture {i}, round, red, small\n\nof shape {w} by {h}\n")
    return tmp_path / "pictures"


def options(folder: Path, **changes) -> data.DataOptions:
    return data.DataOptions(**{"data": str(folder), "resolution": 64, "bucket_step": 16} | changes)


# ------------------------------------------------------------------------------------------------------------------ preflight


def spoil(folder: Path) -> dict[str, str]:
    """Every kind of picture that cannot be used, and what is to be said of it."""
    faults = {}

    def add(name: str, words: str, caption: str = "a caption") -> Path:
        (folder / name).with_suffix(".txt").write_text(caption)
        faults[name] = words
        return folder / name

    good = (folder / "p0.png").read_bytes()
    add("truncated.png", "damaged or cut off").write_bytes(good[: len(good) * 2 // 3])
    add("text.jpg", "no picture that can be read").write_text("not a picture")
    add("empty.webp", "no picture that can be read").touch()
    picture(add("tiny.png", "15x40, smaller than the"), 15, 40)
    Image.new("CMYK", (100, 100), (10, 20, 30, 40)).save(add("print.jpg", "CMYK"))
    frames = [Image.new("RGB", (100, 100), (i, i, i)) for i in (0, 200)]
    frames[0].save(add("moving.webp", "animated"), save_all=True, append_images=frames[1:])
    picture(add("silent.png", "without a caption", caption=" \n"), 96, 96)
    jpeg = picture(add("exif.jpg", "EXIF"), 96, 96, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0")
    assert jpeg.exists()
    return faults


def test_all_faults_are_listed_before_anything_starts(folder, capfd):
    faults = spoil(folder)
    with pytest.raises(
        TrainingError, match=rf"{len(faults)} of {9 + len(faults)} pictures cannot be used.*--broken skip"
    ):
        data.Pictures(options(folder), seed=0, batch=2)
    said = capfd.readouterr().err
    for name, words in faults.items():
        assert re.search(rf"{re.escape(str(folder / name))}: .*{words}", said), (name, said)
    left = data.Pictures(options(folder, broken="skip"), seed=0, batch=2)
    assert len(left.items) == 9 and {fault.path.name for fault in left.faults} == set(faults)
    assert left.identity()["left_out"] == len(faults)
    assert f"{len(faults)} of" in capfd.readouterr().err
    for path in folder.rglob("p*.png"):
        path.unlink()
    with pytest.raises(TrainingError, match="cannot be used"):  # nothing is left
        data.Pictures(options(folder, broken="skip"), seed=0, batch=2)


def test_other_refusals(folder, tmp_path):
    picture(tmp_path / "mask.png", 50, 50)
    for wrong, words in (
        (dict(data=str(tmp_path / "none")), "is no folder"), (dict(broken="mend"), "--broken"), (dict(crop="left"), "--crop"),
        (dict(resolution=4), "--resolution"), (dict(dropout=1.5), "--dropout"), (dict(flip=True), "--variants 2"),
        (dict(captions="sounds"), "expected txt, filename"), (dict(variants=0), "--variants"),
    ):  # fmt: skip
        with pytest.raises(TrainingError, match=words):
            data.Pictures(options(folder, **wrong), seed=0, batch=2)
    (tmp_path / "none").mkdir()
    with pytest.raises(TrainingError, match="holds no picture"):
        data.Pictures(options(tmp_path / "none"), seed=0, batch=2)
    pictures = data.Pictures(options(folder), seed=0, batch=2)
    before = pictures.identity()
    (folder / "p0.txt").write_text("another caption")
    assert data.Pictures(options(folder), seed=0, batch=2).identity() != before
    picture(folder / "p0.png", 96, 96, seed=77)
    with pytest.raises(TrainingError, match="p0.png: changed or removed"):
        for step in range(pictures.epoch_length):
            for visit in pictures.visits(step, range(2)):
                data.open_visit(visit)


# ------------------------------------------------------------------------------------------------------------------- captions


def test_captions_of_every_kind(folder, tmp_path):
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    rows = [{"file_name": name, "text": f"of {name}, ü"} for name in names]
    (folder / "list.json").write_text(json.dumps(rows))
    (folder / "table.json").write_text(json.dumps({row["file_name"]: row["text"] for row in rows}))
    (folder / "lines.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "sheet.csv").write_text("text,file_name\n" + "\n".join(f'"{r["text"]}",{r["file_name"]}' for r in rows))
    for source in ("list.json", "table.json", "lines.jsonl", "sheet.csv", str(folder / "list.json")):
        found = dict(data.scan(options(folder, captions=source)))
        assert found == {folder / name: (f"of {name}, ü",) for name in names}, source
    (folder / "more.json").write_text(json.dumps({name: ["one", "two"] for name in names}))
    assert set(dict(data.scan(options(folder, captions="more.json"))).values()) == {("one", "two")}
    assert dict(data.scan(options(folder)))[folder / "p0.png"] == ("picture 0, round, red, small", "of shape 96 by 96")
    assert dict(data.scan(options(folder, captions="filename")))[folder / "sub/p1.png"] == ("p1",)
    assert set(dict(data.scan(options(folder, captions="text:a dog"))).values()) == {("a dog",)}
    for name, content in (
        ("no.csv", "a,b\n1,2"),
        ("no.json", "[1]"),
        ("no.jsonl", "{"),
        ("no2.json", '[{"file_name": 1, "text": 2}]'),
    ):
        (folder / name).write_text(content)
        with pytest.raises(TrainingError, match=f"{name}: no table"):
            data.scan(options(folder, captions=name))
    (folder / "stray.json").write_text(json.dumps({"not there.png": "x"}))
    with pytest.raises(TrainingError, match="1 rows name no picture of .*'not there.png'"):
        data.scan(options(folder, captions="stray.json"))


def test_captions_of_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    parquet.write_table(pyarrow.table({"file_name": names, "text": [f"of {n}" for n in names]}), folder / "t.parquet")
    assert dict(data.scan(options(folder, captions="t.parquet")))[folder / "p0.png"] == ("of p0.png",)


def test_words(folder):
    """Each line of a .txt in its turn; tags shuffled behind those that are kept; the share that is dropped."""
    pictures = data.Pictures(options(folder, shuffle_tags=True, keep_tags=1, dropout=0.2), seed=0, batch=4)
    said = [visit.caption for step in range(400) for visit in pictures.visits(step, range(4))]
    assert abs(said.count("") / len(said) - 0.2) < 4 * (0.2 * 0.8 / len(said)) ** 0.5
    tags = [caption.split(", ") for caption in said if caption.startswith("picture")]
    assert all(sorted(t[1:]) == ["red", "round", "small"] and re.fullmatch(r"picture \d", t[0]) for t in tags)
    orders = Counter(tuple(t[1:]) for t in tags)
    assert len(orders) == 6 and min(orders.values()) > len(tags) / 12
    assert 0.4 < len(tags) / (len(said) - said.count("")) < 0.6
    plain = data.Pictures(options(folder), seed=0, batch=4)
    lines = {line for item in plain.items for line in item.captions}
    assert {v.caption for step in range(50) for v in plain.visits(step, range(4))} == lines


# --------------------------------------------------------------------------------------------------------- buckets and visits


def test_shapes_of_buckets():
    sizes = data.shapes(data.DataOptions(resolution=512))
    assert (512, 512) in sizes and (640, 384) in sizes and (384, 640) in sizes
    assert all(w % 64 == h % 64 == 0 and w * h <= 512**2 and 0.5 <= w / h <= 2 for w, h in sizes)
    assert all((w + 64) * h > 512**2 or w / h > 2 - 64 / h for w, h in sizes)  # none could be wider, but for the limit
    assert sizes == sorted({(h, w) for w, h in sizes})
    assert data.shapes(data.DataOptions(resolution=1024, buckets=False)) == [(1024, 1024)]
    for size in ((1500, 1000), (900, 1000), (4000, 1000)):
        best = data.nearest(size, sizes)
        assert all(
            abs(np.log(best[0] / best[1] / (size[0] / size[1]))) <= abs(np.log(w / h / (size[0] / size[1]))) + 1e-12
            for w, h in sizes
        )


def test_every_epoch_goes_through_everything_in_batches_of_one_size(folder):
    pictures = data.Pictures(options(folder, repeats=3), seed=5, batch=4)
    orders = []
    for epoch in range(2):
        seen: Counter = Counter()
        for step in range(epoch * pictures.epoch_length, (epoch + 1) * pictures.epoch_length):
            visits = pictures.visits(step, range(4))
            assert len({visit.view.size for visit in visits}) == 1
            seen.update(visit.item.path.name for visit in visits)
        assert len(seen) == 9 and min(seen.values()) >= 3
        assert sum(seen.values()) == 4 * sum(-(-3 * len(members) // 4) for members in pictures.buckets.values())
        orders.append(
            [
                v.item.path.name
                for s in range(pictures.epoch_length)
                for v in pictures.visits(epoch * pictures.epoch_length + s, range(4))
            ]
        )
    assert orders[0] != orders[1]


def test_visits_are_a_function_of_seed_step_and_place(folder):
    o = options(folder, variants=4, crop="random", flip=True, shuffle_tags=True, dropout=0.1)
    pictures, again = (data.Pictures(o, seed=3, batch=4) for _ in range(2))
    whole = {step: pictures.visits(step, range(4)) for step in range(30)}
    for step in reversed(range(30)):
        for place in (2, 0, 3, 1):
            assert again.visits(step, [place]) == [whole[step][place]]
    assert data.Pictures(o, seed=4, batch=4).visits(0, range(4)) != whole[0]
    for world, accumulate in ((1, 1), (2, 1), (1, 3), (2, 2), (4, 1)):
        shares = [share for rank in range(world) for share in ranks.Ranks(rank, world).shares(4, accumulate)]
        assert sorted(place for share in shares for place in share) == [0, 1, 2, 3] and all(shares)
    with pytest.raises(TrainingError, match="cannot be cut into 6 parts"):
        ranks.Ranks(0, 3).shares(4, 2)


def test_a_view_shows_the_window_that_the_numbers_say(folder):
    """The pictures say where they are: red is the column, green the row. Windows of unscaled pictures are read off exactly."""
    for name in ("wide", "tall"):
        picture(folder / f"{name}.png", *((200, 64) if name == "wide" else (64, 150)))
        (folder / f"{name}.txt").write_text(name)
    pictures = data.Pictures(options(folder, buckets=False, variants=16, crop="random", flip=True), seed=0, batch=1)
    lefts = set()
    for name, (w, h) in (("wide", (200, 64)), ("tall", (64, 150))):
        index = next(i for i, item in enumerate(pictures.items) if item.path.stem == name)
        for k in range(16):
            view = pictures.view(index, k)
            visit = data.Visit(pictures.items[index], k, view, "")
            pixels = ((data.open_visit(visit)[0] + 1) / 2 * 255).round().int().numpy()
            columns, rows = pixels[0, 0], pixels[1, :, 0]
            assert view.flip == (k % 2 == 1) and pixels.shape == (3, 64, 64)
            assert columns.tolist() == list(range(view.left, view.left + 64))[:: -1 if view.flip else 1]
            assert rows.tolist() == list(range(view.top, view.top + 64))
            left = w - view.left - 64 if view.flip else view.left  # in the mirrored picture
            assert visit.sizes == (h, w, view.top, left, 64, 64)
            lefts.add(view.left)
    assert len(lefts) > 8 and max(lefts) > 100
    centred = data.Pictures(options(folder, buckets=False), seed=0, batch=1)
    index = next(i for i, item in enumerate(centred.items) if item.path.stem == "wide")
    assert centred.view(index, 0) == data.View((200, 64), 68, 0, (64, 64), False)


def test_masks_go_through_the_same_window(folder, tmp_path):
    """A mask that is white right of column 100 of the wide picture is so in every window, mirrored or not."""
    (tmp_path / "masks").mkdir()
    picture(folder / "wide.png", 200, 64)
    (folder / "wide.txt").write_text("wide")
    half = np.zeros((64, 200), np.uint8)
    half[:, 100:] = 255
    Image.fromarray(half).save(tmp_path / "masks/wide.png")
    o = options(folder, buckets=False, variants=8, crop="random", flip=True, masks=str(tmp_path / "masks"))
    pictures = data.Pictures(o, seed=0, batch=1)
    index = next(i for i, item in enumerate(pictures.items) if item.path.stem == "wide")
    for k in range(8):
        pixels, mask = data.open_visit(data.Visit(pictures.items[index], k, pictures.view(index, k), ""))
        column = ((pixels[0] + 1) / 2 * 255).round()
        assert torch.equal(mask[0], (column >= 100).float())
    assert all(item.mask is None for i, item in enumerate(pictures.items) if i != index)
    Image.fromarray(half[:, :90]).save(tmp_path / "masks/wide.png")
    with pytest.raises(TrainingError, match="1 of 10"):
        data.Pictures(o, seed=0, batch=1)


# --------------------------------------------------------------------------------------------------------------------- caches


@pytest.fixture(scope="module")
def models():
    """An autoencoder and a text encoder, small and random."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(channels=(8, 8, 8, 8), layers=1, norm_groups=4)).eval()
    text = CLIPText(CLIPTextConfig(vocab=400, width=16, layers=1, heads=2, mlp=16, eos_id=399)).eval()
    for p in text.parameters():
        torch.nn.init.normal_(p)
    return vae, text


def reader(text: CLIPText):
    def read(caption: str) -> dict[str, torch.Tensor]:
        row = [*caption.encode()[:76]]
        ids = torch.tensor([row + [399] * (77 - len(row))])
        return {"context": text(ids).last[0]}

    return read


def test_every_triple_with_caches_is_the_uncached_one(folder, tmp_path, models, monkeypatch):
    """Two shuffled epochs, then another order by another run on the same cache: latent, words and crop by hash."""
    vae, text = models
    (tmp_path / "masks").mkdir()
    Image.new("L", (96, 96), 90).save(tmp_path / "masks/p0.png")
    (folder / "twin.png").write_bytes((folder / "p0.png").read_bytes())  # the same bytes, other words, no mask
    (folder / "twin.txt").write_text("a twin, of words of its own")
    o = options(
        folder, variants=4, crop="random", flip=True, shuffle_tags=True, dropout=0.1, masks=str(tmp_path / "masks")
    )

    def triples(pictures: data.Pictures, kept: Path | None, epochs: int) -> list[tuple]:
        latents, texts = caches.Latents(vae, kept), caches.Texts(reader(text), [text], kept)
        found = []
        for step in range(epochs * pictures.epoch_length):
            visits = pictures.visits(step, range(pictures.batch))
            mean, std, mask = latents(visits)
            context = texts([visit.caption for visit in visits])["context"]
            for i, visit in enumerate(visits):
                tensors = {"mean": mean[i], "std": std[i], "context": context[i]}
                tensors |= {} if mask is None else {"mask": mask[i]}
                found.append((visit.item.path.name, visit.caption, visit.view, visit.sizes, caches.content(tensors)))
        return found

    pictures = data.Pictures(o, seed=0, batch=3)
    expected = triples(pictures, None, 2)
    assert triples(pictures, tmp_path / "cache", 2) == expected
    assert len({one[-1] for one in expected}) > 20  # they do differ
    views = {(one[0], one[2]) for one in expected}
    words = {one[1] for one in expected}
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == len(views) + len(words)

    encoded = []
    monkeypatch.setattr(caches.Latents, "encode", lambda *_: encoded.append(1))
    assert triples(pictures, tmp_path / "cache", 2) == expected and not encoded  # all from the disk
    monkeypatch.undo()
    other = data.Pictures(o, seed=9, batch=2)
    assert triples(other, tmp_path / "cache", 2) == triples(other, None, 2)


def test_a_cache_does_not_serve_another_model_and_mends_what_is_damaged(folder, tmp_path, models, capfd):
    vae, text = models
    visit = data.Pictures(options(folder), seed=0, batch=1).visits(0, [0])[0]
    first = caches.Latents(vae, tmp_path / "cache").one(visit)
    path = next((tmp_path / "cache").rglob("*.safetensors"))
    other = VAE(vae.config).eval()
    assert not torch.equal(caches.Latents(other, tmp_path / "cache").one(visit)["mean"], first["mean"])
    whole = path.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-9], b""):
        path.write_bytes(damaged)
        again = caches.Latents(vae, tmp_path / "cache").one(visit)
        assert all(torch.equal(again[name], first[name]) for name in first)
        assert "it is made again" in capfd.readouterr().err and path.read_bytes() == whole
    stranger = next(p for p in (tmp_path / "cache").rglob("*.safetensors") if p != path)
    os.replace(stranger, path)  # a whole file, in the place of another
    assert torch.equal(caches.Latents(vae, tmp_path / "cache").one(visit)["mean"], first["mean"])
    read = caches.Texts(reader(text), [text], tmp_path / "cache")
    context = read(["a", "b"])["context"]
    assert torch.equal(context[0], text(torch.tensor([[97] + [399] * 76])).last[0]) and not torch.equal(*context)
    stranger = CLIPText(text.config).eval()
    assert not torch.equal(
        caches.Texts(reader(stranger), [stranger], tmp_path / "cache")(["a"])["context"], context[:1]
    )
    assert caches.fingerprint(vae) == caches.fingerprint(vae) != caches.fingerprint(other)


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
