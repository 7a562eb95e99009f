"""How fast a training goes, told in its metrics at every logging interval.

    step_seconds_p50, step_seconds_p95   of the interval's steps, on all hosts together
    data_wait_share                      of their time that a host waited for data; the worst host's
    tokens_per_second_per_device         valid tokens
    mfu                                  model FLOPs of valid tokens (training/flops.py) a second,
                                         over what the devices can by datasheet (parallel/chips.py)
    first_step_seconds                   until the first step had ended, compiled and all: once

The numbers of an interval are those of the steps that were complete when its last one was under
way, so it begins and ends a step early; evaluations and checkpoints between steps do not count. A
host waits for a step when the next one is under way: the devices never wait for that. What is
counted of a step is summed on the devices, and the hosts' times are gathered there, too, and
fetched with the metrics.
"""

import contextlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vidsim.parallel import chips, multihost
from vidsim.training import flops

# What a batch is worth: model FLOPs ("flops") and valid tokens ("tokens"), where there are tokens.
Work = Callable[[dict], dict[str, jax.Array | float]]

# What this file writes to the metrics.
NAMES = (
    "step_seconds_p50",
    "step_seconds_p95",
    "data_wait_share",
    "tokens_per_second_per_device",
    "mfu",
    "first_step_seconds",
)


@jax.jit
def _tokens_and_pairs(segment_ids_BL, sizes_BM3):
    """Valid tokens, and sum s^2 over the segments."""
    numbers = jnp.arange(1, sizes_BM3.shape[1] + 1)
    sizes_BM = jnp.sum(segment_ids_BL[..., None] == numbers, axis=1, dtype=jnp.float32)
    return jnp.sum(sizes_BM), jnp.sum(jnp.square(sizes_BM))


def work_of_packs(cost: flops.PackCost, batch: dict, seen: float = 1.0) -> dict:
    """`seen` is the share of a segment's pairs of tokens that see each other."""
    tokens, pairs = _tokens_and_pairs(batch["segment_ids_BL"], batch["sizes_BM3"])
    return {"flops": cost.of(tokens, seen * pairs), "tokens": tokens}


def work_of_clips(config, batch: dict) -> dict:
    return {"flops": flops.of_autoencoder(config, *batch["video_BTHWC"].shape[:4])}


_add = jax.jit(lambda sums, more: jax.tree.map(jnp.add, sums, more))


class Throughput:
    """Times the steps of one training on this host; made when the training begins."""

    def __init__(self, mesh: jax.sharding.Mesh, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._devices = clock, mesh.devices.size
        self._chip = chips.of(mesh.devices.flat[0])
        self._begin, self._first = clock(), None
        self._told = False
        self._running = None  # an output of the step under way, and what its batch is worth
        self._since = None  # when the step under way can have begun
        self._clear()

    def _clear(self) -> None:
        self._seconds, self._waited, self._sums = [], 0.0, {}

    @contextlib.contextmanager
    def waiting(self):
        """Around the wait for a batch."""
        begin = self._clock()
        if self._since is None:
            self._since = begin
        yield
        self._waited += self._clock() - begin

    def dispatched(self, output: jax.Array, work: dict) -> None:
        """A step that returns `output` is under way; waits for the one before."""
        self._complete()
        self._running = output, work

    def pause(self) -> None:
        """Waits for the step under way; what comes until the next batch does not count."""
        self._complete()
        self._since = None

    def _complete(self) -> None:
        if self._running is None:
            return
        output, work = self._running
        self._running = None
        jax.block_until_ready(output)
        now = self._clock()
        if self._first is None:
            self._first = now - self._begin
            self._clear()
        else:
            self._seconds.append(now - self._since)
            self._sums = _add(self._sums, work) if self._sums else work
        self._since = now

    def interval(self, steps: int) -> dict:
        """What was counted since the last call, at most `steps` of them; to be fetched later."""
        row = np.full(1 + steps, np.nan, np.float32)
        row[0], row[1 : 1 + len(self._seconds)] = self._waited, self._seconds
        found = {"hosts": multihost.gathered(row), "work": self._sums}
        self._clear()
        return found

    def numbers(self, interval: dict) -> dict[str, float]:
        """The metrics of an interval that was fetched; none of one without a whole step."""
        waited_H, seconds_HS = interval["hosts"][:, 0], interval["hosts"][:, 1:]
        spent_H = np.nansum(seconds_HS, axis=1)
        found = {}
        if spent_H.all():
            p50, p95 = np.nanpercentile(seconds_HS, (50, 95))
            share = float(np.max(waited_H / spent_H))
            found = {"step_seconds_p50": p50, "step_seconds_p95": p95, "data_wait_share": share}
            device_seconds = self._devices * float(spent_H.max())
            if "tokens" in interval["work"]:
                rate = interval["work"]["tokens"] / device_seconds
                found["tokens_per_second_per_device"] = rate
            if self._chip:
                found["mfu"] = interval["work"]["flops"] / device_seconds / self._chip.flops
        if self._first is not None and not self._told:
            found["first_step_seconds"], self._told = self._first, True
        return found
