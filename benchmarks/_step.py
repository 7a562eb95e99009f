"""A training step of one row, a prompt and a video, as `vidsim train` compiles it."""

# L tokens, P patch values, M segments a row

import functools

import jax
import numpy as np
import optax

from vidsim import compiling
from vidsim.diffusion import time_sampling
from vidsim.layers import rotary
from vidsim.models import dit
from vidsim.parallel import mesh as meshes
from vidsim.parallel.sharding import ShardingRules
from vidsim.text import encoder
from vidsim.training import objectives, optimizer, state, step

# What both sides of a comparison are trained by. Not Muon: its arithmetic does not grow with the
# batch, so that on one row it would weigh as it never does in a training.
ADAMW = {"learning_rate": 1e-4, "b1": 0.9, "b2": 0.95, "weight_decay": 0.01}
CLIP_NORM = 1.0
TIMES = time_sampling.Config(mean=0.0, std=1.0, shift_min=1.0, shift_max=16.0)


def pack(
    config: dit.Config,
    text: encoder.Config,
    grid: tuple[int, int, int],
    *,
    channels: int,
    pixels: int,
) -> dict[str, np.ndarray]:
    """One row of one segment: a prompt as long as may be, and a video of noise.

    `grid` are latent frames, height and width; a latent has `channels` and a side of `pixels`.
    """
    rng = np.random.default_rng(0)
    prompt, (t, h, w) = text.max_tokens, grid
    tokens = (t, h // config.patch, w // config.patch)
    L, P = prompt + t * h * w // config.patch**2, channels * config.patch**2
    is_text = np.arange(L) < prompt
    positions = (
        rotary.text_positions(prompt),
        rotary.grid_positions(tokens, fps=24.0, compression=(4, pixels * config.patch)),
    )
    row = {
        "patches_BLP": np.where(is_text[:, None], 0, rng.standard_normal((L, P), dtype=np.float32)),
        "text_ids_BL": np.where(is_text, rng.integers(text.vocabulary, size=L), 0).astype(np.int32),
        "segment_ids_BL": np.ones(L, np.int32),
        "positions_BL3": np.concatenate(positions),
        "is_text_BL": is_text,
        "given_BL": np.zeros(L, bool),
        "time_index_BL": np.where(is_text, 0, 1).astype(np.int32),
        "sizes_BM3": np.array([[t, pixels * h, pixels * w]], np.int32),
    }
    return {name: array[None] for name, array in row.items()}


class Step:
    """A transformer in training by AdamW on the first device, on one row again and again."""

    def __init__(self, config: dit.Config, text: encoder.Config, row: dict[str, np.ndarray]):
        compiling.give_memory_back()  # as every verb does

        def make(rngs):
            return dit.DiT(config, text, row["patches_BLP"].shape[-1], rngs)

        tx = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.adamw(**ADAMW))
        mesh = meshes.make(meshes.Config(), jax.devices()[:1])
        rules = ShardingRules()
        shardings = state.shardings(make, tx, (), state.shardings_of_params(make, mesh, rules))
        self.graph = state.graph_of(make)
        self.objective = functools.partial(
            objectives.dit_loss,
            self.graph,
            config.prediction,
            TIMES,
            objectives.DiTLoss(t_min=0.05, noisy_given_max=0.3),
        )
        self.update = step.make_step(
            self.objective,
            tx,
            _SETTINGS,
            seed=0,
            mesh=mesh,
            rules=rules,
            state_shardings=shardings,
        )
        self.state = state.create(make, tx, jax.random.key(0), shardings)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        self.pack = row

    def step(self) -> float:
        """The loss of one update."""
        self.state, metrics = self.update(self.state, self.pack)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])


# Of these `make_step` reads the averages and the microbatches: there are none.
_SETTINGS = optimizer.Config(
    learning_rate=ADAMW["learning_rate"],
    muon_scale="spectral",
    muon_dtype="float32",
    adam_learning_rate=ADAMW["learning_rate"],
    weight_decay=ADAMW["weight_decay"],
    warmup_steps=0,
    decay_steps=0,
    clip_norm=CLIP_NORM,
    ema_sigma_rels=(),
)
