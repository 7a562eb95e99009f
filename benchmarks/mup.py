"""Width scaling: the best learning rate at three widths, and how far activations move at each.

Transformers of widths 128, 256 and 512 with heads of 32 learn travelling waves: packed clips whose
prompt says speed and wavelength and whose phase is unknown. Rates of Muon and AdamW are swept
together, at a fixed quotient; with `dit.model.base_width` = 128 (muP) they mean the same update at
every width, without it ("plain") AdamW's updates of what sums over the width grow with it.

The first claim: the best rates, by a parabola through the three losses around the least one, are
within a factor of 2 of each other. The second: over a few steps the sizes of what changes,
(width / 128)^slope, over three seeds, have slopes near 0. Both are drawn to docs/mup.svg.
"""

# B rows, L tokens, P patch values, M segments a row

import collections
import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app
from flax import nnx

from benchmarks import claim, say
from vidsim.diffusion import time_sampling
from vidsim.evaluation import figures
from vidsim.layers import rotary
from vidsim.models import dit
from vidsim.text import encoder
from vidsim.training import objectives, optimizer, state

BASE = 128
WIDTHS = (128, 256, 512)
HEAD_DIM = 32
RATES = tuple(2.0**power for power in range(-9, -2))  # of Muon
ADAM_OVER_MUON = 0.1
STEPS = 100
LAST = 20  # steps whose mean loss is a run's
SHOWN = 1.3  # the largest loss that is drawn; what diverged has more
SEEDS = 3  # of the weights, over which changes of activations are averaged
GRID = (4, 4, 4)  # latents of a clip
WORDS = 8  # speeds, and wavelengths
P, B, M = 8, 4, 2
TEXT = encoder.Config(
    vocabulary=2 * WORDS, features=32, depth=0, heads=2, max_tokens=2, base_features=0
)
TIMES = time_sampling.Config(mean=0.0, std=1.0, shift_min=1.0, shift_max=1.0)
OPTIMIZER = optimizer.Config(
    learning_rate=1.0,
    muon_scale="spectral",
    muon_dtype="float32",
    adam_learning_rate=1.0,
    weight_decay=0.0,
    warmup_steps=10,
    decay_steps=40,
    clip_norm=1.0,
    ema_sigma_rels=(0.05,),
)


def config(width: int, base_width: int, depth: int = 2) -> dit.Config:
    return dit.Config(
        width=width,
        depth=depth,
        heads=width // HEAD_DIM,
        mlp_hidden=2 * width,
        patch=1,
        prediction="x0",
        remat="none",
        unroll=depth,
        dtype="float32",
        operands="",
        base_width=base_width,
    )


def model_of(config: dit.Config, rngs: nnx.Rngs) -> dit.DiT:
    return dit.DiT(config, TEXT, P, rngs)


def draw_pack(key: jax.Array) -> dict[str, jax.Array]:
    """A pack of clips of travelling waves, as data/packing.py has them."""
    positions_L3 = np.concatenate(
        [rotary.text_positions(2), rotary.grid_positions(GRID, fps=6.0, compression=(1, 16))]
    )
    t_L, y_L, x_L = jnp.asarray(positions_L3[2:]).T
    word_key, phase_key = jax.random.split(key)
    words = jax.random.randint(word_key, (B, M, 2), 0, WORDS)
    phase = jax.random.uniform(phase_key, (B, M, 2), maxval=2 * math.pi)
    speed, number = (words[..., i, None] / WORDS for i in range(2))
    along = (0.5 + number) * (x_L * jnp.cos(phase[..., 1:]) + y_L * jnp.sin(phase[..., 1:]))
    wave_BML = along + 2.0 * (speed - 0.5) * t_L + phase[..., :1]
    patches = jnp.sin(
        wave_BML[..., None] * (1 + jnp.arange(P) // 2) + jnp.arange(P) % 2 * math.pi / 2
    )
    patches = jnp.pad(1.4 * patches, ((0, 0), (0, 0), (2, 0), (0, 0)))
    one = len(positions_L3)
    text = jnp.pad(words + jnp.asarray([0, WORDS]), ((0, 0), (0, 0), (0, one - 2)))
    is_text = np.tile(np.arange(one) < 2, (B, M))
    return {
        "patches_BLP": patches.reshape(B, M * one, P),
        "text_ids_BL": text.reshape(B, M * one),
        "segment_ids_BL": jnp.tile(jnp.repeat(jnp.arange(1, M + 1), one), (B, 1)),
        "positions_BL3": jnp.tile(jnp.asarray(positions_L3), (B, M, 1)),
        "is_text_BL": jnp.asarray(is_text),
        "given_BL": jnp.zeros(is_text.shape, bool),
        "time_index_BL": jnp.asarray(~is_text, jnp.int32),
        "sizes_BM3": jnp.tile(jnp.asarray([GRID[0], 16 * GRID[1], 16 * GRID[2]]), (B, M, 1)),
    }


@dataclasses.dataclass(frozen=True)
class Trained:
    before: dict  # parameters
    after: dict
    losses: list[float]


def trainer(config: dit.Config, steps: int):
    """`train(rate, seed of the weights) -> Trained`; one program for all."""
    make_model = functools.partial(model_of, config)
    graph = state.graph_of(make_model)
    loss = functools.partial(
        objectives.dit_loss, graph, config.prediction, TIMES, objectives.DiTLoss(0.05, 0.0)
    )

    def tx(rate):
        rates = {"learning_rate": rate, "adam_learning_rate": ADAM_OVER_MUON * rate}
        factor = functools.partial(dit.adam_factor, config, TEXT)
        return optimizer.make(dataclasses.replace(OPTIMIZER, **rates), steps, adam_factor=factor)

    @jax.jit
    def step(params, opt_state, rate, number):
        data_key, key = jax.random.split(jax.random.fold_in(jax.random.key(1), number))
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, _), gradients = grad(params, draw_pack(data_key), jax.random.split(key, B), number)
        updates, opt_state = tx(rate).update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    @jax.jit
    def init(key):
        return state.split(make_model, key)[1]

    def train(rate: float, seed: int = 0) -> Trained:
        before = init(jax.random.key(seed))
        params, opt_state, losses = before, tx(rate).init(before), []
        for number in range(steps):
            params, opt_state, value = step(params, opt_state, rate, number)
            losses.append(value)
        return Trained(before, params, [float(value) for value in losses])

    return train


