"""Every experiment file fits together, without allocating or training anything."""

import json
import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from vidsim.data import buckets
from vidsim.stages.run import Run

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"
FILES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "__init__")
AUTOENCODERS = {  # (time, space) of a latent, its channels, millions of parameters
    "vae_4x8x8_16": ((4, 8), 16, 96),
    "vae_4x16x16_48": ((4, 16), 48, 266),
    "vae_8x32x32_128": ((8, 32), 128, 426),
}


def run_of(path: pathlib.Path, workdir: pathlib.Path) -> Run:
    config = runpy.run_path(str(path))["get_config"]()
    return Run(json.loads(json.dumps(config.to_dict())), workdir)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_is_complete_and_its_sizes_fit(path, tmp_path):
    run = run_of(path, tmp_path)
    assert run.config["name"] == path.stem
    assert not any(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_compresses_as_its_name_says(name, tmp_path):
    (time, space), channels, millions = AUTOENCODERS[name]
    config = run_of(FOLDER / f"{name}.py", tmp_path).vae
    assert name == f"vae_{time}x{space}x{space}_{channels}"
    assert config.compression == (time, space) and config.latent_channels == channels
    graph, state = nnx.split(nnx.eval_shape(lambda: config.make(nnx.Rngs(0))))
    assert round(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state)) / 1e6) == millions

    def there_and_back(state, video):
        mean, _ = nnx.merge(graph, state).posterior(video)
        return mean, nnx.merge(graph, state).reconstruct(mean)

    video = jax.ShapeDtypeStruct((1, 17, 2 * space, space, 3), jnp.float32)
    mean, back = jax.eval_shape(there_and_back, state, video)
    assert mean.shape == (1, 1 + 16 // time, 2, 1, channels)
    assert back.shape == video.shape


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_sees_videos_of_every_size_within_the_cost_of_a_step(name, tmp_path):
    run = run_of(FOLDER / f"{name}.py", tmp_path)
    index = [
        {"split": "train", "width": width, "height": height, "frames": frames}
        for width, height in ((1920, 1080), (1080, 1920), (640, 480), (320, 240))
        for frames in (1, 30, 300)
    ]
    stride, grid = run.vae.compression, run.stride.token
    shapes = buckets.shapes_of(index, run.buckets, stride=stride, grid=grid)
    longest = {shape[1:]: shape[0] for shape in shapes}  # by length they are in order
    assert len(longest) > 2 and min(longest.values()) > 1
    assert all(buckets.batch_size(shape, run.buckets) for shape in shapes)


def test_every_file_of_an_autoencoder_is_tested():
    assert set(AUTOENCODERS) == {path.stem for path in FILES if path.stem.startswith("vae_")}
