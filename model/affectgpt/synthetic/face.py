"""Draw a talking face: anti-aliased RGB frames from expression curves over time, in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]
Array = NDArray[Any]

EXPRESSION = (
    "smile",  # −1 corners down … +1 corners up
    "mouth_open",  # 0 closed … 1 wide
    "mouth_width",  # −1 pursed … +1 stretched
    "brow_raise",  # −1 lowered … +1 raised
    "brow_tilt",  # −1 inner ends down (frown) … +1 inner ends up (distress)
    "eye_open",  # −1 shut … 0 at rest … +1 wide
    "nose_wrinkle",  # 0 … 1, upper lip lifted with it
    "brow_skew",  # −1 … +1, one brow above the other
    "head_pitch",  # −1 chin down … +1 chin up
    "head_roll",  # −1 … +1, ±12 degrees
)
"""Degrees of freedom of a face, a simplified set of facial action units; a face at rest has 0 everywhere."""

REST: dict[str, float] = dict.fromkeys(EXPRESSION, 0.0)


@dataclass(frozen=True)
class Appearance:
    """A person and their surroundings: everything in a clip's picture that does not depend on the emotion.

    Attributes:
        centre: head centre (x, y) and `radius`: half the head's height, as fractions of the frame's side.
        skin, hair, iris, shirt, wall_top, wall_bottom: RGB in 0…255.
        hairline: lower end of the hair on the forehead, in head radii above the centre.
        brow_weight: half thickness of the brows, in head radii.
        light: −1 … +1, from which side the face is lit.
    """

    centre: tuple[float, float]
    radius: float
    skin: tuple[float, float, float]
    hair: tuple[float, float, float]
    iris: tuple[float, float, float]
    shirt: tuple[float, float, float]
    wall_top: tuple[float, float, float]
    wall_bottom: tuple[float, float, float]
    hairline: float
    brow_weight: float
    light: float

    @classmethod
    def random(cls, rng: np.random.Generator) -> Appearance:
        skins = np.array([[244, 211, 184], [229, 184, 150], [198, 145, 108], [150, 100, 72], [110, 72, 52]], float)
        hairs = np.array([[34, 26, 22], [70, 44, 28], [122, 84, 48], [176, 140, 84], [120, 116, 116]], float)
        irises = np.array([[70, 44, 28], [62, 96, 130], [74, 104, 66]], float)

        def near(palette: np.ndarray, spread: float) -> tuple[float, float, float]:
            return tuple(np.clip(rng.choice(palette) + rng.normal(0, spread, 3), 0, 255))

        wall = np.clip(rng.uniform(90, 200) + rng.normal(0, 25, 3), 0, 255)
        return cls(
            centre=(0.5 + rng.uniform(-0.04, 0.04), 0.48 + rng.uniform(-0.03, 0.03)),
            radius=rng.uniform(0.33, 0.37),
            skin=near(skins, 5),
            hair=near(hairs, 8),
            iris=near(irises, 8),
            shirt=tuple(rng.uniform(30, 220, 3)),
            wall_top=tuple(wall),
            wall_bottom=tuple(np.clip(wall * rng.uniform(0.6, 0.9), 0, 255)),
            hairline=rng.uniform(0.58, 0.70),
            brow_weight=rng.uniform(0.028, 0.045),
            light=rng.uniform(-1, 1),
        )


def render(curves: Mapping[str, Floats], who: Appearance, size: int = 144) -> NDArray[np.uint8]:
    """Render frames `[T, size, size, 3]`, RGB, of a person with expression curves, each `[T]` (keys of `EXPRESSION`).

    Shapes are signed-distance fields blended over one pixel of edge. Positions are in head radii from the head's
    centre, x to the viewer's right and y down.
    """
    c = {name: np.asarray(curves[name], np.float32)[:, None, None] for name in EXPRESSION}
    frames = len(curves["smile"])
    canvas = _Canvas(frames, size, who, c["head_roll"] * 0.21)
    ink = np.array([40, 24, 22], np.float32)
    skin, hair = np.array(who.skin, np.float32), np.array(who.hair, np.float32)
    lip = skin * np.array([0.80, 0.52, 0.52], np.float32)
    shade = skin * 0.72
    down = -0.10 * c["head_pitch"]  # features slide up the head as the chin goes up

    # body and head
    canvas.fill(skin * 0.82, (0, 1.0, 0.36, 0.55), lambda x, y: _ellipse(x, y - 1.0, 0.30, 0.5))
    canvas.fill(np.array(who.shirt, np.float32), (0, 1.75, 1.7, 0.8), lambda x, y: _ellipse(x, y - 1.9, 1.25, 0.62))
    canvas.fill(hair, (0, -0.12, 1.0, 1.12), lambda x, y: _ellipse(x, y + 0.12, 0.86, 1.0))
    for side in (-1, 1):
        canvas.fill(
            skin * 0.9, (side * 0.78, 0.1, 0.2, 0.26), lambda x, y, s=side: _ellipse(x - s * 0.78, y - 0.08, 0.11, 0.2)
        )
    canvas.fill(
        lambda x, y: skin * (1 - 0.10 * (x * x + y * y) + 0.10 * who.light * x)[..., None],
        (0, 0, 0.84, 1.06),
        lambda x, y: _ellipse(x, y, 0.77, 1.0),
    )
    canvas.fill(
        hair,
        (0, -0.75, 0.9, 0.5),
        lambda x, y: np.maximum(_ellipse(x, y + 0.05, 0.82, 1.02), y + who.hairline - 0.22 * x * x),
    )

    # eyes
    lid = np.clip(0.155 * (1 + 0.75 * c["eye_open"]), 0.012, None)
    for side in (-1, 1):
        ex, ey = side * 0.33, -0.10 + down

        def eye(x: Array, y: Array, ex: float = ex, ey: Array = ey) -> Array:
            return _ellipse(x - ex, y - ey, 0.185, lid)

        around = (ex, -0.10, 0.24, 0.42)
        canvas.fill(np.array([247, 246, 242], np.float32), around, eye)
        canvas.fill(
            np.array(who.iris, np.float32),
            around,
            lambda x, y, e=eye, ex=ex, ey=ey: np.maximum(e(x, y), _ellipse(x - ex, y - ey, 0.095, 0.095)),
        )
        canvas.fill(
            ink * 0.4,
            around,
            lambda x, y, e=eye, ex=ex, ey=ey: np.maximum(e(x, y), _ellipse(x - ex, y - ey, 0.048, 0.048)),
        )
        canvas.fill(ink, around, lambda x, y, e=eye, ey=ey: np.maximum(np.abs(e(x, y)) - 0.014, y - ey - 0.4 * lid))

    # brows: parabolas whose inner end rises with the tilt
    for side in (-1, 1):
        height = -0.40 + down - 0.15 * c["brow_raise"] + side * 0.07 * c["brow_skew"] + 0.03 * c["nose_wrinkle"]

        def brow(x: Array, y: Array, side: int = side, height: Array = height) -> Array:
            u = (side * x - 0.34) / 0.22  # −1 at the inner end, +1 at the outer
            middle = height + 0.05 * u * u + 0.13 * c["brow_tilt"] * u
            return _stroke(u * 0.22, 0.22, y - middle, who.brow_weight)

        canvas.fill(np.minimum(hair * 0.7, skin * 0.45), (side * 0.34, -0.40, 0.30, 0.46), brow)

    # nose, and its wrinkles
    canvas.fill(shade, (0, 0.24, 0.2, 0.22), lambda x, y: _stroke(x, 0.10, y - (0.27 + down - 2.5 * x * x), 0.018))
    if float(c["nose_wrinkle"].max()) > 0.02:
        for k in range(3):
            canvas.fill(
                lambda x, y: skin * 0.55 + 0 * x[..., None],
                (0, -0.02, 0.22, 0.34),
                lambda x, y, k=k: _stroke(x, 0.085, y - (-0.08 + 0.075 * k + down + 1.5 * x * x), 0.016),
                opacity=np.clip(c["nose_wrinkle"], 0, 1),
            )

    # mouth: the opening between two parabolas, lips as strokes along them
    half = 0.30 * (1 + 0.28 * c["mouth_width"])
    base = 0.56 + down
    opening = 0.24 * np.clip(c["mouth_open"], 0, None)
    lift = 0.10 * np.clip(c["nose_wrinkle"], 0, 1)

    def lips(x: Array) -> tuple[Array, Array]:
        u2 = (x / half) ** 2
        bend = 0.20 * c["smile"] * (0.5 - u2)  # corners up: the middle hangs below them
        arch = np.clip(1 - u2, 0, None)
        return base + bend - (0.35 * opening + lift) * arch, base + bend + 0.75 * opening * arch

    def inside(x: Array, y: Array) -> Array:
        upper, lower = lips(x)
        return np.maximum(np.maximum(upper - y, y - lower), np.abs(x) - half)

    mouth = (0, 0.58, 0.42, 0.46)
    canvas.fill(ink * 0.9, mouth, inside)
    canvas.fill(
        np.array([240, 236, 228], np.float32), mouth, lambda x, y: np.maximum(inside(x, y), y - lips(x)[0] - 0.055)
    )
    canvas.fill(lip, mouth, lambda x, y: _stroke(x, half, y - lips(x)[0], 0.030))
    canvas.fill(lip, mouth, lambda x, y: _stroke(x, half, y - lips(x)[1], 0.038))
    return canvas.pixels()


def face_crops(frames: NDArray[np.uint8], who: Appearance, side: int = 112) -> NDArray[np.uint8]:
    """Cut face crops `[T, side, side, 3]`, RGB, as a face tracker would: the head's square, resized."""
    size = frames.shape[1]
    x, y, r = who.centre[0] * size, who.centre[1] * size, who.radius * size * 1.08
    box = (max(x - r, 0), max(y - r, 0), min(x + r, size), min(y + r, size))
    return np.stack(
        [np.asarray(Image.fromarray(f).resize((side, side), Image.Resampling.BILINEAR, box=box)) for f in frames]
    )


