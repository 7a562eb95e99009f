"""The diffusion transformer: one stream of text tokens and spacetime patches in packed rows.

    x = project(patches) + project(text features)
    x = x + gate_a * attention(scale_a * norm(x) + shift_a)        per block, adaLN-single with a
    x = x + gate_m * swiglu(scale_m * norm(x) + shift_m)           learned bias (arXiv:2310.00426)
    x0_hat = head(scale * norm(x) + shift)

Every token has a diffusion time of its own, by index: a row holds at most M segments and a segment
at most three times, so the modulation is computed for [B, M, 3] and gathered.
"""

# B batch (rows), L tokens, P patch values, D width, N heads, K head dim, M segments a row

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vidsim.attention import segments
from vidsim.diffusion import flow
from vidsim.errors import InputError
from vidsim.layers import quantised
from vidsim.layers.linear import Linear, SwiGLU, xavier
from vidsim.layers.norms import rms_normalise
from vidsim.layers.parameter import parameter
from vidsim.layers.rotary import angles, rotate
from vidsim.layers.time_embedding import TimeEmbedding
from vidsim.text import encoder

MODULATIONS = 6  # shift, scale, gate of attention and of the MLP

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Config:
    width: int
    depth: int
    heads: int
    mlp_hidden: int
    patch: int  # latents along a side of one token
    prediction: str  # what the head predicts: x0 or velocity
    remat: str  # one of REMAT_POLICIES
    unroll: int  # layers in one body of the scan: more run faster on a CPU, and compile slower
    dtype: str  # of activations; norms, softmax and the loss are float32
    operands: str  # of the blocks' matrix products: int8, float8_e4m3fn; "": as activations
    base_width: int  # the width that learning rates are found at (muP); 0: this one

    def __post_init__(self):
        if self.width % self.heads or self.width // self.heads % 2:
            raise InputError(
                f"width={self.width} over heads={self.heads} is not an even head dimension; "
                "choose a width that is a multiple of twice the heads"
            )
        if self.prediction not in flow.PREDICTIONS:
            raise InputError(f"prediction={self.prediction!r} is none of {flow.PREDICTIONS}")
        if self.remat not in REMAT_POLICIES:
            raise InputError(f"remat={self.remat!r} is none of {sorted(REMAT_POLICIES)}")
        quantised.check(self.operands)
        if self.base_width < 0:
            raise InputError(f"base_width={self.base_width} is negative; use a width, or 0")

    @property
    def widening(self) -> float:
        """How much wider the network is than the one that learning rates are found at."""
        return self.width / (self.base_width or self.width)


# Matrices that map all of the width and that AdamW serves: their updates add up over the width.
_SUMMED_OVER_WIDTH = ("time/second/", "modulation/", "head_modulation/", "head/")


def adam_factor(config: Config, name: str) -> float:
    """What AdamW's rate of a parameter is multiplied by, for muP (Table 8, arXiv:2203.03466).

    With Muon's spectral scale on the hidden matrices, and heads of one dimension at all widths,
    every update then moves activations by as much at any width, and the best rates of a narrow
    network are those of a wide one.
    """
    return 1.0 / config.widening if name.startswith(_SUMMED_OVER_WIDTH) else 1.0


def input_init(widening: float):
    """Xavier of the base width, whatever the width: what comes in has the same size at all."""

    def init(key, shape, dtype):
        fan_in, fan_out = shape
        return (
            xavier(key, shape, dtype) * ((fan_in + fan_out) / (fan_in + fan_out / widening)) ** 0.5
        )

    return init


class Tokens(NamedTuple):
    """What the transformer must know of each token besides its content.

    `segment_ids_BL` 0 is padding; 1..M are the samples of the row. `positions_BL3` are in rotary
    units. `time_index_BL` chooses among the three times of the token's segment.
    """

    segment_ids_BL: jax.Array
    positions_BL3: jax.Array
    is_text_BL: jax.Array
    time_index_BL: jax.Array


