"""Numbers of speed, by a clock that the test winds."""

import jax.numpy as jnp
import numpy as np
import pytest

from vidsim.models import dit
from vidsim.parallel import chips, mesh
from vidsim.training import flops, throughput


class Clock:
    """Seconds that pass when a step is waited for, and when the test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def output(self, ends: float):
        """What a step returns that ends at a time."""

        class Output:
            def block_until_ready(_):
                self.now = max(self.now, ends)

        return Output()


@pytest.fixture
def timed(monkeypatch):
    """(clock, throughput) of a device of 1000 FLOP/s."""
    chip = chips.Chip("abacus", 1000.0, 1.0, 1.0)
    monkeypatch.setattr(chips, "of", lambda device: chip)
    clock = Clock()
    one = mesh.make(mesh.Config(), [np.array(jnp.zeros(()).devices()).item().pop()])
    return clock, throughput.Throughput(one, clock)


def step(clock, timing, *, waits: float, ends: float, work=None) -> None:
    with timing.waiting():
        clock.now += waits
    timing.dispatched(clock.output(ends), work or {"flops": 1.0})


def test_an_interval_tells_of_its_whole_steps_without_compilation(timed):
    clock, timing = timed
    work = {"flops": 300.0, "tokens": 40.0}
    step(clock, timing, waits=1.0, ends=101.0, work=work)  # compiles for 100 s
    step(clock, timing, waits=0.0, ends=103.0, work=work)
    step(clock, timing, waits=0.5, ends=105.0, work=work)
    step(clock, timing, waits=0.0, ends=111.0, work=work)
    # Steps of 2, 2 and 6 s have ended; that of 6 s is the one under way.
    found = timing.numbers(timing.interval(4))
    assert found["first_step_seconds"] == 101.0
    assert found["step_seconds_p50"] == pytest.approx(2.0)
    assert found["data_wait_share"] == pytest.approx(0.5 / 4)
    assert found["tokens_per_second_per_device"] == pytest.approx(80 / 4)
    assert found["mfu"] == pytest.approx(600 / 4 / 1000)
    timing.pause()
    later = timing.numbers(timing.interval(4))
    assert later["step_seconds_p50"] == later["step_seconds_p95"] == pytest.approx(6.0)
    assert "first_step_seconds" not in later


def test_what_happens_between_steps_does_not_count(timed):
    clock, timing = timed
    step(clock, timing, waits=0.0, ends=10.0)
    timing.pause()
    clock.now += 1000.0  # an evaluation
    step(clock, timing, waits=1.0, ends=1013.0)
    step(clock, timing, waits=0.0, ends=1015.0)
    found = timing.numbers(timing.interval(2))
    assert found["step_seconds_p95"] == pytest.approx(3.0)
    assert found["data_wait_share"] == pytest.approx(1 / 3)


def test_an_interval_without_a_whole_step_tells_nothing(timed):
    clock, timing = timed
    step(clock, timing, waits=0.0, ends=10.0)
    assert timing.numbers(timing.interval(1)) == {}


def test_percentiles_are_of_all_hosts_and_the_wait_of_the_worst(timed):
    _, timing = timed
    nan = np.nan
    hosts = np.array([[0.0, 1.0, 1.0, nan], [3.0, 1.0, 5.0, nan]])
    found = timing.numbers({"hosts": hosts, "work": {"flops": 1200.0}})
    assert found["step_seconds_p50"] == 1.0
    assert found["step_seconds_p95"] == pytest.approx(4.4)
    assert found["data_wait_share"] == pytest.approx(0.5)
    assert found["mfu"] == pytest.approx(1200 / 6 / 1000), "of the slowest host"


def test_padding_and_other_segments_are_worth_nothing():
    cost = flops.PackCost(token=10.0, pair=1.0)
    ids = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]])
    found = throughput.work_of_packs(
        cost, {"segment_ids_BL": ids, "sizes_BM3": jnp.ones((2, 4, 3), jnp.int32)}
    )
    assert float(found["tokens"]) == 7
    assert float(found["flops"]) == 10 * 7 + (9 + 4 + 4)


def test_model_flops_are_those_of_the_program_of_a_whole_row():
    """Up to what a row computes once a segment, and for its prompts."""
    import jax
    from flax import nnx

    from vidsim.text import encoder

    L, P = 512, 64
    config = dit.Config(64, 3, 4, 256, 1, "x0", "none", 1, "float32", "", 0)
    text = encoder.Config(vocabulary=8, features=8, depth=0, heads=1, max_tokens=4, base_features=0)
    graph, params = nnx.split(nnx.eval_shape(lambda: dit.DiT(config, text, P, nnx.Rngs(0))))

    def forward(params, patches, ids, positions, index):
        tokens = dit.Tokens(ids, positions, ids > 1, index)
        return nnx.merge(graph, params)(patches, ids, jnp.zeros((1, 1, 3)), tokens)

    shapes = [((1, L, P), jnp.float32), ((1, L), jnp.int32), ((1, L, 3), jnp.float32)]
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in (*shapes, ((1, L), jnp.int32))]
    counted = flops.TRAINING * flops.of_program(forward, params, *arrays)
    told = flops.of_packs(config, P).of(L, L**2)
    assert told < counted < 1.05 * told


def test_loops_choices_and_convolutions_are_counted():
    import jax

    def program(x, image, kernel):
        x, _ = jax.lax.scan(lambda x, _: (jax.checkpoint(jnp.dot)(x, x), None), x, length=7)
        x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x)
        y = jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x, y

    shapes = [(4, 4), (2, 6, 6, 3), (3, 3, 3, 5)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    products, taps = 8 * 4**3, 2 * 4 * 4 * 5 * 3 * 3 * 3
    assert flops.of_program(program, *arrays) == 2 * (products + taps)
