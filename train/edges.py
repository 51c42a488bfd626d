"""How well a picture follows the edges that it was to be drawn along: F1 within a pixel.

An edge pixel counts as met where the other picture has one among its nine neighbours, itself included. Precision is the share of
found edge pixels that are met by the wanted ones, recall the share of wanted ones that are met by the found ones; F1 is their
harmonic mean. The tolerance is one pixel because Canny's crest lies between two pixels and takes either.

Source: the boundary measure of Martin, Fowlkes and Malik 2004, without their one-to-one matching.

Legend: h height, w width.
"""

import numpy as np


def edge_f1(found: np.ndarray, wanted: np.ndarray) -> float:
    """F1 of edges [h, w] against those wanted [h, w], 0..1; anything but 0 is an edge. 1 where neither has any."""
    found, wanted = found != 0, wanted != 0
    if not found.any() and not wanted.any():
        return 1.0
    precise, recalled = met(found, wanted), met(wanted, found)
    return 2 * precise * recalled / (precise + recalled) if precise + recalled else 0.0


def met(these: np.ndarray, those: np.ndarray) -> float:
    """The share of `these` pixels that have one of `those` among their nine neighbours; 0 where there are none."""
    return float(widened(those)[these].mean()) if these.any() else 0.0


def widened(edges: np.ndarray) -> np.ndarray:
    """Edges [h, w] of bool, and every neighbour of one."""
    h, w = edges.shape
    around = np.pad(edges, 1)
    return np.logical_or.reduce([around[dy : dy + h, dx : dx + w] for dy in range(3) for dx in range(3)])
