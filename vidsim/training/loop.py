"""The one training loop, for every model.

Order within an iteration: evaluate, checkpoint, and only then fetch data and step. So a checkpoint
of step n and the data position n always agree, and a resumed run repeats what the uninterrupted one
did. Metrics of a step are fetched after the next one is under way: the device never waits for them.
No more than two steps are under way at once, so that each can be timed.
SIGTERM and Ctrl-C save at once, without the evaluation that may be due: the next start makes up for
it. A second Ctrl-C ends at once.
"""

import dataclasses
import signal
import sys
from collections.abc import Callable, Iterable, Iterator

import jax
from jax.experimental import multihost_utils

from vidsim import progress
from vidsim.data import index
from vidsim.errors import InputError, Restart
from vidsim.parallel import multihost
from vidsim.training.checkpoint import Checkpoints
from vidsim.training.metrics import MetricsWriter, has_evaluation
from vidsim.training.profile import Trace
from vidsim.training.state import TrainState
from vidsim.training.throughput import Throughput, Work

MOST_SKIPPED = 20  # steps in a row: a model that does not recover from so many never will


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int
    log_every: int
    checkpoint_every: int
    evaluate_every: int


# (state, step) -> pairs (name, value) for the metrics
Evaluator = Callable[[TrainState, int], Iterable[tuple[str, float]]]


class Preemption:
    """Whether SIGTERM or Ctrl-C came, agreed on by all processes at one step."""

    def __enter__(self):
        self._received = self.interrupted = False
        # With several processes jax's own service listens to SIGTERM and agrees on the step.
        self._alone = jax.process_count() == 1
        handlers = {signal.SIGINT: self._interrupt}
        if self._alone:
            handlers[signal.SIGTERM] = self._receive
        self._previous = {number: signal.signal(number, do) for number, do in handlers.items()}
        return self

    def __exit__(self, *_):
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _receive(self, *_):
        self._received = True

    def _interrupt(self, *_):
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second ends at once
        signal.raise_signal(signal.SIGTERM)

    def at(self, step: int) -> bool:
        if self._alone:
            return self._received
        return multihost_utils.reached_preemption_sync_point(step)


@jax.jit
def _in_a_row(count, skipped):
    return (count + 1) * skipped


def run(
    config: Config,
    state: TrainState,
    step_fn,
    *,
    batches: Callable[[int], Iterator],
    evaluators: dict[str, Evaluator],
    checkpoints: Checkpoints,
    data: index.Summary,
    timing: Throughput,
    work: Work,
    folder: str,
    name: str,
    profile: range = range(0),
) -> TrainState:
    """Trains from `state.step` to `config.steps` and returns the last state, saved.

    Args:
      step_fn: `(state, batch) -> (state, metrics)` of `make_step`.
      batches: the iterator of global batches from a step on; pure in the step.
      data: what they come from, as checkpoints remember it.
      evaluators: by name; their values are logged as `name/value`.
      work: what a batch is worth, for the numbers of `timing`.
      profile: the steps to trace, into `folder`.

    Raises:
      InputError: `MOST_SKIPPED` steps in a row, or more, were not finite when one was logged.
      Restart: SIGTERM came; the state is saved.
      KeyboardInterrupt: Ctrl-C came; the state is saved.
    """
    first = int(state.step)
    evaluated = multihost.run_once(lambda: has_evaluation(folder, first), f"{name} evaluated")
    writer = MetricsWriter(folder, step=first) if multihost.is_main() else None
    if writer and first:
        print(f"{name} resumes at step {first}", file=sys.stderr)
    if writer and profile and max(first, profile.start) >= min(config.steps, profile.stop):
        text = f"--profile={profile.start}:{profile.stop} traces none of the steps of {name}"
        print(f"{text}: {first} to {config.steps}", file=sys.stderr)
    pending: tuple[int, dict, dict] | None = None
    skipped = 0.0  # steps in a row, counted on the device

    def log():
        nonlocal pending
        if pending is None:
            return
        step, metrics, interval = pending
        pending = None
        metrics, interval = multihost.fetch((metrics, interval))
        metrics |= timing.numbers(interval)
        bar.set_postfix(loss=f"{float(metrics['loss']):.4f}", refresh=False)
        if writer:
            writer.write(step, metrics)
        in_a_row = int(multihost.fetch(skipped))
        if in_a_row >= MOST_SKIPPED:
            raise InputError(
                f"{name}: the last {in_a_row} steps to step {step} gave a loss or gradient that is "
                "not finite; its checkpoints are kept; use a new --workdir with a lower "
                "learning_rate in its optimizer, or other data"
            )

    stream = None
    with (
        Preemption() as preemption,
        Trace(f"{folder}/profile", profile) as trace,
        progress.bar(total=config.steps, desc=name, unit="step", initial=first) as bar,
    ):
        for step in range(first, config.steps + 1):
            last = step == config.steps
            stop = preemption.at(step)
            due = step > 0 and (last or step % config.evaluate_every == 0)
            if due and not stop and not (step == first and evaluated):
                timing.pause()
                log()
                for label, evaluate in evaluators.items():
                    values = {f"{label}/{key}": value for key, value in evaluate(state, step)}
                    if writer and values:
                        writer.write(step, values)
                    # Process 0 may evaluate for longer than the others' collectives wait.
                    multihost.barrier(f"{name} evaluated {label}")
            if stop or last or (step > first and step % config.checkpoint_every == 0):
                timing.pause()
                log()
                checkpoints.save(state, step=step, data=data)
            if stop or last:
                break
            if stream is None:
                stream = batches(step)
            trace.before(step, timing.pause)
            with timing.waiting():
                batch = next(stream)
            state, metrics = step_fn(state, batch)
            timing.dispatched(metrics["loss"], work(batch))
            log()
            skipped = _in_a_row(skipped, metrics["skipped"])
            if (step + 1) % config.log_every == 0:
                pending = (step + 1, metrics, timing.interval(config.log_every))
            if step == first:
                bar.unpause()  # the time to compile says nothing of the steps to come
            bar.update()
        checkpoints.wait()
        if writer:
            writer.close()
        # It may have come during the last evaluation, too late for the loop.
        stop = stop or preemption.at(step + 1)
    if stop:
        error, what = (
            (KeyboardInterrupt, "Ctrl-C") if preemption.interrupted else (Restart, "SIGTERM")
        )
        raise error(f"{name} stopped by {what} after saving step {step}; start it again")
    return state
