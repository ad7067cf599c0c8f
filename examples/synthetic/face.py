"""Drawn faces whose brows, eyes, mouth and colour show an emotion.

A face is drawn with Pillow, twice too large, and scaled down, which smooths its edges. Lengths
are in half heights of the head, with the origin at its centre, x to the right and y downwards.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from examples.synthetic.acting import Delivery

WIDTH, HEIGHT = 128, 96
"""Size of a frame in pixels. It is not square, as no film is, so that cropping matters."""

FRAME_RATE = 12.5
"""Frames per second."""

OVERSAMPLING = 2

Colour: TypeAlias = tuple[int, int, int]
Points: TypeAlias = npt.NDArray[np.float64]
Frame: TypeAlias = npt.NDArray[np.uint8]

SIMILAR = {
    "neutral": ("sadness", "joy"),
    "anger": ("disgust", "frustration"),
    "disgust": ("anger", "sadness"),
    "fear": ("surprise", "sadness"),
    "joy": ("excitement", "surprise"),
    "sadness": ("neutral", "fear"),
    "surprise": ("fear", "joy"),
    "excitement": ("joy", "surprise"),
    "frustration": ("anger", "sadness"),
}
"""What a face may be taken for."""


@dataclass(frozen=True)
class Expression:
    """The pose of a face, as offsets from a face at rest.

    Attributes:
        brow_raise: Height of the brows; positive is up.
        brow_slant: How far the inner ends stand below the outer ones.
        brow_pinch: How far the brows move together.
        eye_open: Added to the opening of the eyes, 1 at rest.
        gaze: Where the pupils look, -1 (up) to 1 (down).
        mouth_curve: Height of the corners of the mouth; positive is a smile.
        mouth_open: Opening of the mouth between two syllables.
        mouth_width: Added to the width of the mouth.
        mouth_skew: How far one corner stands above the other.
        teeth: Visible teeth, 0 to 1.
        flush: Redness of the skin, 0 to 1; negative is pale.
        green: Greenness of the skin, 0 to 1.
        drop: How far the head sinks.
        tilt: Inclination of the head in radians.
        bounce: Amplitude of slow movements of the head.
        tremble: Amplitude of quick ones.
        tear: Size of a tear, 0 to 1.
    """

    brow_raise: float = 0.0
    brow_slant: float = 0.0
    brow_pinch: float = 0.0
    eye_open: float = 0.0
    gaze: float = 0.0
    mouth_curve: float = 0.0
    mouth_open: float = 0.0
    mouth_width: float = 0.0
    mouth_skew: float = 0.0
    teeth: float = 0.0
    flush: float = 0.0
    green: float = 0.0
    drop: float = 0.0
    tilt: float = 0.0
    bounce: float = 0.015
    tremble: float = 0.0
    tear: float = 0.0

    def softened(self, intensity: float) -> "Expression":
        """Move towards a face at rest; intensity 1 changes nothing, 0 leaves none of it."""
        rest = Expression()
        return Expression(
            *(
                getattr(rest, field.name)
                + intensity * (getattr(self, field.name) - getattr(rest, field.name))
                for field in fields(self)
            )
        )


EXPRESSIONS = {
    "neutral": Expression(),
    "anger": Expression(
        brow_raise=-0.11, brow_slant=0.17, brow_pinch=0.07, eye_open=-0.25, mouth_curve=-0.09,
        mouth_open=0.08, mouth_width=0.03, teeth=1.0, flush=0.85, drop=0.06, tremble=0.012,
    ),
    "disgust": Expression(
        brow_raise=-0.06, brow_slant=0.05, brow_pinch=0.05, eye_open=-0.55, gaze=0.5,
        mouth_curve=-0.12, mouth_width=-0.07, mouth_skew=0.12, green=0.9, tilt=0.16,
    ),
    "fear": Expression(
        brow_raise=0.12, brow_slant=-0.14, brow_pinch=0.06, eye_open=0.45, mouth_curve=-0.08,
        mouth_open=0.10, mouth_width=0.10, teeth=0.6, flush=-0.9, tremble=0.03,
    ),
    "joy": Expression(
        brow_raise=0.05, eye_open=-0.3, mouth_curve=0.17, mouth_open=0.09, mouth_width=0.10,
        teeth=1.0, flush=0.25, drop=-0.03, tilt=-0.06, bounce=0.05,
    ),
    "sadness": Expression(
        brow_raise=0.03, brow_slant=-0.20, brow_pinch=0.06, eye_open=-0.45, gaze=0.9,
        mouth_curve=-0.15, mouth_width=-0.05, flush=-0.3, drop=0.17, tilt=0.10, tear=1.0,
    ),
    "surprise": Expression(
        brow_raise=0.22, eye_open=0.6, gaze=-0.2, mouth_open=0.30, mouth_width=-0.14, drop=-0.09,
    ),
    "excitement": Expression(
        brow_raise=0.17, eye_open=0.3, mouth_curve=0.15, mouth_open=0.20, mouth_width=0.07,
        teeth=1.0, flush=0.4, drop=-0.08, bounce=0.08,
    ),
    "frustration": Expression(
        brow_raise=-0.08, brow_slant=0.10, brow_pinch=0.06, eye_open=-0.6, gaze=0.3,
        mouth_curve=-0.10, mouth_width=0.08, mouth_skew=-0.06, flush=0.45, drop=0.09, tilt=-0.14,
    ),
}  # fmt: skip
"""The face of every emotion at full intensity."""

SKIN = ((255, 219, 188), (241, 194, 156), (224, 172, 128), (190, 134, 94), (141, 92, 62))
HAIR = ((46, 34, 30), (92, 58, 36), (150, 96, 48), (208, 168, 96), (120, 118, 120), (140, 58, 34))
IRIS = ((86, 58, 38), (60, 108, 150), (74, 120, 84), (96, 96, 104))
CLOTHES = (
    (60, 92, 140),
    (150, 70, 70),
    (76, 120, 96),
    (120, 92, 140),
    (200, 160, 80),
    (70, 74, 86),
)
WALLS = ((206, 214, 220), (222, 210, 192), (196, 210, 200), (214, 204, 216), (190, 200, 214))
RED, GREEN, PALE, WHITE = (226, 66, 52), (142, 176, 84), (236, 236, 238), (250, 250, 248)


@dataclass(frozen=True)
class Looks:
    """What tells one person from another, whatever the expression.

    Attributes:
        skin: Colour of the skin.
        hair: Colour of the hair and the brows.
        iris: Colour of the eyes.
        clothes: Colour of the clothes.
        breadth: Breadth of the head relative to its height.
        brow_weight: Thickness of the brows.
        long_hair: Whether the hair covers the ears.
        fringe: How far the hair covers the forehead, 0 to 1.
        glasses: Whether the person wears glasses.
    """

    skin: Colour
    hair: Colour
    iris: Colour
    clothes: Colour
    breadth: float
    brow_weight: float
    long_hair: bool
    fringe: float
    glasses: bool

    @classmethod
    def draw(cls, random: np.random.Generator) -> "Looks":
        """Draw a person."""
        return cls(
            skin=SKIN[random.integers(len(SKIN))],
            hair=HAIR[random.integers(len(HAIR))],
            iris=IRIS[random.integers(len(IRIS))],
            clothes=CLOTHES[random.integers(len(CLOTHES))],
            breadth=float(random.uniform(0.74, 0.86)),
            brow_weight=float(random.uniform(0.055, 0.085)),
            long_hair=bool(random.uniform() < 0.5),
            fringe=float(random.uniform(0.0, 1.0)),
            glasses=bool(random.uniform() < 0.2),
        )


def film(
    looks: Looks,
    delivery: Delivery,
    loudness: npt.NDArray[np.float64],
    room: np.random.Generator,
    random: np.random.Generator,
) -> Iterator[Frame]:
    """Film a person while they speak.

    Args:
        looks: The person.
        delivery: The emotion that the face shows.
        loudness: (frames,), in [0, 1]: how loud the voice is at each frame; it opens the mouth.
        room: Draws the room; two generators in one state draw one room.
        random: Draws where the person stands, how they move and when they blink.

    Yields:
        One (:data:`HEIGHT`, :data:`WIDTH`, 3) RGB frame for each value of ``loudness``.
    """
    expression = EXPRESSIONS[delivery.emotion].softened(delivery.intensity)
    background = _room(room)
    centre = np.array([random.normal(0.5, 0.01) * WIDTH, random.normal(0.47, 0.01) * HEIGHT])
    radius = random.uniform(0.37, 0.40) * HEIGHT
    lean = random.normal(0.0, 0.03)
    light = random.uniform(0.92, 1.06)
    phase = random.uniform(0.0, 2 * np.pi, size=2)
    blink = random.integers(0, round(3 * FRAME_RATE))
    for index, loud in enumerate(loudness):
        seconds = index / FRAME_RATE
        sway = expression.bounce * np.sin(2 * np.pi * 1.4 * seconds + phase)
        shake = expression.tremble * random.standard_normal(2)
        image = background.copy()
        _Portrait(
            canvas=ImageDraw.Draw(image),
            looks=looks,
            expression=expression,
            centre=(centre + radius * (sway + shake + (0.0, expression.drop))) * OVERSAMPLING,
            radius=radius * OVERSAMPLING,
            tilt=lean + expression.tilt + 0.5 * sway[0],
            eyes_shut=index == blink,
            mouth_open=expression.mouth_open + 0.13 * float(loud),
        ).draw()
        pixels = np.asarray(image.reduce(OVERSAMPLING), dtype=np.float64)
        grain = random.normal(0.0, 2.0, size=(HEIGHT, WIDTH, 1))
        yield np.clip(light * pixels + grain, 0, 255).astype(np.uint8)


def _room(random: np.random.Generator) -> Image.Image:
    width, height = WIDTH * OVERSAMPLING, HEIGHT * OVERSAMPLING
    wall = WALLS[random.integers(len(WALLS))]
    image = Image.new("RGB", (width, height), wall)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, 0.78 * height, width, height), fill=_mix(wall, (90, 76, 66), 0.45))
    left = random.uniform(-0.05, 0.12) if random.uniform() < 0.5 else random.uniform(0.72, 0.88)
    top = random.uniform(0.08, 0.25)
    frame = (left * width, top * height, (left + 0.17) * width, (top + 0.3) * height)
    picture = CLOTHES[random.integers(len(CLOTHES))]
    canvas.rectangle(
        frame, fill=_mix(picture, wall, 0.55), outline=_mix(wall, (60, 50, 44), 0.5), width=3
    )
    return image


def _mix(colour: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(colour, other, strict=True))
    return red, green, blue


_ARC = np.linspace(0.0, 1.0, 28)


def _ellipse(
    x: float, y: float, across: float, down: float, start: float = 0.0, stop: float = 2 * np.pi
) -> Points:
    angle = start + (stop - start) * _ARC
    return np.array([x + across * np.cos(angle), y + down * np.sin(angle)]).T


@dataclass(frozen=True)
class _Portrait:
    """One frame of one person, oversampled; ``centre`` and ``radius`` are in its pixels."""

    canvas: ImageDraw.ImageDraw
    looks: Looks
    expression: Expression
    centre: Points
    radius: float
    tilt: float
    eyes_shut: bool
    mouth_open: float

    def draw(self) -> None:
        skin = self._skin()
        shade = _mix(skin, (70, 30, 20), 0.22)
        self._body(shade)
        self._head(skin, shade)
        for side in (-1.0, 1.0):
            self._eye(side, skin)
            self._brow(side)
        self._nose(shade)
        self._mouth(skin)
        self._tear()

    def _skin(self) -> Colour:
        expression, skin = self.expression, self.looks.skin
        skin = _mix(skin, RED, 0.25 * max(expression.flush, 0.0))
        skin = _mix(skin, PALE, 0.40 * max(-expression.flush, 0.0))
        return _mix(skin, GREEN, 0.35 * expression.green)

    def _body(self, neck: Colour) -> None:
        breadth = self.looks.breadth
        shoulders = np.array([(-1.75, 2.6), (-1.55, 1.55), (-0.45, 1.22), (0.45, 1.22)])
        shoulders = np.concatenate([shoulders, [(1.55, 1.55), (1.75, 2.6)]])
        upright = self._upright
        if self.looks.long_hair:
            self._fill(_ellipse(0, 0.1, breadth + 0.2, 1.2), _mix(self.looks.hair, (0, 0, 0), 0.2))
        self.canvas.polygon(upright(shoulders), fill=self.looks.clothes)
        self.canvas.polygon(upright(_ellipse(0, 1.22, 0.46, 0.22)), fill=neck)
        throat = np.array([(-0.34, 0.6), (0.34, 0.6), (0.36, 1.28), (-0.36, 1.28)])
        self.canvas.polygon(upright(throat), fill=neck)

    def _head(self, skin: Colour, shade: Colour) -> None:
        looks = self.looks
        breadth = looks.breadth
        for side in (-1.0, 1.0):
            self._fill(_ellipse(side * breadth, 0.08, 0.12, 0.2), shade)
        self._fill(_ellipse(0, 0, breadth, 1.0), shade)
        self._fill(_ellipse(-0.03, -0.02, breadth - 0.045, 0.965), skin)
        if self.expression.flush > 0:
            cheek = _mix(skin, RED, 0.35 * self.expression.flush)
            for side in (-1.0, 1.0):
                self._fill(_ellipse(side * 0.47, 0.28, 0.17, 0.12), cheek)
        hairline = _ellipse(0, -0.12, breadth + 0.06, 0.95, np.pi, 2 * np.pi)
        parting = 0.16 * looks.fringe
        forehead = np.array([(0.99, -0.1), (0.86, -0.42), (0.45, -0.68), (0.0, -0.72)])
        forehead = forehead * (breadth, 1.0) + np.outer((0.0, 0.5, 1.0, 1.0), (0.0, parting))
        mirrored = forehead[-2::-1] * (-1.0, 1.0)
        self._fill(np.concatenate([hairline, forehead, mirrored]), looks.hair)

    def _eye(self, side: float, skin: Colour) -> None:
        x, y, across = side * 0.34, -0.06, 0.17
        down = 0.115 * max(1.0 + self.expression.eye_open, 0.08)
        ink = (52, 36, 32)
        if self.eyes_shut:
            self._stroke(_ellipse(x, y - 0.02, across, 0.06, 0.0, np.pi), ink, 0.045)
            return
        self._fill(_ellipse(x, y, across, down), WHITE)
        iris = min(0.098, down * 1.05)
        gaze = y + self.expression.gaze * 0.045
        self._fill(_ellipse(x, gaze, iris, iris), self.looks.iris)
        self._fill(_ellipse(x, gaze, 0.55 * iris, 0.55 * iris), (20, 16, 16))
        self._fill(_ellipse(x + 0.03, gaze - 0.03, 0.022, 0.022), WHITE)
        self._stroke(_ellipse(x, y, across, down, np.pi, 2 * np.pi), ink, 0.045)
        self._stroke(_ellipse(x, y, across, down, 0.0, np.pi), _mix(skin, ink, 0.45), 0.02)
        if self.looks.glasses:
            rim = (40, 40, 46)
            self._stroke(_ellipse(x, y + 0.02, 0.26, 0.24), rim, 0.035)
            self._stroke(np.array([(side * 0.085, y), (0.0, y - 0.02)]), rim, 0.035)

    def _brow(self, side: float) -> None:
        expression = self.expression
        inner = 0.16 - expression.brow_pinch
        height = -0.32 - expression.brow_raise
        slant = expression.brow_slant
        along = np.linspace(0.0, 1.0, 9)
        x = side * (inner + along * 0.38)
        y = height + slant * (0.6 - along) - 0.05 * np.sin(np.pi * along)
        brow = _mix(self.looks.hair, (30, 22, 20), 0.35)
        self._stroke(np.stack([x, y], axis=1), brow, self.looks.brow_weight)

    def _nose(self, shade: Colour) -> None:
        wrinkle = 0.05 * self.expression.green
        line = np.array([(0.02, 0.02), (0.1, 0.27 - wrinkle), (0.0, 0.32 - wrinkle)])
        self._stroke(line, _mix(shade, (70, 30, 20), 0.2), 0.035)

    def _mouth(self, skin: Colour) -> None:
        expression = self.expression
        half = 0.28 + expression.mouth_width
        across = np.linspace(-1.0, 1.0, 21)
        bow = 1.0 - across**2
        corners = 0.56 + expression.mouth_skew * across * 0.5
        middle = corners + expression.mouth_curve * (bow - 0.5)
        opening = max(self.mouth_open, 0.0)
        upper = np.stack([across * half, middle - 0.35 * opening * bow], axis=1)
        lower = np.stack([across * half, middle + 0.65 * opening * bow], axis=1)
        lips = _mix(_mix(skin, (186, 52, 60), 0.55), (90, 20, 24), 0.15)
        if opening > 0.03:
            self._fill(np.concatenate([upper, lower[::-1]]), (92, 26, 32))
            if expression.teeth > 0.2:
                edge = upper + np.stack([0 * bow, 0.3 * opening * expression.teeth * bow], axis=1)
                self._fill(np.concatenate([upper, edge[::-1]]), WHITE)
        self._stroke(upper, lips, 0.055)
        self._stroke(lower, lips, 0.07)

    def _tear(self) -> None:
        size = self.expression.tear
        if size > 0.5:
            drop = _ellipse(-0.4, 0.24, 0.05 * size, 0.09 * size)
            self._fill(drop, (150, 200, 236))

    def _upright(self, points: Points) -> list[tuple[float, float]]:
        placed = self.centre + self.radius * points
        return [(x, y) for x, y in placed.tolist()]

    def _tilted(self, points: Points) -> list[tuple[float, float]]:
        cosine, sine = np.cos(self.tilt), np.sin(self.tilt)
        return self._upright(points @ np.array([[cosine, sine], [-sine, cosine]]))

    def _fill(self, points: Points, colour: Colour) -> None:
        self.canvas.polygon(self._tilted(points), fill=colour)

    def _stroke(self, points: Points, colour: Colour, weight: float) -> None:
        width = max(round(weight * self.radius), 1)
        line = self._tilted(points)
        self.canvas.line(line, fill=colour, width=width, joint="curve")
        half = width / 2
        for x, y in (line[0], line[-1]):
            self.canvas.ellipse((x - half, y - half, x + half, y + half), fill=colour)
