"""Balls in a plain world, with captions and ground truth, after PhyWorld (arXiv:2411.02385).

The shorter side of the picture is 10 units; x points right, y down, from the top left corner.

    uniform     x(t) = x0 + v t                       v left, right, up or down
    parabola    x(t) = x0 + v t,  y(t) = y0 + g t²/2  thrown left or right
    collision   v₁' = ((m₁ - m₂) v₁ + 2 m₂ v₂) / (m₁ + m₂),  v₂' = v₁' + v₁ - v₂
                head-on along x, elastic, m = r²

Radii are drawn from [0.7, 1.4] units and speeds from [1, 4] units/s. There are no walls.
"""

# T frames, H height, W width, C channels; a trailing 2 is (x, y)

import dataclasses
import math
import os
import pathlib

import numpy as np

from vidsim import files, progress
from vidsim.data import video
from vidsim.errors import InputError

KINDS = ("uniform", "collision", "parabola")
SHORT_SIDE = 10.0  # units
RADII = (0.7, 1.4)  # units
SPEEDS = (1.0, 4.0)  # units/s
LARGE = 1.05  # units: a radius from here on is called large
FAST = 2.5  # units/s: a speed from here on is called fast
SEEN_FRAMES = 5  # every ball is whole in these, so that they can be given as a prompt
COLLISION_SHARE = 0.6  # a collision comes before this share of the clip has passed
BACKGROUND = (244, 244, 240)
COLORS = {
    "red": (208, 24, 48),
    "green": (32, 160, 64),
    "blue": (32, 84, 220),
    "yellow": (250, 212, 0),
    "purple": (140, 48, 192),
    "orange": (248, 124, 8),
}
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}


