import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidsim.layers.linear import gated, matmul


def arrays(dtype, inputs=24, outputs=40):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 30, inputs)).astype(np.float32)
    kernel = rng.normal(size=(inputs, outputs)).astype(np.float32)
    g = rng.normal(size=(2, 30, outputs)).astype(np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(kernel), jnp.asarray(g, dtype)


def value_and_gradient(product, x, kernel, g):
    y, pull = jax.vjp(product, x, kernel)
    return y, *pull(g)


@pytest.mark.parametrize("sizes", [(24, 40), (40, 24)], ids=["widens", "narrows"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_and_gradient_equal_einsum_of_the_same_operands(dtype, sizes):
    x, kernel, g = arrays(dtype, *sizes)
    found = jax.jit(value_and_gradient, static_argnums=0)(matmul, x, kernel, g)
    assert [array.dtype for array in found] == [dtype, dtype, jnp.float32]
    rounded = kernel.astype(dtype).astype(jnp.float32)
    exact = (x.astype(jnp.float32), rounded, g.astype(jnp.float32))
    expected = value_and_gradient(lambda x, w: jnp.einsum("BLD,DE->BLE", x, w), *exact)
    for ours, theirs in zip(found, expected, strict=True):
        # Rounded once at the end, where the result is bfloat16; sums of 60 terms around 1.
        rtol = 2.0**-8 if ours.dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(ours.astype(np.float32), theirs, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_map_over_an_axis(dtype):
    x, kernel, _ = arrays(dtype)
    kernels = jnp.stack([kernel, 2 * kernel])
    mapped = jax.vmap(matmul, in_axes=(None, 0))(x, kernels)
    one_by_one = jnp.stack([matmul(x, kernel), matmul(x, 2 * kernel)])
    np.testing.assert_array_equal(mapped.astype(np.float32), one_by_one.astype(np.float32))


def test_the_gate_rounds_once():
    gate, up = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 64)), jnp.bfloat16)
    exact = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    found = gated(gate, up).astype(jnp.float32)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16).astype(jnp.float32))


def test_gradient_of_the_gate_is_that_of_its_formula():
    gate, up = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32)
    ours = jax.grad(lambda pair: jnp.sum(jnp.sin(gated(*pair))))((gate, up))
    formula = jax.grad(lambda pair: jnp.sum(jnp.sin(jax.nn.silu(pair[0]) * pair[1])))((gate, up))
    for found, expected in zip(ours, formula, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_gradients_of_a_batch_on_several_devices_gather_nothing(new_process):
    code = """
        import jax, jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec as P
        from vidsim.layers.linear import matmul
        from vidsim.parallel import mesh as meshes, sharding

        mesh = meshes.make(meshes.Config(fsdp=4), jax.devices())
        batch = NamedSharding(mesh, P("fsdp"))
        whole = NamedSharding(mesh, P())

        def gradient(x, kernel):
            with sharding.using(mesh, sharding.ShardingRules()):
                return jax.grad(lambda w: jnp.sum(matmul(x, w) ** 2))(kernel)

        program = jax.jit(gradient, in_shardings=(batch, whole), out_shardings=whole)
        for inputs, outputs in ((24, 40), (40, 24)):
            x, kernel = jnp.ones((8, 64, inputs)), jnp.ones((inputs, outputs))
            text = program.lower(x, kernel).compile().as_text()
            assert "all-reduce" in text
            assert "all-gather" not in text
    """
    done = new_process("-c", textwrap.dedent(code), JAX_NUM_CPU_DEVICES="4", JAX_PLATFORMS="cpu")
    assert done.code == 0, done.stderr
