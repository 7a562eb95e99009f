import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidsim.layers.kept import kept


def layer(x, w):
    return jnp.sin(kept(x @ w, "product"))


def gradient(x, w, *, names):
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    loss = jax.checkpoint(lambda x, w: jnp.sum(layer(x, w).astype(jnp.float32)), policy=policy)
    return jax.grad(loss, argnums=(0, 1))(x, w)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_a_policy_names_waits_and_what_it_does_not_is_made_again(dtype):
    x, w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8)), dtype)
    programs = [
        str(jax.make_jaxpr(lambda x, w, names=names: gradient(x, w, names=names))(x, w))
        for names in (("product",), ())
    ]
    # Forward and both gradients; without the name the product once more.
    assert [program.count("dot_general") for program in programs] == [3, 4]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_name_changes_neither_value_nor_gradient(dtype):
    x, w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8)), dtype)

    def plain(x, w):
        return jnp.sum(jnp.sin(x @ w).astype(jnp.float32))

    assert jnp.array_equal(kept(x, "product"), x)
    expected = jax.grad(plain, argnums=(0, 1))(x, w)
    for ours, theirs in zip(gradient(x, w, names=("product",)), expected, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours.astype(np.float32), theirs.astype(np.float32))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="bits are for CPUs")
def test_bfloat16_waits_as_its_bits_in_a_scan_over_layers():
    """A float32 stack of what all layers keep is what XLA on a CPU would make of it."""
    x = jnp.ones((8, 8), jnp.bfloat16)
    stack = jnp.ones((3, 8, 8), jnp.bfloat16)

    def loss(x, stack):
        policy = jax.checkpoint_policies.save_only_these_names("product")
        body = jax.checkpoint(lambda x, w: (layer(x, w), None), policy=policy, prevent_cse=False)
        return jnp.sum(jax.lax.scan(body, x, stack)[0].astype(jnp.float32))

    _, pull = jax.vjp(loss, x, stack)
    waiting = [str(leaf.dtype) for leaf in jax.tree.leaves(pull) if leaf.shape == (3, 8, 8)]
    # The inputs of layers and the kernels wait as they are.
    assert sorted(waiting) == ["bfloat16", "bfloat16", "uint16"]
