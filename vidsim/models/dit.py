"""The diffusion transformer: one stream of text tokens and spacetime patches in packed rows.

    x = project(patches) + project(text features)
    x = x + gate_a * attention(scale_a * norm(x) + shift_a)        per block, adaLN-single with a
    x = x + gate_m * swiglu(scale_m * norm(x) + shift_m)           learned bias (arXiv:2310.00426)
    x0_hat = head(scale * norm(x) + shift)

Every token has a diffusion time of its own, by index: a row holds at most M segments and a segment
at most three times, so the modulation is computed for [B, M, 3] and gathered.
"""

# B batch (rows), L tokens, P patch values, D width, N heads, K head dim, M segments a row, S = 3 M

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vidsim import config as configs
from vidsim import trees
from vidsim.attention import segments
from vidsim.attention import tiles as sliding
from vidsim.diffusion import flow
from vidsim.errors import InputError
from vidsim.layers import quantised, rotary
from vidsim.layers.kept import kept
from vidsim.layers.linear import Linear, SwiGLU, xavier
from vidsim.layers.norms import rms_normalise, scaled
from vidsim.layers.parameter import check_dtype, parameter
from vidsim.layers.time_embedding import TimeEmbedding
from vidsim.parallel import sharding
from vidsim.text import encoder

MODULATIONS = 6  # shift, scale, gate of attention and of the MLP

# The tensors of a layer that cost time to make again, and their values a token (H: mlp_hidden).
TENSORS = (
    "layer_input",  # D; on the device in any case, unless it is offloaded
    "qkv",  # 3 D
    "attended",  # D, with the log sum exp of attention
    "attention_out",  # D
    "mlp_hidden",  # 2 H
    "mlp_out",  # D
)


@dataclasses.dataclass(frozen=True)
class Remat:
    """Which tensors of a layer wait for the backward pass; it makes all others again."""

    save: tuple[str, ...] = ()  # in the device's memory
    offload: tuple[str, ...] = ()  # in the host's

    def __post_init__(self):
        named = (*self.save, *self.offload)
        unknown = [name for name in named if name not in TENSORS]
        if unknown:
            raise InputError(f"remat: {unknown[0]!r} is none of the tensors {', '.join(TENSORS)}")
        if len(set(named)) < len(named):
            raise InputError(
                f"remat: save={self.save} and offload={self.offload} name a tensor twice; "
                "name each once"
            )

    def policy(self):
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=self.save,
            names_which_can_be_offloaded=self.offload,
            offload_src="device",
            offload_dst="pinned_host",
        )


REMAT_POLICIES = {
    "none": None,  # everything waits, the gathered weights too
    "full": Remat(),
    "attention": Remat(save=("attended",)),
    "matmuls": Remat(save=("qkv", "attended", "attention_out", "mlp_hidden", "mlp_out")),
    "offload": Remat(offload=("layer_input", "attended")),
}


@dataclasses.dataclass(frozen=True)
class Config:
    width: int
    depth: int
    heads: int
    mlp_hidden: int
    patch: int  # latents along a side of one token
    prediction: str  # what the head predicts: x0 or velocity
    remat: str | Mapping | Remat  # one of REMAT_POLICIES, or what a `Remat` is to save and offload
    unroll: int  # layers in one body of the scan: more run faster on a CPU, and compile slower
    dtype: str  # of activations; norms, softmax and the loss are float32
    operands: str  # of the blocks' matrix products: int8, float8_e4m3fn; "": as activations
    base_width: int  # the width that learning rates are found at (muP); 0: this one
    # Rows of one video of this grid and its text see near tiles alone; None: all see everything.
    tiles: Mapping | sliding.Config | None = None

    def __post_init__(self):
        if self.width % self.heads or self.width // self.heads % 2:
            raise InputError(
                f"width={self.width} over heads={self.heads} is not an even head dimension; "
                "choose a width that is a multiple of twice the heads"
            )
        if self.prediction not in flow.PREDICTIONS:
            raise InputError(f"prediction={self.prediction!r} is none of {flow.PREDICTIONS}")
        if isinstance(self.remat, Mapping):
            object.__setattr__(self, "remat", configs.build(Remat, self.remat, where="remat"))
        elif not isinstance(self.remat, Remat) and self.remat not in REMAT_POLICIES:
            raise InputError(f"remat={self.remat!r} is none of {sorted(REMAT_POLICIES)}")
        if isinstance(self.tiles, Mapping):
            built = configs.build(sliding.Config, self.tiles, where="dit.model.tiles")
            object.__setattr__(self, "tiles", built)
        check_dtype(self.dtype)
        quantised.check(self.operands)
        if self.base_width < 0:
            raise InputError(f"base_width={self.base_width} is negative; use a width, or 0")

    @property
    def widening(self) -> float:
        """How much wider the network is than the one that learning rates are found at."""
        return self.width / (self.base_width or self.width)


