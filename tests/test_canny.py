"""Canny's edges are OpenCV's, pixel for pixel: on the bundled world's pictures, noise, slopes and what cameras see."""

import cv2
import numpy as np
import pytest
from sdcore.train import world

from sdcore.canny import canny, greyscale
from sdcore.errors import ImageError
from tests.timing import fastest


def blurred(g: np.random.Generator, h: int, w: int, sigma: float) -> np.ndarray:
    """Noise without its finest detail: slopes of every direction and steepness, with ties."""
    noise = cv2.GaussianBlur(g.standard_normal((h, w, 3)), (0, 0), sigma)
    return np.clip(128 + 60 * noise / noise.std(), 0, 255).astype(np.uint8)


def pictures() -> dict[str, np.ndarray]:
    """50 pictures of many sizes, odd ones too."""
    g = np.random.default_rng(0)
    found = {}
    drawn = (world.draw_batch([world.sample_scene(g) for _ in range(12)]) * 127.5 + 127.5).round().astype(np.uint8)
    for i, picture in enumerate(drawn.transpose(0, 2, 3, 1)):
        side = (64, 96, 512)[i % 3]
        found[f"world {i} at {side}"] = cv2.resize(picture, (side, side), interpolation=cv2.INTER_CUBIC)
    for i in range(8):
        h, w = g.integers(1, 200, 2)
        found[f"noise {i}, {h} x {w}"] = g.integers(0, 256, (h, w, 3), dtype=np.uint8)
    for i in range(16):
        h, w = g.integers(20, 400, 2)
        found[f"blurred noise {i}, {h} x {w}"] = blurred(g, h, w, 0.5 + i / 4)
    y, x = np.mgrid[:181, :240]
    for i, (a, b) in enumerate([(5, 0), (0, 5), (3, 3), (7, -3), (3, -7), (120, 50)]):  # saw teeth in six directions
        found[f"slope {i}"] = np.stack([(a * x + b * y) % 256, (b * x + a * y) % 200, (a * x) % 100], -1).astype(
            np.uint8
        )
    for i in range(4):  # sharp things on a soft ground, with a camera's grain
        picture = blurred(g, 300, 400, 30)
        for _ in range(12):
            centre, radius = (int(g.integers(400)), int(g.integers(300))), int(g.integers(5, 60))
            cv2.circle(picture, centre, radius, g.integers(0, 256, 3).tolist(), -1, cv2.LINE_AA)
        grain = g.normal(0, 4, picture.shape)
        found[f"things {i}"] = np.clip(picture + grain, 0, 255).astype(np.uint8)
    found["one pixel"] = np.full((1, 1, 3), 200, np.uint8)
    found["checks"] = np.uint8(255) * ((np.indices((90, 70)).sum(0) // 3 % 2)[..., None].repeat(3, 2)).astype(np.uint8)
    found["a line"] = np.zeros((40, 300, 3), np.uint8)
    found["a line"][20, 30:] = 255
    found["black"] = np.zeros((64, 64, 3), np.uint8)
    return found


PICTURES = pictures()


def test_there_are_fifty_and_they_have_edges():
    shares = [np.mean(cv2.Canny(picture, 100, 200) > 0) for picture in PICTURES.values()]
    assert len(shares) == 50 and sum(share > 0.01 for share in shares) > 35


@pytest.mark.parametrize("low, high", [(100, 200), (50, 150), (0, 0), (200.7, 100.2), (3, 900)])
def test_as_opencv(low, high):
    for name, picture in PICTURES.items():
        assert np.array_equal(canny(picture, low, high), cv2.Canny(picture, low, high)), name


def test_grey_as_opencv():
    for name, picture in PICTURES.items():
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        assert np.array_equal(greyscale(picture), grey), name
        assert np.array_equal(canny(grey), cv2.Canny(grey, 100, 200)), name


def test_a_winding_edge_is_followed_to_its_end():
    """Steep at one end only, then a spiral: every turn hangs on the one before."""
    picture = np.full((200, 200), 100, np.uint8)
    angle = np.linspace(0.5, 12 * np.pi, 4000)
    points = (
        np.stack([100 + 2.5 * angle * np.cos(angle), 100 + 2.5 * angle * np.sin(angle)], -1).round().astype(np.int32)
    )
    for i in range(3999):
        cv2.line(picture, points[i].tolist(), points[i + 1].tolist(), max(140, 240 - i // 4), 5)
    theirs = cv2.Canny(picture, 60, 400)
    assert (theirs > 0).sum() > 2000 and (cv2.Canny(picture, 400, 400) > 0).sum() < 100
    assert np.array_equal(canny(picture, 60, 400), theirs)


def test_fast_enough_to_make_training_pairs():
    picture = blurred(np.random.default_rng(1), 768, 768, 2)
    assert fastest(lambda: canny(picture)) < 1


@pytest.mark.parametrize("wrong", [
    np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 4), np.uint8), np.zeros(8, np.uint8), np.zeros((2, 8, 8, 3), np.uint8),
])  # fmt: skip
def test_wrong_layout(wrong):
    with pytest.raises(ImageError, match="expected"):
        canny(wrong)