class Block(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width, self.heads = config.width, config.heads
        axes, kind = ("embed", "heads"), {"rngs": rngs, "operands": config.operands}
        self.query = Linear(width, width, axes=axes, **kind)
        self.key = Linear(width, width, axes=axes, **kind)
        self.value = Linear(width, width, axes=axes, **kind)
        self.out = Linear(width, width, axes=("heads", "embed"), **kind)
        self.mlp = SwiGLU(width, config.mlp_hidden, **kind)
        ones = nnx.initializers.ones
        head_dim = width // config.heads
        self.query_scale = parameter(ones, (head_dim,), axes=(None,), rngs=rngs)
        self.key_scale = parameter(ones, (head_dim,), axes=(None,), rngs=rngs)
        # Gates start at zero through this bias: the whole network begins as the identity.
        zeros = nnx.initializers.zeros
        self.modulation = parameter(zeros, (MODULATIONS, width), axes=(None, None), rngs=rngs)

    def __call__(self, x_BLD, modulation_BL6D, tokens: Tokens):
        B, L, D = x_BLD.shape
        modulation = modulation_BL6D + self.modulation[...].astype(x_BLD.dtype)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            modulation[:, :, i] for i in range(MODULATIONS)
        )
        h = rms_normalise(x_BLD) * (1 + scale_a) + shift_a
        q, k, v = (f(h).reshape(B, L, self.heads, -1) for f in (self.query, self.key, self.value))
        rotation = angles(tokens.positions_BL3, D // self.heads)
        q = rotate(rms_normalise(q) * self.query_scale[...].astype(q.dtype), rotation)
        k = rotate(rms_normalise(k) * self.key_scale[...].astype(k.dtype), rotation)
        attended = segments.attend(q, k, v, tokens.segment_ids_BL)
        x_BLD = x_BLD + gate_a * self.out(attended.reshape(B, L, D))
        h = rms_normalise(x_BLD) * (1 + scale_m) + shift_m
        return x_BLD + gate_m * self.mlp(h)


class DiT(nnx.Module):
    """The transformer and its text encoder, trained jointly."""

    def __init__(self, config: Config, text: encoder.Config, patch_values: int, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.text = encoder.Encoder(text, rngs)
        init = input_init(config.widening)
        self.patches_in = Linear(patch_values, width, axes=(None, "embed"), rngs=rngs, init=init)
        self.text_in = Linear(text.features, width, axes=(None, "embed"), rngs=rngs, init=init)
        self.time = TimeEmbedding(width, config.widening, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.modulation = Linear(
            width, MODULATIONS * width, axes=("embed", None), rngs=rngs, init=zeros
        )

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs):
            return Block(config, rngs=rngs)

        self.blocks = stack(rngs)
        self.head_modulation = Linear(width, 2 * width, axes=("embed", None), rngs=rngs, init=zeros)
        self.head = Linear(width, patch_values, axes=("embed", None), rngs=rngs, init=zeros)

    def __call__(
        self,
        patches_BLP: jax.Array,
        text_ids_BL: jax.Array,
        times_BM3: jax.Array,
        tokens: Tokens,
    ) -> jax.Array:
        """What `config.prediction` says, for every token, float32 [B, L, P].

        `times_BM3[:, m]` are the times of segment m + 1.
        """
        dtype = jnp.dtype(self.config.dtype)
        B, L, _ = patches_BLP.shape
        is_text = tokens.is_text_BL[..., None].astype(dtype)
        features = self.text(
            text_ids_BL, tokens.is_text_BL, tokens.segment_ids_BL, tokens.positions_BL3, dtype
        )
        x_BLD = self.patches_in(patches_BLP.astype(dtype)) * (1 - is_text)
        x_BLD = x_BLD + self.text_in(features)

        # One row of modulation for each (segment, time); a product with ones gathers each token's,
        # because the gradient of a real gather is a slow scatter.
        segment = jnp.maximum(tokens.segment_ids_BL - 1, 0)
        row_BL = segment * 3 + tokens.time_index_BL
        embedded = jax.nn.silu(self.time(times_BM3.reshape(B, -1)).astype(dtype))
        chosen_BLm = jax.nn.one_hot(row_BL, embedded.shape[1], dtype=dtype)
        modulation_BL6D = (chosen_BLm @ self.modulation(embedded)).reshape(B, L, MODULATIONS, -1)

        graphdef, stacked = nnx.split(self.blocks)

        def body(x, layer):
            return nnx.merge(graphdef, layer)(x, modulation_BL6D, tokens), None

        if self.config.remat != "none":
            policy = REMAT_POLICIES[self.config.remat]
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        x_BLD, _ = jax.lax.scan(body, x_BLD, stacked, unroll=self.config.unroll)

        shift, scale = jnp.split(chosen_BLm @ self.head_modulation(embedded), 2, axis=-1)
        x_BLD = rms_normalise(x_BLD) * (1 + scale) + shift
        return self.head(x_BLD).astype(jnp.float32)
