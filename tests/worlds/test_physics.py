import os
import subprocess
import sys

import numpy as np
import pytest

from vidsim import files
from vidsim.errors import InputError
from vidsim.worlds import physics

FORMATS = ((48, 48, 17, 8), (64, 48, 17, 8), (48, 64, 17, 8), (48, 48, 1, 8))


def scenes(kind, *, count=60, formats=FORMATS[:3], **fields):
    config = physics.Config(clips=count, formats=formats, kinds=(kind,), **fields)
    return [physics.simulate(config, index) for index in range(count)]


def size(scene):
    return np.array([scene.width, scene.height]) / scene.pixels_per_unit


def whole(scene):
    """Frames in which every ball is whole in the picture."""
    return np.all(
        [
            (ball.positions_T2 >= ball.radius - 1e-9)
            & (ball.positions_T2 <= size(scene) - ball.radius + 1e-9)
            for ball in scene.balls
        ],
        axis=(0, 2),
    )


def test_collisions_conserve_momentum_and_energy():
    for scene in scenes("collision"):
        masses = np.array([ball.radius**2 for ball in scene.balls])
        velocities_NT = np.stack([ball.velocities_T2[:, 0] for ball in scene.balls])
        momentum_T, energy_T = masses @ velocities_NT, masses @ velocities_NT**2
        np.testing.assert_allclose(momentum_T, momentum_T[0], atol=1e-12)
        np.testing.assert_allclose(energy_T, energy_T[0], rtol=1e-12)
        assert velocities_NT[0, 0] != velocities_NT[0, -1]


def test_collisions_happen_inside_after_the_fifth_frame_and_balls_never_overlap():
    for scene in scenes("collision"):
        first, second = scene.balls
        distance_T = np.linalg.norm(first.positions_T2 - second.positions_T2, axis=-1)
        assert (distance_T >= first.radius + second.radius - 1e-9).all()
        hit = np.flatnonzero(first.velocities_T2[:, 0] != first.velocities_T2[0, 0])[0]
        assert 5 <= hit <= 0.6 * scene.frames
        assert whole(scene)[hit - 1 : hit + 1].all()


def test_uniform_motion_is_uniform_and_goes_in_four_directions():
    directions = set()
    for scene in scenes("uniform"):
        (ball,) = scene.balls
        steps = np.diff(ball.positions_T2, axis=0) * scene.fps
        np.testing.assert_allclose(steps, ball.velocities_T2[1:], atol=1e-9)
        assert np.ptp(ball.velocities_T2, axis=0).max() == 0
        directions.add(tuple(np.sign(ball.velocities_T2[0])))
    assert directions == {(1, 0), (-1, 0), (0, 1), (0, -1)}


def test_a_parabola_has_the_constant_acceleration_of_gravity():
    for scene in scenes("parabola", gravity=4.0):
        (ball,) = scene.balls
        acceleration = np.diff(ball.positions_T2, n=2, axis=0) * scene.fps**2
        np.testing.assert_allclose(acceleration, np.broadcast_to([0, 4.0], (15, 2)), atol=1e-9)
        assert ball.velocities_T2[0, 1] == 0


@pytest.mark.parametrize("kind", physics.KINDS)
def test_balls_are_whole_in_the_first_five_frames_and_mostly_all_along(kind):
    shown = [whole(scene) for scene in scenes(kind)]
    assert all(frames_T[:5].all() for frames_T in shown)
    if kind != "parabola":
        assert np.mean([frames_T.all() for frames_T in shown]) > 0.7


@pytest.mark.parametrize("kind", physics.KINDS)
def test_ranges_are_those_of_phyworld(kind):
    balls = [ball for scene in scenes(kind) for ball in scene.balls]
    assert all(0.7 <= ball.radius <= 1.4 for ball in balls)
    speeds = [np.linalg.norm(ball.velocities_T2[0]) for ball in balls]
    assert 1 <= min(speeds) < 1.5 and 3.5 < max(speeds) <= 4


@pytest.mark.parametrize("kind", physics.KINDS)
def test_captions_say_what_the_truth_says(kind):
    for scene in scenes(kind):
        words = physics.caption(scene).split()
        truth = scene.truth("clip")
        sizes = ["large" if ball["radius"] >= 1.05 else "small" for ball in truth["objects"]]
        colors = [ball["color_name"] for ball in truth["objects"]]
        assert words[:4] == ["a", sizes[0], colors[0], "ball"]
        vx, vy = truth["objects"][0]["velocities"][0]
        direction = ("right" if vx > 0 else "left") if vx else ("down" if vy > 0 else "up")
        speed = "fast" if np.hypot(vx, vy) >= 2.5 else "slow"
        assert (
            " ".join(words[4:])
            == {
                "uniform": f"moves {direction} {speed}",
                "parabola": f"is thrown {direction} {speed} and falls",
                "collision": f"moves {direction} {speed} and hits a {sizes[-1]} {colors[-1]} ball",
            }[kind]
        )