def tiles_of(config: Config, text: encoder.Config, length: int) -> sliding.Config | None:
    """The sliding tiles of rows of `length` tokens: of those alone that are made for them."""
    tiles = config.tiles
    return tiles if tiles is not None and length == tiles.tokens + text.max_tokens else None


def seen(config: Config, text: encoder.Config, length: int) -> float:
    """The share of the pairs of tokens of a row's one segment that see each other."""
    tiles = tiles_of(config, text, length)
    return 1.0 if tiles is None else tiles.share(length)


# Matrices that map all of the width and that AdamW serves: their updates add up over the width.
_SUMMED_OVER_WIDTH = ("time/second/", "modulation/", "head_modulation/", "head/")


def adam_factor(config: Config, text: encoder.Config, name: str) -> float:
    """What AdamW's rate of a parameter is multiplied by, for muP (Table 8, arXiv:2203.03466).

    With Muon's spectral scale on the hidden matrices, and heads of one dimension at all widths,
    every update then moves activations by as much at any width, and the best rates of a narrow
    network are those of a wide one. Updates of the map of text add up over its features.
    """
    if name.startswith("text_in/"):
        return 1.0 / text.widening
    return 1.0 / config.widening if name.startswith(_SUMMED_OVER_WIDTH) else 1.0


def computed_with(config: Config, params):
    """Parameters with the kernels of the blocks in `config.dtype`, as products take them.

    What the network gives is the same to the bit; in bfloat16 they take half the memory.
    """

    def one(name, leaf):
        of_blocks = name.startswith("blocks/") and name.endswith("kernel")
        return leaf.astype(config.dtype) if of_blocks else leaf

    return trees.map_named(one, params)


def input_init(widening: float, of_inputs: float = 1.0):
    """Xavier of the base width and inputs: what comes in has the same size, whatever both are."""

    def init(key, shape, dtype):
        fan_in, fan_out = shape
        variance = (fan_in + fan_out) / (fan_in + fan_out * of_inputs / widening)
        return xavier(key, shape, dtype) * variance**0.5

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


def picked(chosen_BLS: jax.Array, rows_BSD: jax.Array) -> jax.Array:
    """The row of each token, by a product with ones: the gradient of a gather is a slow scatter."""
    dtype = rows_BSD.dtype
    if sharding.platform() == "cpu":  # products of so few rows are slow in bfloat16
        chosen_BLS, rows_BSD = (x.astype(jnp.float32) for x in (chosen_BLS, rows_BSD))
    return (chosen_BLS @ rows_BSD).astype(dtype)


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

    def __call__(self, x_BLD, modulation_BS6D, chosen_BLS, rotation, segment_ids_BL, tiles=None):
        """`chosen_BLS` is 1 where a token's segment and time are those of a row of modulation."""
        B, L, D = x_BLD.shape
        heads, head_dim = sharding.own(self.heads, "heads"), D // self.heads
        modulation_BS6D = modulation_BS6D + self.modulation[...].astype(x_BLD.dtype)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            picked(chosen_BLS, modulation_BS6D[:, :, i]) for i in range(MODULATIONS)
        )
        x_BLD = kept(x_BLD, "layer_input")
        h = rms_normalise(x_BLD) * (1 + scale_a) + shift_a
        q, k, v = (
            kept(f(h), "qkv").reshape(B, L, heads, head_dim)
            for f in (self.query, self.key, self.value)
        )
        q = rotary.rotate(scaled(rms_normalise(q), self.query_scale[...]), rotation)
        k = rotary.rotate(scaled(rms_normalise(k), self.key_scale[...]), rotation)
        attended = segments.attend(q, k, v, segment_ids_BL, tiles)
        attended = kept(self.out(attended.reshape(B, L, -1)), "attention_out")
        x_BLD = x_BLD + gate_a * attended
        h = rms_normalise(x_BLD) * (1 + scale_m) + shift_m
        return x_BLD + gate_m * kept(self.mlp(h), "mlp_out")


