"""Synthetic street scenes: `python tests/draw_demo.py` writes those of images/demo; the tests draw their own.

A scene is drawn twice through one pinhole camera, as photo and as colour-coded label, so its truth is known.
"""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts lie flat in the repository's root

from dataset import CLASSES  # noqa: E402

LABEL_COLORS = {name: color for entry in CLASSES
                for name, color in {entry.name: entry.color, **entry.further}.items()}
DEMO_SPLITS = {"train": 40, "val": 8}  # 48 composites of 256x512 take less than 2 MB
EYE = 1.7  # metres that the camera stands high
FOCAL = 0.9  # widths of the picture that its focal length is long
HORIZON = 0.45  # heights of the picture, from its top
SIDEWALK = 3.5  # metres wide
WALLS = ((205, 185, 150), (195, 155, 125), (170, 168, 172))  # of buildings
# Width, height and length in metres, and colours: a short training tells the kinds apart if each has its own.
VEHICLES = {
    "car": (1.8, 1.5, 4.2, ((190, 35, 35), (130, 25, 40), (225, 225, 230))),
    "truck": (2.5, 3.5, 8, ((35, 70, 160), (45, 90, 190))),
    "bus": (2.6, 3.1, 11, ((225, 175, 40), (235, 190, 60))),
    "train": (2.7, 3.6, 20, ((40, 125, 85), (50, 145, 100))),
    "caravan": (2.2, 2.5, 5, ((240, 235, 220),)),
    "trailer": (2.0, 1.4, 3, ((110, 100, 95),)),
}


