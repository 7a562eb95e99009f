"""The optimizer: Muon on hidden matrices, AdamW on everything else, warm-up - stable - decay.

Beside the parameters, averages of them over the run are kept, of one width or several.
"""

import dataclasses
from collections.abc import Callable

import jax
import optax

from vidsim import trees
from vidsim.errors import InputError
from vidsim.layers.parameter import check_dtype
from vidsim.training import muon

# Embeddings, inputs, heads and modulation weights are no hidden matrices: AdamW serves them.
NOT_HIDDEN = ("embedding", "modulation", "time/", "patches_in", "text_in", "head")

# Of AdamW. Gradients fall with the width, and what is added to their size must stay below it, or
# wide networks learn less than narrow ones (arXiv:2407.05872).
ADAM_EPSILON = 1e-15


@dataclasses.dataclass(frozen=True)
class Config:
    learning_rate: float  # of Muon
    muon_scale: str  # of its updates, by the shape of the matrix: one of muon.SCALES
    muon_dtype: str  # of Newton-Schulz; momentum is float32
    adam_learning_rate: float
    weight_decay: float  # of hidden matrices; norms, biases and embeddings keep their scale
    warmup_steps: int
    decay_steps: int  # the last steps, over which the rate falls linearly to a hundredth
    clip_norm: float
    # Widths of the power-function EMAs over the run (EDM2, arXiv:2312.02696); the first is the one
    # that is sampled and exported unless another is asked for; without any, the last weights are.
    ema_sigma_rels: tuple[float, ...]
    accumulate: int = 1  # parts that a batch is taken in, one after the other; a step sums them

    def __post_init__(self):
        if self.accumulate < 1:
            raise InputError(f"accumulate={self.accumulate} is under 1; use 1 for whole batches")
        check_dtype(self.muon_dtype, "muon_dtype")
        if self.muon_scale not in muon.SCALES:
            raise InputError(f"muon_scale={self.muon_scale!r} is none of {sorted(muon.SCALES)}")
        widths = self.ema_sigma_rels
        # A width of 12^-1/2 is the plain mean of the run.
        if len(set(widths)) < len(widths) or not all(0 < w < 0.2886 for w in widths):
            raise InputError(
                f"ema_sigma_rels={widths} are not different widths between 0 and 0.2886; "
                "use (0.05, 0.1)"
            )

    @property
    def ema_names(self) -> tuple[str, ...]:
        """The averages by name, in the order of the config."""
        return tuple(f"{width:g}" for width in self.ema_sigma_rels)


def schedule(config: Config, steps: int, peak: float) -> optax.Schedule:
    """Warm-up, stable, decay."""
    decay = min(config.decay_steps, steps)
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / max(config.warmup_steps, 1), peak, config.warmup_steps),
            optax.linear_schedule(peak, peak / 100.0, decay),
        ],
        [max(steps - decay, 0)],
    )


def is_hidden_matrix(name: str) -> bool:
    """Whether Muon serves the parameter: matrices, stacks of them and convolutions."""
    return name.endswith("kernel") and not any(part in name for part in NOT_HIDDEN)


def decayed(params):
    """Whether weight decay applies: not to what divides by its own norm, which it would only empty.

    A discriminator that has not started yet has no gradient to fill it again.
    """
    return trees.map_named(lambda name, leaf: not name.startswith("discriminator/"), params)


def make(
    config: Config,
    steps: int,
    frozen: tuple[str, ...] = (),
    *,
    adam_factor: Callable[[str], float] | None = None,
    shardings=None,
) -> optax.GradientTransformation:
    """The optimizer of a run of `steps`.

    Args:
      frozen: parameters whose names begin with one of these are not updated and have no moments.
      adam_factor: what AdamW's rate of a parameter is multiplied by, by its name.
      shardings: of the parameters, as a tree; None where all are on one device.
    """

    def label(name, leaf):
        if name.startswith(frozen):
            return "frozen"
        return "muon" if is_hidden_matrix(name) else "adam"

    def by_name(updates, params=None):
        return trees.map_named(lambda name, leaf: leaf * adam_factor(name), updates)

    muon_rate = schedule(config, steps, config.learning_rate)
    adam_rate = schedule(config, steps, config.adam_learning_rate)
    adam = optax.adamw(
        adam_rate, b1=0.9, b2=0.95, eps=ADAM_EPSILON, weight_decay=0.0, nesterov=True
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.partition(
            {
                "muon": optax.chain(
                    muon.muon(
                        scale=config.muon_scale,
                        dtype=config.muon_dtype,
                        shardings=shardings and trees.flatten(shardings),
                    ),
                    optax.add_decayed_weights(config.weight_decay, decayed),
                    optax.scale_by_learning_rate(muon_rate),
                ),
                "adam": optax.chain(adam, optax.stateless(by_name)) if adam_factor else adam,
                "frozen": optax.set_to_zero(),
            },
            lambda params: trees.map_named(label, params),
        ),
    )


def ema_exponent(sigma_rel: float) -> float:
    """gamma of the power-function EMA of relative width `sigma_rel` (Eq. 123, arXiv:2312.02696).

    Solves sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) by bisection.
    """
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2.0
        width = ((middle + 1.0) / ((middle + 2.0) ** 2 * (middle + 3.0))) ** 0.5
        low, high = (middle, high) if width > sigma_rel else (low, middle)
    return low


def update_ema(ema, params, step: jax.Array, exponent: float):
    """The EMA after `step` (from 1): weights fall off as (tau / t)^gamma."""
    decay = (1.0 - 1.0 / step) ** (exponent + 1.0)
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, params)