def test_captions_of_images_name_the_balls():
    for kind, count in (("uniform", 1), ("collision", 2), ("parabola", 1)):
        for scene in scenes(kind, count=20, formats=FORMATS[3:]):
            balls = physics.caption(scene).split(" and ")
            assert len(balls) == len({ball.color_name for ball in scene.balls}) == count
            assert all(len(ball.split()) == 4 for ball in balls)
            assert whole(scene).all()


def test_rendered_discs_have_the_area_and_the_colour_of_the_truth():
    for scene in scenes("collision", count=6):
        video_THWC = physics.render(scene)
        assert video_THWC.shape == (17, scene.height, scene.width, 3)
        for ball in scene.balls:
            x, y = np.floor(ball.positions_T2[0] * scene.pixels_per_unit).astype(int)
            np.testing.assert_array_equal(video_THWC[0, y, x], physics.COLORS[ball.color_name])
        changed = (video_THWC[0] != physics.BACKGROUND).any(-1).sum()
        radii = np.array([ball.radius for ball in scene.balls]) * scene.pixels_per_unit
        # Pixels that a disc touches: at most those of a disc with a radius one pixel larger.
        assert np.pi * (radii**2).sum() < changed < np.pi * ((radii + 1) ** 2).sum()


def config(**fields):
    return physics.Config(**{"clips": 8, "formats": FORMATS} | fields)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        physics.write(config(seed=seed), tmp_path / name)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert all(a[name] != c[name] for name in a)


def test_a_clip_does_not_depend_on_the_number_of_clips():
    few, many = (physics.simulate(config(clips=n), 5).truth("") for n in (6, 1000))
    assert few == many


def test_the_folder_holds_every_format_and_accounts_for_every_file(tmp_path):
    counts = physics.write(config(clips=12), tmp_path)
    assert counts == {"clips": 9, "images": 3}
    rows, captions = (files.read_jsonl(tmp_path / f"{n}.jsonl") for n in ("truth", "captions"))
    assert [row["file"] for row in rows] == [row["file"] for row in captions]
    assert {path.name for path in tmp_path.iterdir()} == {row["file"] for row in rows} | {
        "captions.jsonl",
        "truth.jsonl",
        "world.json",
    }
    sizes = {(row["width"], row["height"], row["frames"], row["fps"]) for row in rows}
    assert sizes == set(FORMATS)
    kinds = {(row["kind"], row["width"], row["height"], row["frames"]) for row in rows}
    assert len(kinds) == 12


def test_an_interrupted_rendering_goes_on_and_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    physics.write(config(), tmp_path / "whole")
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / f".clip_00005.{ended.pid}.part.mp4").write_bytes(b"killed here")
    living = tmp_path / "stopped" / f".clip_00005.{os.getppid()}.part.mp4"
    living.write_bytes(b"being written")
    render, rendered = physics.render, []

    def stop_at_five(scene):
        if len(rendered) == 5:
            raise KeyboardInterrupt
        rendered.append(scene)
        return render(scene)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(physics, "render", stop_at_five)
        physics.write(config(), tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "world.json").exists()
    with pytest.raises(InputError, match="another config"):
        physics.write(config(seed=1), tmp_path / "stopped")

    monkeypatch.setattr(physics, "render", lambda scene: rendered.append(scene) or render(scene))
    physics.write(config(), tmp_path / "stopped")
    assert len(rendered) == 8
    living.unlink()  # it was left alone
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    physics.write(config(), tmp_path / "stopped")
    assert len(rendered) == 8


def test_a_folder_of_another_world_or_of_other_files_is_refused(tmp_path):
    physics.write(config(clips=1), tmp_path / "world")
    with pytest.raises(InputError, match="choose another folder"):
        physics.write(config(clips=2), tmp_path / "world")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "letter.txt").write_text("keep me")
    with pytest.raises(InputError, match="choose an empty folder"):
        physics.write(config(clips=1), tmp_path / "notes")


@pytest.mark.parametrize(
    "fields",
    [
        {"clips": 0},
        {"seed": -1},
        {"gravity": 0.0},
        {"kinds": ()},
        {"kinds": ("pendulum",)},
        {"formats": ()},
        {"formats": ((48, 48, 17),)},
        {"formats": ((47, 48, 17, 8),)},
        {"formats": ((48, 48, 0, 8),)},
        {"formats": ((48, 48, 17, 2),)},
    ],
    ids=str,
)
def test_bad_values_are_named(fields):
    with pytest.raises(InputError, match=next(iter(fields)).rstrip("s")):
        config(**fields)