@dataclasses.dataclass(frozen=True)
class Config:
    clips: int
    formats: tuple[tuple[int, int, int, int], ...]  # (width, height, frames, fps), in turn
    kinds: tuple[str, ...] = KINDS  # in turn
    gravity: float = 9.8  # units/s²
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "formats", tuple(tuple(format_) for format_ in self.formats))
        object.__setattr__(self, "kinds", tuple(self.kinds))
        if self.clips < 1:
            raise InputError(f"clips={self.clips} must be positive; ask for at least 1")
        if self.seed < 0:
            raise InputError(f"seed={self.seed} must not be negative; use 0 or more")
        if not (math.isfinite(self.gravity) and self.gravity > 0):
            raise InputError(f"gravity={self.gravity} must be positive and finite, such as 9.8")
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise InputError(f"kinds={self.kinds} must be some of {KINDS}")
        if not self.formats:
            raise InputError("formats is empty; give at least one (width, height, frames, fps)")
        for format_ in self.formats:
            self._check_format(format_)

    def _check_format(self, format_: tuple[int, ...]) -> None:
        if len(format_) != 4 or any(not isinstance(n, int) for n in format_):
            raise InputError(f"format {format_} must be four integers: width, height, frames, fps")
        width, height, frames, fps = format_
        if min(width, height) < 16 or width % 2 or height % 2:
            raise InputError(f"format {format_}: width and height must be even and at least 16")
        if frames < 1 or fps < 1:
            raise InputError(f"format {format_}: frames and fps must be at least 1")
        seconds = (min(frames, SEEN_FRAMES) - 1) / fps
        way = max(SPEEDS[1] * seconds, self.gravity * seconds**2 / 2)
        if way + 2 * RADII[1] > SHORT_SIDE:
            raise InputError(
                f"format {format_}: a ball may go {way:.1f} units in the first {SEEN_FRAMES} "
                f"frames, out of a picture of {SHORT_SIDE:g}; raise fps or lower {self.gravity=}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Ball:
    color_name: str
    radius: float  # units
    positions_T2: np.ndarray  # units
    velocities_T2: np.ndarray  # units/s


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    kind: str
    width: int
    height: int
    frames: int
    fps: int
    balls: tuple[Ball, ...]  # the first is the one that moves in the caption

    @property
    def pixels_per_unit(self) -> float:
        return min(self.width, self.height) / SHORT_SIDE

    def truth(self, file: str) -> dict:
        """The row of `truth.jsonl` for this scene, stored as `file`."""
        return {
            "file": file,
            "kind": self.kind,
            "width": self.width,
            "height": self.height,
            "frames": self.frames,
            "fps": self.fps,
            "pixels_per_unit": self.pixels_per_unit,
            "background": list(BACKGROUND),
            "objects": [
                {
                    "color": list(COLORS[ball.color_name]),
                    "color_name": ball.color_name,
                    "radius": round(ball.radius, 6),
                    "positions": ball.positions_T2.round(6).tolist(),
                    "velocities": ball.velocities_T2.round(6).tolist(),
                }
                for ball in self.balls
            ],
        }


def simulate(config: Config, index: int) -> Scene:
    """The scene of clip `index`, a pure function of the seed and the index."""
    rng = np.random.default_rng([config.seed, index])
    width, height, frames, fps = config.formats[index % len(config.formats)]
    # Kinds change once all formats had their turn, so that every format sees every kind.
    kind = config.kinds[index // len(config.formats) % len(config.kinds)]
    size = np.array([width, height]) * SHORT_SIDE / min(width, height)
    times = np.arange(frames) / fps
    if frames == 1:
        motions = _still(rng, size, 2 if kind == "collision" else 1)
    elif kind == "collision":
        motions = _collision(rng, size, times)
    else:
        motions = [_single(rng, size, times, config.gravity if kind == "parabola" else 0.0)]
    names = rng.choice(list(COLORS), size=len(motions), replace=False)
    balls = tuple(Ball(str(name), *motion) for name, motion in zip(names, motions, strict=True))
    return Scene(kind, width, height, frames, fps, balls)


def _still(rng, size, count):
    """Balls at rest that do not touch."""
    while True:
        radii = rng.uniform(*RADII, size=count)
        centers = rng.uniform(radii[:, None], size - radii[:, None])
        if count == 1 or np.linalg.norm(centers[0] - centers[1]) > 1.1 * radii.sum():
            zeros = np.zeros((1, 2))
            return [(float(r), c[None], zeros) for r, c in zip(radii, centers, strict=True)]


def _single(rng, size, times, gravity):
    """One ball in uniform motion, or thrown sideways if there is gravity."""
    radius = rng.uniform(*RADII)
    directions = list(DIRECTIONS.values())[: 2 if gravity else 4]
    direction = np.array(directions[rng.integers(len(directions))])
    velocity = direction * rng.uniform(*SPEEDS)
    way = velocity * times[-1]
    low, high = radius - np.minimum(way, 0), size - radius - np.maximum(way, 0)
    if gravity:
        # It leaves through the bottom: start high, but not always at the top.
        fall = gravity * times[min(SEEN_FRAMES, len(times)) - 1] ** 2 / 2
        high[1] = max(radius, min(size[1] / 3, size[1] - radius - fall))
    start = low + rng.random(2) * (high - low)
    # A way longer than the picture starts at the edge that it leads away from.
    start = np.where(low <= high, start, np.where(direction < 0, size - radius, radius))
    acceleration = np.array([0.0, gravity])
    positions = start + times[:, None] * velocity + times[:, None] ** 2 / 2 * acceleration
    return float(radius), positions, velocity + times[:, None] * acceleration


def _collision(rng, size, times):
    """Two balls that meet head-on; the first comes from the left, or all is mirrored."""
    end = times[-1]
    earliest = min((SEEN_FRAMES - 0.75) * times[1], COLLISION_SHARE * end)
    r1, v1 = rng.uniform(*RADII), rng.uniform(*SPEEDS)
    best = None
    for _ in range(64):  # the second ball is drawn until both stay in the picture, or nearly so
        r2, v2 = rng.uniform(*RADII), -rng.uniform(*SPEEDS)
        latest = min(COLLISION_SHARE * end, (size[0] - 2 * (r1 + r2)) / (v1 - v2))
        meet = rng.uniform(min(earliest, latest), latest)
        m1, m2 = r1**2, r2**2
        u1 = ((m1 - m2) * v1 + 2 * m2 * v2) / (m1 + m2)
        u2 = u1 + v1 - v2  # an elastic collision reverses the relative velocity
        # Bounds of the point of contact, by which both balls are whole at the start and the end.
        start_low, start_high = 2 * r1 + v1 * meet, size[0] - 2 * r2 + v2 * meet
        low = max(start_low, 2 * r1 - u1 * (end - meet))
        high = min(start_high, size[0] - 2 * r2 - u2 * (end - meet))
        room = min(high - low, latest - earliest)
        if best is None or room > best[0]:
            contact = rng.uniform(low, high) if low < high else (low + high) / 2
            contact = min(max(contact, start_low), start_high)
            best = room, contact, meet, ((r1, -r1, v1, u1), (r2, r2, v2, u2))
        if room >= 0:
            break
    _, contact, meet, balls = best
    r_max = max(r1, balls[1][0])
    y = rng.uniform(r_max, size[1] - r_max)
    mirrored = rng.random() < 0.5
    motions = []
    for radius, offset, before, after in balls:
        velocity = np.where(times < meet, before, after)
        x = contact + offset + (times - meet) * velocity
        if mirrored:
            x, velocity = size[0] - x, -velocity
        positions = np.stack([x, np.full_like(x, y)], axis=-1)
        motions.append((float(radius), positions, np.stack([velocity, np.zeros_like(x)], axis=-1)))
    return motions


def render(scene: Scene) -> np.ndarray:
    """Frames at times k / fps, uint8 `[T, H, W, 3]`; a pixel mixes colours by the discs' cover."""
    video_THWC = np.empty((scene.frames, scene.height, scene.width, 3), np.float32)
    video_THWC[:] = BACKGROUND
    x_W, y_H = np.arange(scene.width) + 0.5, np.arange(scene.height) + 0.5
    for ball in scene.balls:
        center_T2 = ball.positions_T2 * scene.pixels_per_unit
        distance_THW = np.hypot(
            x_W - center_T2[:, None, None, 0], y_H[:, None] - center_T2[:, None, None, 1]
        )
        cover_THW = np.clip(ball.radius * scene.pixels_per_unit - distance_THW + 0.5, 0, 1)
        color = np.array(COLORS[ball.color_name], np.float32)
        video_THWC += cover_THW[..., None].astype(np.float32) * (color - video_THWC)
    return np.round(video_THWC).astype(np.uint8)


def caption(scene: Scene) -> str:
    """What happens, in words of the truth: size, colour, direction, speed, event."""
    names = [
        f"a {'large' if ball.radius >= LARGE else 'small'} {ball.color_name} ball"
        for ball in scene.balls
    ]
    if scene.frames == 1:
        return " and ".join(names)
    vx, vy = scene.balls[0].velocities_T2[0]
    direction = next(
        word for word, (x, y) in DIRECTIONS.items() if x * vx > 0 or (vx == 0 and y * vy > 0)
    )
    how = f"{direction} {'fast' if math.hypot(vx, vy) >= FAST else 'slow'}"
    if scene.kind == "parabola":
        return f"{names[0]} is thrown {how} and falls"
    if scene.kind == "collision":
        return f"{names[0]} moves {how} and hits {names[1]}"
    return f"{names[0]} moves {how}"


def write(config: Config, out: str | os.PathLike) -> dict:
    """Renders the world into the folder `out`; an interrupted one goes on where it stopped.

    Leaves `clip_*.mp4`, `image_*.png`, `captions.jsonl`, `truth.jsonl`, and last `world.json`.

    Returns:
        The counts `{"clips", "images"}`.

    Raises:
        InputError: `out` holds something else, or a world of another config.
    """
    out = pathlib.Path(out)
    world = {"world": "physics", **dataclasses.asdict(config)}
    world["formats"] = [list(format_) for format_ in config.formats]
    world["kinds"] = list(config.kinds)
    # Until the world is whole, its config stands in a hidden file.
    begun, done = out / ".world.json", out / "world.json"
    held = done if done.exists() else begun
    if held.exists():
        if files.read_json(held) != world:
            raise InputError(
                f"{out} holds a world of another config; delete it or choose another folder"
            )
    elif out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise InputError(f"{out} is not empty and holds no world; choose an empty folder")
    images = sum(config.formats[i % len(config.formats)][2] == 1 for i in range(config.clips))
    counts = {"clips": config.clips - images, "images": images}
    if held == done:
        return counts

    files.write_json(begun, world)
    captions, truths = [], []
    for index in progress.bar(range(config.clips), desc="worlds", unit="clip"):
        scene = simulate(config, index)
        path = out / (f"image_{index:05d}.png" if scene.frames == 1 else f"clip_{index:05d}.mp4")
        if not path.exists():
            video_THWC = render(scene)
            if scene.frames == 1:
                video.write_image(path, video_THWC[0])
            else:
                video.write_video(path, video_THWC, scene.fps)
        captions.append({"file": path.name, "caption": caption(scene)})
        truths.append(scene.truth(path.name))
    files.write_jsonl(out / "captions.jsonl", captions)
    files.write_jsonl(out / "truth.jsonl", truths)
    os.replace(begun, done)
    return counts
