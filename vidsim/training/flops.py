"""Model FLOPs: the arithmetic that training needs, whatever a program does to get there.

A multiplication and an addition are two. The backward pass counts as two forward passes; what is
computed again to save memory, padding, and pairs of tokens of different segments count as nothing.

    utilisation (MFU) = model FLOPs of a step / (seconds x devices x FLOP/s of one by datasheet)
"""

# D width, H hidden units, s tokens of a segment

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from vidsim.models import dit

TRAINING = 3.0  # forward, and backward by the input and by the weights


@dataclasses.dataclass(frozen=True)
class PackCost:
    """Model FLOPs of training on packs: of each valid token, and of each pair in a segment."""

    token: float
    pair: float

    def of(self, tokens, pairs):
        """FLOPs of a step of `tokens`, whose segments have sum s^2 = `pairs`."""
        return self.token * tokens + self.pair * pairs


def of_packs(config: dit.Config, patch_values: int) -> PackCost:
    """2 x weights for a token, 4 D a layer for a pair: q k^T and its product with v.

    Left out is what is computed for prompts or once a segment alone: encoder, modulation.
    """
    D, H = config.width, config.mlp_hidden
    weights = config.depth * (4 * D * D + 3 * D * H) + 2 * patch_values * D
    return PackCost(TRAINING * 2 * weights, TRAINING * 4 * config.depth * D)


def of_program(function, *arguments) -> float:
    """FLOPs of the matrix products and convolutions of `function`, at shapes.

    A loop counts as often as it runs, of a choice the dearest branch.

    Raises:
      ValueError: it has a loop whose length is not static, a kernel, or a part for each device.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr) -> float:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        ((contracted, _), _) = params["dimension_numbers"]
        left, out = equation.invars[0].aval, equation.outvars[0].aval
        return 2.0 * out.size * math.prod(left.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval, equation.outvars[0].aval
        outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * out.size * kernel.size / outputs
    if name in ("while", "pallas_call", "shard_map"):
        raise ValueError(f"the FLOPs of {name} cannot be counted from the program")
    inner = [_of_jaxpr(found) for found in _inside(params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _inside(params) -> list:
    """The programs among the parameters of an equation."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found


@functools.cache
def of_autoencoder(config, clips: int, frames: int, height: int, width: int) -> float:
    """Model FLOPs of training an autoencoder on so many clips: it encodes and decodes them.

    Discriminators and terms of the loss that encode or decode again are left out.
    """
    graph, params = nnx.split(nnx.eval_shape(lambda: config.make(nnx.Rngs(0))))

    def there_and_back(params, video):
        model = nnx.merge(graph, params)
        return model.reconstruct(model.posterior(video)[0])

    video = jax.ShapeDtypeStruct((clips, frames, height, width, 3), jnp.float32)
    return TRAINING * of_program(there_and_back, params, video)