class Scene:
    """The two pictures of a street. Points (x, y, z) are metres right of the camera, above ground and ahead.

    Args:
        seed: the same seed gives the same scene.
        size: side of both pictures in pixels.
    """

    def __init__(self, seed: int, size: int) -> None:
        self.size, self.rng = size, np.random.default_rng(seed)
        self.photo = Image.new("RGB", (size, size))
        self.label = Image.new("RGB", (size, size), LABEL_COLORS["sky"])
        self.photo_pen, self.label_pen = ImageDraw.Draw(self.photo), ImageDraw.Draw(self.label)
        self.light = self.rng.uniform(0.8, 1.1)

    def pick(self, colors) -> np.ndarray:
        """One of these colours, made a little lighter or darker, float64 (3,)."""
        return np.array(colors[self.rng.integers(len(colors))]) * self.rng.uniform(0.9, 1.1)

    def paint(self, shape: str, name: str, color, points, width: float = 0) -> None:
        """A polygon, line or ellipse on both pictures.

        Args:
            shape: the method of ImageDraw; an ellipse fills the box between its two points.
            name: the class or kind of void whose colour the label gets.
            color: what the photo gets, RGB.
            points: (n, 3), each (x, y, z).
            width: of a line, in metres.
        """
        x, y, z = np.array(points, dtype=float).T
        scale = FOCAL * self.size / np.maximum(z, 1)  # pixels a metre
        columns, rows = 0.5 * self.size + x * scale, HORIZON * self.size - (y - EYE) * scale
        dots = np.stack([columns, rows], axis=1)  # (n, 2)
        if shape == "ellipse":
            dots.sort(axis=0)
        clearness = np.exp(-z.min() / 150)  # far things fade into the haze
        seen = self.light * (np.array(color) * clearness + np.array((200, 212, 224)) * (1 - clearness))
        options = {"width": max(round(width * scale.mean()), self.size // 200)} if shape == "line" else {}
        seen = tuple(seen.clip(0, 255).astype(int).tolist())
        for pen, fill in ((self.photo_pen, seen), (self.label_pen, LABEL_COLORS[name])):
            getattr(pen, shape)([tuple(dot) for dot in dots.tolist()], fill=fill, **options)

    def rectangle(self, name: str, color, x, y, z: float) -> None:
        """Upright and facing the camera, from (x[0], y[0]) to (x[1], y[1])."""
        corners = [(x[0], y[0], z), (x[1], y[0], z), (x[1], y[1], z), (x[0], y[1], z)]
        self.paint("polygon", name, color, corners)

    def side_wall(self, name: str, color, x: float, y, z) -> None:
        """Upright and along the street at x, from (y[0], z[0]) to (y[1], z[1])."""
        corners = [(x, y[0], z[0]), (x, y[0], z[1]), (x, y[1], z[1]), (x, y[1], z[0])]
        self.paint("polygon", name, color, corners)

    def disc(self, name: str, color, center, radius) -> None:
        """Upright and facing the camera; the centre is (x, y, z), the radius (across, up)."""
        reach = np.array([*radius, 0])
        self.paint("ellipse", name, color, [center - reach, center + reach])

    def ground(self, name: str, color, x, z) -> None:
        """Flat on the ground, from (x[0], z[0]) to (x[1], z[1])."""
        corners = [(x[0], 0, z[0]), (x[1], 0, z[0]), (x[1], 0, z[1]), (x[0], 0, z[1])]
        self.paint("polygon", name, color, corners)

    # The things of a street. Each stands at x, z; `side` is -1 left and 1 right of the road.

    def building(self, side: int, x: float, near: float, far: float) -> None:
        color, height, depth = self.pick(WALLS), self.rng.uniform(8, 18), 12 * side
        self.rectangle("building", color * 0.8, (x, x + depth), (0, height), near)
        self.side_wall("building", color, x, (0, height), (near, far))
        for y in np.arange(1.5, height - 2, 3):
            for start in np.arange(0.1, 0.9, 0.2):
                window = start + np.array((0, 0.1))  # from here to there, in widths of the wall
                self.rectangle("building", (70, 85, 105), x + depth * window, (y, y + 1.6), near)
                self.side_wall("building", (70, 85, 105), x, (y, y + 1.6), near + (far - near) * window)

    def barrier(self, name: str, x: float, near: float, far: float) -> None:
        color, y, n_posts = {
            "wall": ((125, 62, 55), (0, 2.2), 5),
            "fence": ((150, 105, 55), (0, 1.7), 24),
            "guard rail": ((190, 195, 200), (0.45, 0.8), 9),
        }[name]
        self.side_wall(name, color, x, y, (near, far))
        for z in np.linspace(near, far, n_posts):
            self.paint("line", name, np.array(color) * 0.6, [(x, 0, z), (x, y[1], z)], width=0.07)

    def bridge(self, z: float) -> None:
        self.rectangle("bridge", (150, 145, 140), (-60, 60), (6, 8), z)
        for x in (-9, 8):
            self.rectangle("bridge", (125, 120, 115), (x, x + 1.5), (0, 6), z)

    def tunnel(self, z: float) -> None:
        self.rectangle("tunnel", (120, 115, 105), (-14, 14), (0, 10), z)
        self.rectangle("tunnel", (35, 35, 40), (-9, 9), (0, 7), z)

    def tree(self, x: float, z: float) -> None:
        self.paint("line", "vegetation", (85, 65, 45), [(x, 0, z), (x, 3, z)], width=0.35)
        leaves = self.rng.uniform((-1.3, 3, 0.7, 0.75), (1.3, 5.5, 1.4, 1.1), (14, 4))
        for across, up, radius, shade in leaves:
            self.disc("vegetation", np.array((60, 115, 40)) * shade, (x + across, up, z), (radius, radius))

    def vehicle(self, name: str, x: float, z: float) -> None:
        """Seen from behind; what lies left of the camera shows its right side too."""
        width, height, length, paints = VEHICLES[name]
        color, left, right = self.pick(paints), x - width / 2, x + width / 2
        shoulder = 0.62 * height if name == "car" else height
        inner, inward = (right, -0.25) if x < 0 else (left, 0.25)
        self.side_wall(name, color * 0.7, inner, (0.25, shoulder), (z, z + length))
        for wheel_z in (z + 0.2 * length, z + 0.8 * length):
            self.side_wall(name, (25, 25, 28), inner, (0, 0.6), (wheel_z, wheel_z + 0.7))
        for wheel_x in (left + 0.25, right - 0.25):
            self.disc(name, (25, 25, 28), (wheel_x, 0.3, z), (0.2, 0.3))
        if name == "car":
            top, low, high = inner + inward, shoulder, height
            windows = [(inner, low, z), (inner, low, z + 3), (top, high, z + 2.2), (top, high, z)]
            self.paint("polygon", name, (60, 70, 85), windows)
            cabin = [(left, low, z), (right, low, z), (right - 0.25, high, z), (left + 0.25, high, z)]
            self.paint("polygon", name, color * 0.9, cabin)
        self.rectangle(name, color, (left, right), (0.25, shoulder), z)
        self.rear(name, (left, right), height, z)

    def rear(self, name: str, x, height: float, z: float) -> None:
        """The back of a vehicle between x[0] and x[1]: its window or doors, lamps and plate."""
        middle = (x[0] + x[1]) / 2
        if name in ("truck", "trailer"):  # a box has doors and no window
            self.rectangle(name, (225, 225, 225), (x[0], x[1]), (height - 0.25, height), z)
            self.paint("line", name, (40, 40, 50), [(middle, 0.4, z), (middle, height - 0.3, z)], width=0.06)
        else:
            glass = (0.62, 0.93) if name == "car" else (0.5, 0.88)
            self.rectangle(name, (50, 60, 75), (x[0] + 0.3, x[1] - 0.3), np.multiply(glass, height), z)
        for lamp in (x[0] + 0.05, x[1] - 0.35):
            self.rectangle(name, (235, 30, 30), (lamp, lamp + 0.3), (0.6, 0.8), z)
        self.rectangle(name, (235, 235, 220), (middle - 0.3, middle + 0.3), (0.4, 0.55), z)

    def person(self, name: str, x: float, z: float, y: float = 0) -> None:
        """On foot, or with feet at height y on what is ridden; riders wear a bright vest and a helmet."""
        rides = name == "rider"
        shirt = self.pick(((200, 230, 40),) if rides else ((150, 50, 170), (205, 60, 190)))
        for step in (-0.15, 0.15):
            leg = [(x + step, y, z), (x, y + 0.9, z)]
            arm = [(x + 1.5 * step, y + 1.35, z), (x + 2 * step, y + 0.85, z)]
            self.paint("line", name, (45, 45, 75), leg, width=0.18)
            self.paint("line", name, shirt * 0.85, arm, width=0.13)
        self.disc(name, shirt, (x, y + 1.15, z), (0.27, 0.4))
        self.disc(name, (215, 165, 135), (x, y + 1.65, z), (0.14, 0.18))
        if rides:
            self.disc(name, (250, 250, 240), (x, y + 1.75, z), (0.16, 0.1))

    def cycle(self, name: str, x: float, z: float, ridden: bool) -> None:
        if name == "motorcycle":
            color, spokes, rim, thickness = self.pick(((235, 110, 20),)), (80, 80, 84), 0.2, 0.34
        else:
            color, spokes, rim, thickness = self.pick(((40, 150, 190),)), (165, 165, 170), 0.29, 0.12
        for hub in (x - 0.5, x + 0.5):
            self.disc(name, (28, 28, 30), (hub, 0.35, z), (0.36, 0.36))
            self.disc(name, spokes, (hub, 0.35, z), (rim, rim))
        for x0, y0, x1, y1 in ((-0.5, 0.35, -0.15, 0.9), (0.5, 0.35, 0.35, 1.05), (-0.15, 0.85, 0.4, 0.85),
                               (-0.2, 0.4, 0.4, 0.8)):  # the frame
            self.paint("line", name, color, [(x + x0, y0, z), (x + x1, y1, z)], thickness)
        if ridden:
            self.person("rider", x - 0.05, z, y=0.45)

    def pole(self, x: float, z: float, top: str) -> None:
        """A street lamp, traffic light or traffic sign with its pole."""
        height, grey = (5.5 if top == "lamp" else 3), (120, 122, 125)
        self.paint("line", "pole", grey, [(x, 0, z), (x, height, z)], width=0.13)
        if top == "lamp":
            arm = [(x, height, z), (x - np.sign(x) * 1.4, height + 0.1, z)]
            self.paint("line", "pole", grey, arm, width=0.13)
        elif top == "traffic light":
            self.rectangle(top, (25, 28, 26), (x - 0.28, x + 0.28), (2.3, 3.7), z)
            lit = self.rng.integers(3)
            for i, color in enumerate(((60, 220, 90), (250, 180, 40), (235, 40, 40))):
                glow = np.array(color) * (1 if i == lit else 0.4)
                self.disc(top, glow, (x, 2.56 + 0.44 * i, z), (0.18, 0.18))
        else:
            prohibition, mandatory = ((215, 25, 35), (245, 245, 240)), ((240, 240, 240), (20, 80, 200))
            rim, face = (prohibition, mandatory)[self.rng.integers(2)]
            self.disc(top, rim, (x, 3, z), (0.6, 0.6))
            self.disc(top, face, (x, 3, z), (0.42, 0.42))

    def bin(self, x: float, z: float) -> None:
        """A waste bin: it is moved now and then, so it counts as dynamic."""
        self.rectangle("dynamic", (85, 60, 50), (x - 0.3, x + 0.3), (0, 0.9), z)
        self.disc("dynamic", (60, 42, 35), (x, 0.9, z), (0.36, 0.12))


def paint_ground(scene: Scene, seed: int, left: float, right: float) -> None:
    """The sky and all that is flat: terrain, sidewalks, the road from left to right and one kind of void."""
    horizon = int(HORIZON * scene.size)
    sky = np.linspace((90, 140, 210), (215, 225, 235), horizon) * scene.light  # (rows, 3), from above down
    scene.photo.paste(Image.fromarray(sky.clip(0, 255).astype(np.uint8)[:, None].repeat(scene.size, axis=1)))
    scene.ground("terrain", scene.pick(((150, 180, 70),)), (-300, 300), (1, 400))
    scene.ground("sidewalk", scene.pick(((205, 170, 150),)), (left - SIDEWALK, right + SIDEWALK), (1, 400))
    scene.ground("road", scene.pick(((92, 92, 98),)), (left, right), (1, 400))
    for z in np.arange(2, 90, 6):
        scene.ground("road", (225, 225, 215), (-0.9, -0.75), (z, z + 2.5))
    void = ("parking", "ground", "rail track")[seed % 3]
    x, color = {
        "parking": ((right, right + 2), (70, 70, 85)),
        "ground": ((right + SIDEWALK, right + 30), (150, 125, 100)),
        "rail track": ((left + 0.3, left + 2.8), (80, 70, 65)),
    }[void]
    scene.ground(void, color, x, (4, 60))
    for rail in (x[0] + 0.5, x[0] + 1.9) if void == "rail track" else ():
        scene.ground(void, (175, 170, 165), (rail, rail + 0.12), (4, 60))


def roadside(scene: Scene, seed: int, side: int, curb: float) -> list[tuple]:
    """What stands beyond the curb on one side, as (distance, method of Scene, arguments)."""
    rng, edge = scene.rng, curb + SIDEWALK * side
    barrier = ("wall", "fence")[(seed + (side > 0)) % 2]
    things, z = [], rng.uniform(4, 7)
    while z < 120:
        length = rng.uniform(8, 16)
        if z > 6 and barrier:
            things.append((z, scene.barrier, (barrier, edge + 2 * side, z, z + length)))
            things += [(z + length + 1, scene.tree, (edge + side * x, z + length)) for x in (3, 6, 9)]
            barrier = None
        else:
            things.append((z, scene.building, (side, edge + side * rng.uniform(2, 4), z, z + length * 0.9)))
        z += length
    for top, nearest, farthest in (("traffic sign", 7, 10), ("traffic light", 11, 14), ("lamp", 12, 18),
                                   ("traffic sign", 18, 25)):
        z = rng.uniform(nearest, farthest)
        things.append((z, scene.pole, (curb + 0.4 * side, z, top)))
    things += [(z, scene.tree, (curb + 1.2 * side, z)) for z in rng.uniform(13, 45, 3)]
    for z in rng.uniform(6, 14, 2):
        things.append((z, scene.person, ("person", curb + side * rng.uniform(1, 3), z)))
    z = rng.uniform(7, 15)
    things.append((z, scene.bin, (edge - 0.4 * side, z)))
    if seed % 3 == 0:
        things.append((12, scene.barrier, ("guard rail", curb + 0.2 * side, 12, 30)))
    return things


def traffic(scene: Scene, seed: int, left: float, right: float) -> list[tuple]:
    """What stands or drives on the road, as (distance, method of Scene, arguments)."""
    rng = scene.rng
    large = ("truck", "bus", "truck", "train")[seed % 4]
    parked = ("bus", "caravan", "truck", "trailer", "train")[seed % 5]
    vehicles = [(large, left + 1.6, rng.uniform(10, 15)), (parked, right - 1.2, rng.uniform(15, 20))]
    vehicles += [("car", right - 1.1, rng.uniform(9, 11)), ("car", right - 1.1, rng.uniform(26, 50))]
    vehicles.append(("car", left + 1.3, rng.uniform(36, 50)))
    if seed % 3:
        vehicles.append(("car", left + 1.3, rng.uniform(5.5, 6.5)))
    ridden, standing = ("bicycle", "motorcycle")[:: 1 if seed % 2 else -1]
    cycles = [(ridden, rng.uniform(-0.3, 0.9), rng.uniform(5, 8), True),
              (standing, right + 0.9, rng.uniform(5, 7), False)]
    things = [(vehicle[2], scene.vehicle, vehicle) for vehicle in vehicles]
    return things + [(cycle[2], scene.cycle, cycle) for cycle in cycles]


def draw_scene(seed: int, size: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """A street, the same for the same arguments; any four seeds in a row hold all 20 classes.

    Returns:
        photo and label_rgb, each uint8 (size, size, 3); every pixel of label_rgb has an official colour.
    """
    scene = Scene(seed, size)
    left, right = -scene.rng.uniform(4, 5), scene.rng.uniform(2.6, 3.4)
    paint_ground(scene, seed, left, right)
    things = [(150, scene.building, (1, x, 150, 160)) for x in range(-90, 90, 13)]  # the end of the street
    things.append((100, scene.bridge, (100,)) if seed % 2 else (120, scene.tunnel, (120,)))
    things += roadside(scene, seed, -1, left) + roadside(scene, seed, 1, right)
    things += traffic(scene, seed, left, right)
    for _, draw, arguments in sorted(things, key=lambda thing: -thing[0]):  # near things cover far ones
        draw(*arguments)
    bonnet = (-0.2 * size, 0.92 * size, 1.2 * size, 1.3 * size)  # of the car that films
    scene.photo_pen.ellipse(bonnet, fill=(40, 42, 48))
    scene.label_pen.ellipse(bonnet, fill=LABEL_COLORS["background"])
    noise = scene.rng.integers(-6, 7, (size, size, 1), dtype=np.int16)  # the camera's
    return (np.asarray(scene.photo) + noise).clip(0, 255).astype(np.uint8), np.array(scene.label)


def write_composite(path: str | Path, photo: np.ndarray, label_rgb: np.ndarray) -> None:
    """Photo and label, each uint8 (S, S, 3), side by side: JPEG at quality 95 or PNG, by the suffix."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([photo, label_rgb], axis=1)).save(path, quality=95)  # which PNG ignores


def write_scenes(folder: str | Path, splits: dict[str, int], height: int = 256) -> None:
    """So many composites of that height for each split, as folder/SPLIT/1.jpg and so on, all different."""
    paths = [Path(folder, split, f"{i}.jpg") for split, count in splits.items() for i in range(1, count + 1)]
    side = (height, height)

    def write_one(seed: int) -> None:
        photo, label_rgb = map(Image.fromarray, draw_scene(seed, 4 * height))
        photo = photo.resize(side, Image.Resampling.BOX)  # drawn larger: shrinking smooths it as a lens does
        label_rgb = label_rgb.resize(side, Image.Resampling.NEAREST)  # every pixel keeps an official colour
        write_composite(paths[seed], np.asarray(photo), np.asarray(label_rgb))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write_one, range(len(paths))))


if __name__ == "__main__":
    write_scenes(ROOT / "images" / "demo", DEMO_SPLITS)
