import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidsim import compiling
from vidsim.parallel import mesh as meshes


def options(platform, kind=""):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    return compiling.step_options(types.SimpleNamespace(devices=np.array([device])))


@pytest.mark.parametrize(
    ("kind", "torus"), [("TPU v5", True), ("TPU v5 lite", False), ("TPU v6 lite", False)]
)
def test_heads_are_exchanged_beside_what_computes_where_xla_can(kind, torus):
    found = options("tpu", kind)
    assert ("xla_tpu_enable_async_all_to_all" in found) == torus
    assert "xla_enable_async_all_gather" in found


def test_a_platform_without_options_has_none():
    assert options("gpu", "NVIDIA H100") == {}


def test_xla_takes_the_options_of_this_machine():
    mesh = meshes.make(meshes.Config(), jax.devices()[:1])
    double = jax.jit(lambda x: 2 * x, compiler_options=compiling.step_options(mesh))
    assert double(jnp.ones(())) == 2


def test_barriers_stand_between_what_is_fused_on_a_cpu():
    def turned(x):
        return jax.lax.optimization_barrier(jnp.sin(x) + x).T + 1

    mesh = meshes.make(meshes.Config(), jax.devices("cpu")[:1])
    program = jax.jit(turned, compiler_options=compiling.step_options(mesh))
    x = jnp.ones((32, 64))
    assert program.lower(x).compile().as_text().count(" fusion(") == 2
    # A sine in float32, fused otherwise.
    np.testing.assert_allclose(program(x), turned(x), rtol=1e-6)


def test_memory_goes_back_after_long_compiling_alone(monkeypatch):
    trimmed, listeners = [], []
    libc = types.SimpleNamespace(malloc_trim=trimmed.append)
    monkeypatch.setattr(compiling.ctypes, "CDLL", lambda _: libc)
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
    compiling.give_memory_back.__wrapped__()
    (ended,) = listeners
    ended("/jax/core/compile/jaxpr_trace_duration", 9.0)
    ended("/jax/core/compile/backend_compile_duration", 0.1)
    assert not trimmed
    ended("/jax/core/compile/backend_compile_duration", 9.0, fun_name="step")
    assert trimmed == [0]


def test_jax_tells_when_compiling_has_ended():
    """By the name that `give_memory_back` waits for."""
    events = []

    def seen(event, seconds, **_):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(seen)
    try:
        jax.jit(lambda x: x + jnp.pi)(jnp.ones(7))
    finally:
        jax.monitoring.unregister_event_duration_listener(seen)
    assert any(event.endswith("backend_compile_duration") for event in events)
