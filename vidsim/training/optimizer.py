"""The optimizer: Muon on hidden matrices, AdamW on everything else, warm-up - stable - decay.

Muon (Jordan et al. 2024; arXiv:2502.16982) orthogonalises the momentum of a matrix by five
Newton-Schulz steps; a convolution counts as the matrix (taps x inputs, outputs), a stack of layers
as that many matrices.
"""

import dataclasses

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from vidsim import trees
from vidsim.errors import InputError

# Embeddings, inputs, heads and modulation weights are no hidden matrices: AdamW serves them.
NOT_HIDDEN = ("embedding", "modulation", "time/", "patches_in", "text_in", "head")


@dataclasses.dataclass(frozen=True)
class Config:
    learning_rate: float  # of Muon
    adam_learning_rate: float
    weight_decay: float  # of hidden matrices; norms, biases and embeddings keep their scale
    warmup_steps: int
    decay_steps: int  # the last steps, over which the rate falls linearly to a hundredth
    clip_norm: float
    ema_sigma_rel: float  # width of the power-function EMA over the run (EDM2, arXiv:2312.02696)
    accumulate: int = (
        1  # parts that a batch is taken in, one after the other; a step sums over them
    )

    def __post_init__(self):
        if self.accumulate < 1:
            raise InputError(f"accumulate={self.accumulate} is under 1; use 1 for whole batches")


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


def hidden_matrices(params):
    """`MuonDimensionNumbers` for every hidden matrix, None for the other parameters."""

    def one(name, leaf):
        if not name.endswith("kernel") or any(part in name for part in NOT_HIDDEN):
            return None
        if leaf.ndim == 5:  # convolution: time, height, width, in, out
            return MuonDimensionNumbers((0, 1, 2, 3), (4,))
        return MuonDimensionNumbers((leaf.ndim - 2,), (leaf.ndim - 1,))

    return trees.map_named(one, params)


def decayed(params):
    """Whether weight decay applies: not to what divides by its own norm, which it would only empty.

    A discriminator that has not started yet has no gradient to fill it again.
    """
    return trees.map_named(lambda name, leaf: not name.startswith("discriminator/"), params)


def make(config: Config, steps: int, frozen: tuple[str, ...] = ()) -> optax.GradientTransformation:
    """The optimizer of a run of `steps`.

    Parameters whose names begin with one of `frozen` are not updated and have no moments.
    """
    tx = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        muon(
            schedule(config, steps, config.learning_rate),
            weight_decay=config.weight_decay,
            weight_decay_mask=decayed,
            adam_b1=0.9,
            adam_b2=0.95,
            adam_weight_decay=0.0,
            adam_learning_rate=schedule(config, steps, config.adam_learning_rate),
            muon_weight_dimension_numbers=hidden_matrices,
        ),
    )
    if not frozen:
        return tx

    def labels(params):
        return trees.map_named(
            lambda name, leaf: "frozen" if name.startswith(frozen) else "trained", params
        )

    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


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