def activations(config: dit.Config, params) -> dict[str, np.ndarray]:
    """What the network computes of one pack at its stations; the stream is normalised."""
    model = nnx.merge(state.graph_of(functools.partial(model_of, config)), params)
    pack = draw_pack(jax.random.key(2))
    times_BM3 = jnp.broadcast_to(jnp.asarray([0.0, 0.7, 0.0]), (B, M, 3))
    row = (pack["patches_BLP"], pack["text_ids_BL"], times_BM3, objectives.tokens_of(pack))
    embedded = jax.nn.silu(model.time(times_BM3.reshape(B, -1)))
    found = {
        "input": model.patches_in(row[0]),
        "times": embedded,
        "modulation": model.modulation(embedded),
        "output": model(*row),
    }
    model.head = nnx.identity
    return {name: np.asarray(value) for name, value in (found | {"stream": model(*row)}).items()}


def moved(config: dit.Config, rate: float, steps: int, seeds: int = SEEDS) -> dict[str, float]:
    """By how much (rms, over seeds of the weights too) `steps` of training move activations."""
    squares = collections.defaultdict(list)
    train = trainer(config, steps)
    for seed in range(seeds):
        trained = train(rate, seed)
        before, after = (activations(config, p) for p in (trained.before, trained.after))
        for name, value in after.items():
            squares[name].append(np.mean(np.square(value - before[name])))
    return {name: float(np.sqrt(np.mean(found))) for name, found in squares.items()}


def slopes(sizes: dict[int, dict[str, float]]) -> dict[str, float]:
    """By name, the slope of log size over log width, of {width: {name: size}}."""
    logs = np.log([list(sizes)]).T
    names = next(iter(sizes.values()))
    return {
        name: float(np.polyfit(logs[:, 0], np.log([found[name] for found in sizes.values()]), 1)[0])
        for name in names
    }


def best_rate(losses: dict[float, float]) -> float:
    """Where a parabola over log rate, through the least loss and its neighbours, is least."""
    rates = sorted(losses)
    least = min(range(len(rates)), key=lambda n: losses[rates[n]])
    if least in (0, len(rates) - 1):
        return math.nan  # the sweep does not hold the optimum
    near = rates[least - 1 : least + 2]
    a, b, _ = np.polyfit(np.log(near), [losses[rate] for rate in near], 2)
    return math.exp(-b / (2 * a))


def spread(best: dict[int, float]) -> float:
    """The largest best rate over the least; NaN if a sweep holds none."""
    rates = np.array([*best.values()])
    return float(rates.max() / rates.min())


def sweep(base_width: int) -> dict[int, dict[float, float]]:
    """{width: {rate: mean loss of the last steps}}."""
    found = {}
    for width in WIDTHS:
        begin = time.perf_counter()
        train = trainer(config(width, base_width), STEPS)
        found[width] = {rate: float(np.mean(train(rate).losses[-LAST:])) for rate in RATES}
        shown = ", ".join(f"2^{math.log2(r):.0f}: {loss:.4f}" for r, loss in found[width].items())
        say(f"width {width} base {base_width}: {shown} ({time.perf_counter() - begin:.0f} s)")
    return found


def main(out: str = "docs/mup.svg") -> list[dict]:
    losses = {"muP": sweep(BASE), "plain": sweep(0)}
    coordinates = {
        name: {width: moved(config(width, base), RATES[2], 5) for width in WIDTHS}
        for name, base in (("muP", BASE), ("plain", 0))
    }
    panels = []
    for name, found in losses.items():
        lines = {f"width {width}": points for width, points in found.items()}
        title = f"{name}: loss after {STEPS} steps"
        panels.append(figures.Chart(title, "learning rate of Muon", lines, top=SHOWN))
    for name, found in coordinates.items():
        lines = {
            label: {width: sizes[label] for width, sizes in found.items()} for label in found[BASE]
        }
        panels.append(figures.Chart(f"{name}: change of activations in 5 steps", "width", lines))
    figures.log_charts(panels, out)
    best = {
        name: {width: best_rate(points) for width, points in found.items()}
        for name, found in losses.items()
    }
    ratio = {name: spread(found) for name, found in best.items()}
    slope = {name: slopes(found) for name, found in coordinates.items()}
    steepest = {name: max(map(abs, found.values())) for name, found in slope.items()}
    beside = {"best rates": best, "losses": losses, "drawn to": out}
    return [
        claim(
            "mup.best_rate_ratio",
            ratio["muP"],
            goal=2.0,
            better="lower",
            beside={"plain": ratio["plain"], **beside},
        ),
        claim(
            "mup.coordinate_slope",
            steepest["muP"],
            goal=0.2,
            better="lower",
            beside={"plain": steepest["plain"], "slopes": slope},
        ),
    ]


if __name__ == "__main__":
    app.run(lambda _: main() and None)
