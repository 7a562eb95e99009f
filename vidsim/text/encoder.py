"""Text ids to features: the one door through which language enters the transformer.

The diffusion transformer sees `features_BLF` and nothing of where they come from, so this encoder,
trained jointly from scratch, can be replaced by a frozen pretrained one.
"""

# B batch, L tokens, F features, N heads, K head dim

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vidsim.attention import segments
from vidsim.errors import InputError
from vidsim.layers import rotary
from vidsim.layers.linear import Linear, SwiGLU
from vidsim.layers.norms import RMSNorm, rms_normalise
from vidsim.layers.parameter import parameter, weight
from vidsim.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Config:
    vocabulary: int  # rows of the embedding; at least the tokenizer's
    features: int
    depth: int
    heads: int
    max_tokens: int  # longest prompt
    base_features: int  # the features that learning rates are found at (muP); 0: these

    def __post_init__(self):
        if self.depth and (self.features % self.heads or self.features // self.heads % 2):
            raise InputError(
                f"features={self.features} over heads={self.heads} is not an even head "
                f"dimension, which dit.text.depth={self.depth} needs; choose features that are a "
                "multiple of twice the heads"
            )
        if self.base_features < 0:
            raise InputError(f"base_features={self.base_features} is negative; use features, or 0")

    @property
    def widening(self) -> float:
        """How many times more features there are than learning rates are found at."""
        return self.features / (self.base_features or self.features)


class Block(nnx.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width, self.heads = config.features, config.heads
        self.norm_attention, self.norm_mlp = RMSNorm(width), RMSNorm(width)
        self.qkv = Linear(width, 3 * width, axes=("embed", "heads"), rngs=rngs)
        self.out = Linear(width, width, axes=("heads", "embed"), rngs=rngs)
        self.mlp = SwiGLU(width, 2 * width, rngs=rngs)

    def __call__(self, x_BLF, segment_ids_BL, rotation):
        B, L, F = x_BLF.shape
        # Head by head, so that devices can share the heads.
        heads = sharding.own(self.heads, "heads")
        qkv = self.qkv(self.norm_attention(x_BLF)).reshape(B, L, heads, 3, F // self.heads)
        q, k, v = (qkv[:, :, :, i] for i in range(3))
        q, k = (rotary.rotate(rms_normalise(x), rotation) for x in (q, k))
        attended = segments.attend(q, k, v, segment_ids_BL)
        x_BLF = x_BLF + self.out(attended.reshape(B, L, -1))
        return x_BLF + self.mlp(self.norm_mlp(x_BLF))


class Encoder(nnx.Module):
    """A bidirectional transformer over the text tokens of packed rows."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocabulary, config.features)
        init = nnx.initializers.normal(0.02)
        self.embedding = parameter(init, shape, axes=("vocab", "embed"), rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
        self.norm = RMSNorm(config.features)

    def __call__(
        self,
        text_ids_BL: jax.Array,
        is_text_BL: jax.Array,
        segment_ids_BL: jax.Array,
        positions_BL3: jax.Array,
        dtype,
    ) -> jax.Array:
        """Features [B, L, F]; zero where there is no text."""
        # Looked up in float32: the gradient sums over all tokens of a kind.
        table = weight(self.embedding, jnp.float32, whole=True)
        x_BLF = table[text_ids_BL].astype(dtype)
        # What is no text is padding here, so attention costs what the prompts cost.
        segment_ids_BL = jnp.where(is_text_BL, segment_ids_BL, 0)
        turned = rotary.rotation(positions_BL3, self.config.features // self.config.heads)
        for block in self.blocks:
            x_BLF = block(x_BLF, segment_ids_BL, turned)
        return self.norm(x_BLF) * is_text_BL[..., None].astype(dtype)
