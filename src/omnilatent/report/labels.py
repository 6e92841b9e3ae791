"""Where the labels of a scatter plot go, so that none covers another or a point.

- `place_labels`: points and label sizes → places inside a frame, or None where they do not all fit.
- `shorten`: a long name with its middle left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]
GAP = 3.0  # pixels kept free around every label
MARKER = 7.0  # radius kept free around every point
RADII = (9, 14, 20, 28, 38, 50, 64, 80, 100, 124, 150)
# Right and left first, since a label reads best on the line of its point; then above, below, diagonals.
ANGLES = (0, 180, 90, 270, 45, 135, 315, 225, 20, 160, 340, 200, 70, 110, 290, 250)


@dataclass(frozen=True)
class Place:
    """A label's box by its centre, in pixels."""

    centre: Point
    width: float
    height: float

    def nearest(self, point: Point) -> Point:
        """The point of the box that lies nearest to `point`."""
        (x, y), half_w, half_h = self.centre, self.width / 2, self.height / 2
        return min(max(point[0], x - half_w), x + half_w), min(max(point[1], y - half_h), y + half_h)

    def overlaps(self, other: Place, gap: float = 0.0) -> bool:
        return (abs(self.centre[0] - other.centre[0]) * 2 < self.width + other.width + 2 * gap
                and abs(self.centre[1] - other.centre[1]) * 2 < self.height + other.height + 2 * gap)

    def inside(self, frame: tuple[float, float, float, float]) -> bool:
        (x, y), half_w, half_h = self.centre, self.width / 2, self.height / 2
        return x - half_w >= frame[0] and y - half_h >= frame[1] and x + half_w <= frame[2] and y + half_h <= frame[3]


def place_labels(
    anchors: Sequence[Point], sizes: Sequence[tuple[float, float]], frame: tuple[float, float, float, float]
) -> list[Place] | None:
    """Find a place for each label, close to its point.

    Args:
        anchors: the points, in pixels.
        sizes: width and height of each label.
        frame: left, bottom, right, top, which no label leaves.

    Returns:
        One `Place` a point, no two of which overlap and none of which covers a point; None where the greedy
        search, crowded points first, finds no room for one of them.
    """
    crowding = [sum(math.dist(a, b) < 90 for b in anchors) for a in anchors]
    order = sorted(range(len(anchors)), key=lambda i: (-crowding[i], -sizes[i][0], i))
    taken: dict[int, Place] = {}
    for i in order:
        place = next((p for p in _candidates(anchors[i], sizes[i]) if _free(p, anchors, taken, frame)), None)
        if place is None:
            return None
        taken[i] = place
    return [taken[i] for i in range(len(anchors))]


def _candidates(anchor: Point, size: tuple[float, float]) -> list[Place]:
    places = []
    for radius in RADII:
        for angle in ANGLES:
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            # The box lies outside the circle: up to half its extent is added along the direction.
            x = anchor[0] + dx * radius + size[0] / 2 * max(-1, min(1, 2 * dx))
            y = anchor[1] + dy * radius + size[1] / 2 * max(-1, min(1, 2 * dy))
            places.append(Place((x, y), *size))
    return places


def _free(place: Place, anchors: Sequence[Point], taken: dict[int, Place], frame: tuple[float, ...]) -> bool:
    if not place.inside(frame):
        return False
    if any(math.dist(point, place.nearest(point)) < MARKER for point in anchors):
        return False
    return not any(place.overlaps(other, GAP) for other in taken.values())


def shorten(text: str, limit: int) -> str:
    """`text`, or its beginning and end around an ellipsis where it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    head = limit // 2
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head):]}"
