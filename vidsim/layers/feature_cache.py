"""The feature cache: what causal layers remember of a clip, so that it can go through in chunks.

A causal convolution of K time taps needs the last K - 1 frames before a chunk. Each layer keeps its
own, and a clip in chunks gives what the whole clip gives. A whole clip is one chunk.
"""

# B batch, T frames, H height, W width, C channels

import jax
import jax.numpy as jnp


class FeatureCache:
    """What the layers of one network saw before a chunk: an entry a layer, in the order they run.

    Layers take their entry from `before` and put what the next chunk needs into `after`. An entry
    is the last frames that a layer saw, or the list of entries of a group of layers.

    Args:
      before: `after` of the chunk before; None at the start of a clip.
      inside: whether each position of a frame is not padding, bool [B, H, W] at the sides that the
        network takes; None when nothing is padding.
    """

    def __init__(self, before: list | None = None, inside: jax.Array | None = None):
        self.is_start = before is None
        self.before = before
        self.after = []
        self.inside = inside

    def extend(self, x_BTHWC: jax.Array, count: int, *, repeat: bool = False) -> jax.Array:
        """Frames with `count` frames of the past in front of them.

        Before a clip that is zeros, or with `repeat` its first frame again.
        """
        if not self.is_start:
            past = self.before[len(self.after)]
        elif repeat:
            past = jnp.repeat(x_BTHWC[:, :1], count, axis=1)
        else:
            past = jnp.zeros((x_BTHWC.shape[0], count, *x_BTHWC.shape[2:]), x_BTHWC.dtype)
        x = jnp.concatenate([past, x_BTHWC], axis=1)
        self.after.append(x[:, -count:])
        return x

    def run(self, layer, x_BTHWC: jax.Array, frames: int) -> jax.Array:
        """Runs a group of layers over so many frames at a time: that bounds their memory.

        A first chunk goes through whole: its first frame is another thing than the rest.
        """
        B, T, *frame = x_BTHWC.shape
        before = None if self.is_start else self.before[len(self.after)]
        if self.is_start or frames >= T:
            group = FeatureCache(before, self.inside)
            y = layer(x_BTHWC, group)
            self.after.append(group.after)
            return y

        def step(before, some_BTHWC):
            group = FeatureCache(before, self.inside)
            y = layer(some_BTHWC, group)
            return group.after, y

        xs = x_BTHWC.reshape(B, T // frames, frames, *frame).swapaxes(0, 1)
        after, ys = jax.lax.scan(step, before, xs)
        self.after.append(after)
        return ys.swapaxes(0, 1).reshape(B, -1, *ys.shape[3:])

    def at(self, height: int, width: int) -> jax.Array | None:
        """`inside` at the sides of a layer, bool [B, 1, height, width, 1]."""
        if self.inside is None:
            return None
        rows, columns = self.inside.shape[1] // height, self.inside.shape[2] // width
        return self.inside[:, None, ::rows, ::columns, None]

    def only_inside(self, x_BTHWC: jax.Array) -> jax.Array:
        """0 in the padding, as what a convolution sees beyond the border."""
        inside = self.at(*x_BTHWC.shape[2:4])
        return x_BTHWC if inside is None else jnp.where(inside, x_BTHWC, 0)


def inside(sizes_B2: jax.Array, height: int, width: int) -> jax.Array:
    """bool [B, height, width]: what lies in clips of `sizes_B2`, height and width in pixels."""
    rows, columns = sizes_B2[:, 0, None, None], sizes_B2[:, 1, None, None]
    return (jnp.arange(height)[:, None] < rows) & (jnp.arange(width) < columns)