def _ellipse(x: Array, y: Array, rx: Any, ry: Any) -> Array:
    """Approximate the signed distance to an axis-aligned ellipse: exact on the edge, first order near it."""
    k = np.sqrt((x / rx) ** 2 + (y / ry) ** 2) + 1e-6
    slope = np.sqrt((x / rx**2) ** 2 + (y / ry**2) ** 2) / k + 1e-6
    return (k - 1) / slope


def _stroke(along: Array, half_length: Any, across: Array, half_width: float) -> Array:
    """Compute the signed distance to a rounded stroke: `along` from its middle, `across` from its centre line."""
    past = np.clip(np.abs(along) - half_length, 0, None)
    return np.sqrt(past * past + across * across) - half_width


class _Canvas:
    """Frames `[T, S, S, 3]` in float, painted in head coordinates; a shape changes only its window of pixels."""

    def __init__(self, frames: int, size: int, who: Appearance, roll: Floats):
        self.size, self.scale = size, who.radius * size
        self.cx, self.cy = who.centre[0] * size, who.centre[1] * size
        self.cos, self.sin = np.cos(roll), np.sin(roll)
        self.sway = float(np.abs(np.sin(roll)).max())
        fade = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
        wall = np.array(who.wall_top, np.float32) * (1 - fade) + np.array(who.wall_bottom, np.float32) * fade
        self.image = np.broadcast_to(wall, (frames, size, size, 3)).astype(np.float32)

    def fill(
        self,
        colour: Any,
        window: tuple[float, float, float, float],
        distance: Callable[..., Array],
        opacity: Any = 1.0,
    ) -> None:
        """Blend `colour` ([3], or of x and y) where `distance(x, y)` < 0, inside a window (x, y, half sizes)."""
        wx, wy, hx, hy = window
        hx, hy = hx + self.sway * (abs(wy) + hy), hy + self.sway * (abs(wx) + hx)
        x0, x1 = (int(np.clip(self.cx + self.scale * v, 0, self.size)) for v in (wx - hx, wx + hx))
        y0, y1 = (int(np.clip(self.cy + self.scale * v, 0, self.size)) for v in (wy - hy, wy + hy))
        px = (np.arange(x0, x1, dtype=np.float32) + 0.5 - self.cx)[None, None, :] / self.scale
        py = (np.arange(y0, y1, dtype=np.float32) + 0.5 - self.cy)[None, :, None] / self.scale
        x, y = self.cos * px + self.sin * py, self.cos * py - self.sin * px
        alpha = np.clip(0.5 - distance(x, y) * self.scale, 0, 1)[..., None]
        if not np.isscalar(opacity):
            alpha = alpha * opacity[..., None]
        patch = self.image[:, y0:y1, x0:x1]
        patch += alpha * ((colour(x, y) if callable(colour) else colour) - patch)

    def pixels(self) -> NDArray[np.uint8]:
        self.image += 0.5
        return np.clip(self.image, 0, 255, out=self.image).astype(np.uint8)
