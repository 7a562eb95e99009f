"""Rows of frames split over devices, beside whole frames, in a process with four devices."""

import textwrap

import pytest

# Prints a JSON line: how far results are from those of one device, over their own size, and what
# the program that decodes exchanges between devices.
CODE = """
    import json, re, sys
    import jax, jax.numpy as jnp, numpy as np
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec
    from tests.models.test_autoencoder import CONFIGS, Case
    from vidsim.layers import wan
    from vidsim.models import autoencoder, vae

    wan.QUERIES = 1  # columns one after the other, as of large frames
    config = CONFIGS[sys.argv[1]][0]
    space = config.compression[1]
    case = Case(config, (8 * space, 2 * space))
    video, z = case.video[:1, :5], case.z[:1, :2]
    mesh = jax.make_mesh((4,), ("sequence",), (jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec(None, None, "sequence"))

    found = {}
    for name, x, function in (
        ("encode", video, autoencoder._encode_chunk),
        ("decode", z, autoencoder._decode_chunk),
    ):
        rest = [None] * (2 if name == "encode" else 1)
        apart = jax.device_put(x, split)
        with autoencoder._laid_out_as(apart):
            compiled = function.lower(*case.parts, apart, *rest).compile()
        text = compiled.as_text()
        whole = np.asarray(getattr(autoencoder, name)(*case.parts, x))
        off = np.abs(np.asarray(compiled(*case.parts[1:], apart, *rest)[0]) - whole).max()
        found[name] = {
            "off": float(off / np.abs(whole).max()),
            "permutes": text.count("collective-permute("),
            "others": re.findall(r"= \\w+\\[([\\d,]+)\\]\\S* all-[a-z-]+\\(", text),
        }

    if isinstance(config, vae.Config):  # it is trained here
        def loss(video):
            model = nnx.merge(case.graph, case.params)
            return jnp.sum(jnp.square(model.reconstruct(model.posterior(video)[0]) - video))

        step = jax.jit(jax.grad(loss))
        wanted = step(video)
        with autoencoder._laid_out_as(apart := jax.device_put(video, split)):
            off = np.abs(np.asarray(step(apart)) - wanted).max()
        found["gradient"] = {"off": float(off / np.abs(wanted).max())}
    print(json.dumps(found))
"""


@pytest.mark.parametrize("network", ["own", "wan 2.2"])
def test_rows_that_are_split_meet_only_at_their_borders(network, new_process):
    """No device holds the whole height of what all compute, and all is what one device computes.

    Beside rows of neighbours only what an attention compares travels, at the sides of latents.
    """
    found = new_process(
        *("-c", textwrap.dedent(CODE), network), JAX_NUM_CPU_DEVICES="4", JAX_PLATFORMS="cpu"
    ).summary
    for row in found.values():
        assert row["off"] < 1e-4, found  # sums in another order
    for name in ("encode", "decode"):
        assert found[name]["permutes"] > 0
        exchanged = [list(map(int, sides.split(",")))[1:3] for sides in found[name]["others"]]
        assert (network == "own") == (not exchanged), found
        assert all(rows <= 8 and columns <= 2 for rows, columns in exchanged), found
