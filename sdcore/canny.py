"""Canny's edge detector: from a picture to its outlines, one pixel wide. The control images of "canny" ControlNets are made so.

Four steps, each a function below: the slope of the brightness by Sobel's masks; how steep it is, as |dx| + |dy|; of every ridge
only its crest, judged across the ridge (`crests`); of the crests those that are steep, and what hangs together with them
(`joined`). All in whole numbers and in OpenCV's order of operations, so the edges are those of `cv2.Canny(pixels, low, high)` bit
for bit: models were trained on those.

Source: Canny 1986; the directions in fixed point and the treatment of ties and borders are OpenCV's.

Legend: h height, w width.
"""

import numpy as np

from sdcore.errors import ImageError

TAN_22 = 13573  # tan(22.5 degrees) * 2^15, rounded: the border between "across" and "slanting"
BITS = 15


def canny(pixels: np.ndarray, low: float = 100, high: float = 200) -> np.ndarray:
    """Pixels [h, w] or [h, w, 3] uint8 -> edges [h, w] uint8, 255 on an edge and 0 elsewhere.

    An edge is steeper than `high` somewhere and nowhere flatter than `low` (0 to 2040). Of a colour picture each pixel has the
    slope of its steepest channel, as in OpenCV; give `greyscale(pixels)` to look at brightness alone.
    Raises ImageError for another shape or dtype.
    """
    if pixels.dtype != np.uint8 or pixels.ndim < 2 or pixels.shape[2:] not in ((), (3,)):
        raise ImageError(f"pixels: expected [h, w] or [h, w, 3] uint8, found {list(pixels.shape)} {pixels.dtype}")
    low, high = sorted((int(low // 1), int(high // 1)))
    dx, dy = steepest(*sobel(pixels.reshape(*pixels.shape[:2], -1).astype(np.int32)))
    steep = np.abs(dx) + np.abs(dy)
    thin = crests(dx, dy, steep) & (steep > low)
    return joined(thin & (steep > high), thin).astype(np.uint8) * 255


def greyscale(pixels: np.ndarray) -> np.ndarray:
    """Pixels [h, w, 3] uint8, red first -> brightness [h, w] uint8, rounded as `cv2.cvtColor` does. Source: ITU-R BT.601."""
    weights = np.array([9798, 19235, 3735])  # 0.299, 0.587, 0.114, times 2^15
    return ((pixels @ weights + (1 << BITS - 1)) >> BITS).astype(np.uint8)


def sobel(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes to the right and downwards of x [h, w, c], times 8. Beyond the border the picture goes on as it ended."""
    x = np.pad(x, ((1, 1), (1, 1), (0, 0)), mode="edge")
    across = x[:, 2:] - x[:, :-2]
    down = x[2:] - x[:-2]
    return across[:-2] + 2 * across[1:-1] + across[2:], down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]


def steepest(dx: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of slopes [h, w, c] those of each pixel's steepest channel [h, w], the first of equals."""
    best = (np.abs(dx) + np.abs(dy)).argmax(axis=2)[..., None]
    return np.take_along_axis(dx, best, 2)[..., 0], np.take_along_axis(dy, best, 2)[..., 0]


def crests(dx: np.ndarray, dy: np.ndarray, steep: np.ndarray) -> np.ndarray:
    """Where the slope is steeper than at both neighbours across the ridge, in whichever of four directions is nearest.

    Of two equals the left one wins, and the upper one; on a slant neither.
    """
    h, w = steep.shape
    around = np.pad(steep, 1)  # beyond the border nothing is steep

    def beside(down: int, right: int) -> np.ndarray:
        return around[1 + down : 1 + down + h, 1 + right : 1 + right + w]

    x, y = np.abs(dx).astype(np.int64), np.abs(dy).astype(np.int64) << BITS
    flat = y < x * TAN_22  # less than 22.5 degrees
    upright = y > x * TAN_22 + (x << BITS + 1)  # more than 67.5: its tangent is that of 22.5, plus 2
    falling = (dx ^ dy) >= 0  # of the slanting ones: towards the lower right, or the lower left
    across = (steep > beside(0, -1)) & (steep >= beside(0, 1))
    along = (steep > beside(-1, 0)) & (steep >= beside(1, 0))
    one = (steep > beside(-1, -1)) & (steep > beside(1, 1))
    other = (steep > beside(-1, 1)) & (steep > beside(1, -1))
    return np.where(flat, across, np.where(upright, along, np.where(falling, one, other)))


def joined(sure: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """The `possible` pixels that a chain of neighbours, corners included, joins to a `sure` one. All are [h, w] of bool."""
    width = sure.shape[1] + 2
    found = np.pad(sure, 1).ravel()
    open_ = np.pad(possible & ~sure, 1).ravel()
    around = np.array([-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1])
    front = np.flatnonzero(found)
    while front.size:  # from the sure ones outwards, a ring of neighbours at a time
        near = (front[:, None] + around).ravel()
        front = np.unique(near[open_[near]])
        open_[front], found[front] = False, True
    return found.reshape(-1, width)[1:-1, 1:-1]
