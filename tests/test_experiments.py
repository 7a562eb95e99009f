"""Every experiment file fits together, without allocating or training anything."""

import functools
import json
import math
import operator
import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from vidsim import trees
from vidsim.data import buckets, packing
from vidsim.export import models
from vidsim.parallel import mesh
from vidsim.parallel.sharding import ShardingRules
from vidsim.stages import compiling, tasks
from vidsim.stages.run import Run
from vidsim.training import optimizer, state

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"
FILES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "__init__")
AUTOENCODERS = {  # (time, space) of a latent, its channels, millions of parameters
    "vae_4x8x8_16": ((4, 8), 16, 96),
    "vae_4x16x16_48": ((4, 16), 48, 266),
    "vae_8x32x32_128": ((8, 32), 128, 426),
}
TRANSFORMERS = {  # millions of parameters, devices of its slice
    "dit_s": (33, 16),
    "dit_b": (130, 64),
    "dit_l": (460, 64),
    "dit_xl": (1300, 64),
    "dit_7b": (7000, 128),
    "dit_14b_wan": (14_000, 8),
    "dit_30b": (30_000, 512),
}


def run_of(path: pathlib.Path, workdir: pathlib.Path, fields: dict[str, str] | None = None) -> Run:
    """The run of an experiment file; `fields` are as they are written in a command."""
    config = runpy.run_path(str(path))["get_config"]()
    for name, text in (fields or {}).items():
        *sections, last = name.split(".")
        section = functools.reduce(operator.getitem, sections, config)
        section[last] = type(section[last])(text)
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


@pytest.mark.parametrize("name", AUTOENCODERS)
@pytest.mark.parametrize("devices", [8, 16, 32])
def test_an_autoencoder_and_its_judges_divide_over_devices(name, devices, tmp_path):
    run = run_of(FOLDER / f"{name}.py", tmp_path)
    axes = dict.fromkeys(mesh.AXES, 1) | {"fsdp": devices}
    drawn = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))
    for stage in ("vae", "finish"):
        make_model = tasks.vae_task(run, stage).make_model
        shapes = trees.flatten(state.abstract_params(make_model))
        found = state.shardings_of_params(make_model, drawn, ShardingRules())
        held = sum(
            math.prod(sharding.shard_shape(shapes[parameter].shape))
            for parameter, sharding in trees.flatten(found).items()
        )
        whole = sum(math.prod(leaf.shape) for leaf in shapes.values())
        assert held < 1.1 * whole / devices + 1e6, "what stays whole is little"


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_latents_are_measured_on_clips_as_large_as_those_of_training(name, tmp_path):
    run = run_of(FOLDER / f"{name}.py", tmp_path)
    assert run.latents.area == run.buckets.areas[0]
    time, space = run.vae.compression
    longest = run.buckets.clip_tokens // (run.latents.area // space**2)  # latents
    assert run.latents.max_frames == 1 + (longest - 1) * time


def drawn_mesh(run: Run, topology: str) -> jax.sharding.AbstractMesh:
    """The mesh of a run on a slice."""
    _, _, sizes = topology.partition(":")
    devices = math.prod(map(int, sizes.split("x")))
    axes = {axis: getattr(run.mesh_config, axis) for axis in mesh.AXES}
    fixed = math.prod(size for size in axes.values() if size > 0)
    axes = {axis: devices // fixed if size < 0 else size for axis, size in axes.items()}
    assert math.prod(axes.values()) == devices
    return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))


README = (FOLDER.parent / "README.md").read_text().replace("\\\n", " ")


COMPILED = re.findall(r"^vidsim compile ([^#\n]+)", README, re.MULTILINE)
assert COMPILED, "README compiles something"


@pytest.mark.parametrize("line", COMPILED)
def test_what_readme_compiles_divides_over_its_slice(line, tmp_path):
    given = dict(flag.removeprefix("--").split("=") for flag in line.split() if "=" in flag)
    fields = {n.removeprefix("config."): v for n, v in given.items() if n.startswith("config.")}
    run = run_of(FOLDER.parent / given["config"], tmp_path, fields)
    drawn = drawn_mesh(run, given.get("topology", run.config["topology"]))
    asked = compiling.Asked(model=given.get("model", "dit"), clip=given.get("clip", ""))
    assert compiling.place(compiling.case_of(run, drawn, asked), drawn, ShardingRules())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_is_as_large_as_its_name_says_and_divides_over_its_slice(name, tmp_path):
    millions, devices = TRANSFORMERS[name]
    run = run_of(FOLDER / f"{name}.py", tmp_path)
    make_model = tasks.dit_task(run).make_model
    count = trees.count(state.abstract_params(make_model))
    assert count / 1e6 == pytest.approx(millions, rel=0.05)

    drawn = drawn_mesh(run, run.config["topology"])
    assert drawn.size == devices
    for phase in run.phases:
        tasks.check_divides(phase.pack.rows, phase.pack.lengths, drawn)
    # Parameters, averages and moments are spread evenly: no large one is whole anywhere.
    of_params = state.shardings_of_params(make_model, drawn, ShardingRules())
    optim = run.optimizers["dit"]
    tx = optimizer.make(optim, 1, shardings=of_params)
    found = state.shardings(make_model, tx, optim.ema_names, of_params)
    abstract = state.abstract(make_model, tx, found)
    leaves = jax.tree.leaves(abstract.opt_state)
    whole = {"moments": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)}
    for part, held in state.bytes_on_a_device(abstract).items():
        assert held < 1.1 * whole.get(part, 4 * count) / devices + 8e6, part


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_longest_rows_of_a_transformer_have_a_loss(name, tmp_path):
    run = run_of(FOLDER / f"{name}.py", tmp_path)
    task = tasks.dit_task(run)
    params = state.abstract_params(task.make_model)
    for phase in (run.phases[0], run.phases[-1]):
        shapes = packing.shapes(
            phase.pack.rows,
            length=phase.pack.lengths[-1],
            max_segments=phase.pack.max_segments,
            patch_values=models.patch_values(run.vae, run.dit),
        )
        pack = {name: jax.ShapeDtypeStruct(*array) for name, array in shapes.items()}
        keys = jax.eval_shape(
            lambda rows=phase.pack.rows: jax.random.split(jax.random.key(0), rows)
        )
        step = jax.ShapeDtypeStruct((), jnp.int32)
        loss, metrics = jax.eval_shape(task.objective, params, pack, keys, step)
        assert (loss.shape, loss.dtype) == ((), jnp.float32)
        assert "tokens" in metrics


def test_every_size_is_tested():
    names = {path.stem for path in FILES}
    assert set(AUTOENCODERS) == {name for name in names if name.startswith("vae_")}
    assert set(TRANSFORMERS) == {name for name in names if name.startswith("dit_")}