class DiT(nnx.Module):
    """The transformer and its text encoder, trained jointly."""

    def __init__(self, config: Config, text: encoder.Config, patch_values: int, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.text = encoder.Encoder(text, rngs)
        axes, init = (None, "embed"), input_init(config.widening)
        self.patches_in = Linear(patch_values, width, axes=axes, rngs=rngs, init=init)
        init = input_init(config.widening, text.widening)
        self.text_in = Linear(text.features, width, axes=axes, rngs=rngs, init=init)
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

        `times_BM3[:, m]` are the times of segment m + 1. A row as long as `config.tiles` and the
        longest prompt is one video, frame by frame, and its text in the places behind the grid.
        """
        row = ("batch", "length")
        inputs = [patches_BLP, text_ids_BL, times_BM3, tokens]
        axes = [row, row, ("batch",), Tokens(*[row] * len(tokens))]
        length = patches_BLP.shape[1]
        tiles = tiles_of(self.config, self.text.config, length)
        if tiles is None:
            return sharding.spread(DiT._on_a_device, self, inputs, axes, row)
        # Of what comes in and goes out alone: a few values a token.
        order = tiles.order(length)
        inputs = [patches_BLP[:, order], text_ids_BL[:, order], times_BM3]
        inputs.append(jax.tree.map(lambda of_tokens: of_tokens[:, order], tokens))
        on_a_device = functools.partial(DiT._on_a_device, tiles=tiles)
        return sharding.spread(on_a_device, self, inputs, axes, row)[:, np.argsort(order)]

    def _on_a_device(
        self, patches_BLP, text_ids_BL, times_BM3, tokens: Tokens, tiles=None
    ) -> jax.Array:
        dtype = jnp.dtype(self.config.dtype)
        B = patches_BLP.shape[0]
        is_text = tokens.is_text_BL[..., None].astype(dtype)
        features = self.text(
            text_ids_BL, tokens.is_text_BL, tokens.segment_ids_BL, tokens.positions_BL3, dtype
        )
        x_BLD = self.patches_in(patches_BLP.astype(dtype)) * (1 - is_text)
        x_BLD = x_BLD + self.text_in(features)

        # One row of modulation for each (segment, time).
        segment = jnp.maximum(tokens.segment_ids_BL - 1, 0)
        row_BL = segment * 3 + tokens.time_index_BL
        embedded_BSD = jax.nn.silu(self.time(times_BM3.reshape(B, -1)).astype(dtype))
        chosen_BLS = jax.nn.one_hot(row_BL, embedded_BSD.shape[1], dtype=dtype)
        modulation = self.modulation(embedded_BSD).reshape(B, -1, MODULATIONS, self.config.width)

        graphdef, stacked = nnx.split(self.blocks)
        turned = rotary.rotation(tokens.positions_BL3, self.config.width // self.config.heads)
        of_row = modulation, chosen_BLS, turned, tokens.segment_ids_BL, tiles

        def body(x, layer):
            return nnx.merge(graphdef, layer)(x, *of_row), None

        remat = REMAT_POLICIES.get(self.config.remat, self.config.remat)
        if remat is not None:
            body = jax.checkpoint(body, policy=remat.policy(), prevent_cse=False)
        x_BLD, _ = jax.lax.scan(body, x_BLD, stacked, unroll=self.config.unroll)

        shift, scale = jnp.split(picked(chosen_BLS, self.head_modulation(embedded_BSD)), 2, axis=-1)
        x_BLD = rms_normalise(x_BLD) * (1 + scale) + shift
        return self.head(x_BLD).astype(jnp.float32)
