"""Checkpoints: the state and, beside it, the position in the plan of the data.

The position is the step and the hash of the index that the plan was made of. Where the data are
others, step n of the plan is another batch: by default that is an error which says what changed.
With the policy "restart_epoch" training goes on from its step with the plan of the new data: the
state is kept, and samples of the epoch that is broken off may come again or not at all. From the
next epoch on every sample comes once.
"""

import dataclasses
import functools
import os
import pathlib

import jax
from orbax.checkpoint import v1 as ocp

from vidsim.data import index
from vidsim.errors import InputError
from vidsim.training.state import TrainState

ON_CHANGE = ("error", "restart_epoch")
policies = ocp.training.preservation_policies


class Checkpoints:
    """The checkpoints of one run, saved in the background and renamed into place when whole."""

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2):
        self.folder = pathlib.Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._indices = self.folder.with_name("indices")
        self._checkpointer = ocp.training.Checkpointer(
            str(self.folder),
            save_decision_policy=ocp.training.save_decision_policies.AnySavePolicy([]),
            preservation_policy=policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    def save(self, state: TrainState, *, step: int, data: index.Summary) -> None:
        """Starts saving; returns once the arrays are copied. Saves nothing twice."""
        if self.latest == step:
            return
        if jax.process_index() == 0:
            data.write(self._indices)
        position = {"step": step, "index_hash": data.hash}
        self._checkpointer.save_async(step, state, force=True, custom_metadata=position)

    def changed(self, data: index.Summary) -> index.Change | None:
        """What is other than in the data of the newest checkpoint; None where nothing is."""
        metadata = self._checkpointer.metadata(self.latest)
        saved = (metadata.custom_metadata or {}).get("index_hash")
        if saved == data.hash:
            return None
        before = index.read_summary(self._indices, saved)
        what = f"index {saved} -> {data.hash}"
        if before is None:
            return index.Change(0, 0, 0, what)
        change = index.difference(before, data)
        return dataclasses.replace(change, text=f"{what}: {change.text}")

    def restore(
        self, abstract_state: TrainState, *, data: index.Summary, on_change: str = "error"
    ) -> TrainState:
        """The newest state, on the shardings of `abstract_state`.

        Raises:
          InputError: the data are not those that the run was trained on, and `on_change` is not
            "restart_epoch".
        """
        change = self.changed(data)
        if change is not None and on_change != "restart_epoch":
            raise InputError(
                f"{self.folder} was trained on other data ({change.text}); restore the data, "
                f"set data.on_change=restart_epoch to go on from step {self.latest} in the order "
                "of the new data, or start a new --workdir"
            )
        return self._checkpointer.load(self.latest, abstract_state)

    def wait(self) -> None:
        self._checkpointer.wait()

    def close(self) -> None:
        self._checkpointer.close()


def steps(folder: str | os.PathLike) -> list[int]:
    """The steps of the whole checkpoints in `folder`, in order."""
    # A checkpoint is renamed to its step, a number, when it is whole.
    return sorted(int(path.name) for path in pathlib.Path(folder).glob("*") if path.name.isdigit())


def newest(folder: str | os.PathLike) -> int | None:
    """The step of the newest whole checkpoint in `folder`; None where there is none."""
    return max(steps(folder), default=None)


def path_of(folder: str | os.PathLike, step: int | None = None) -> pathlib.Path:
    """The whole checkpoint of `step` in `folder`, by default the newest.

    Raises:
      InputError: there is none.
    """
    folder = pathlib.Path(folder).absolute()
    found = steps(folder)
    if not found:
        raise InputError(
            f"no checkpoints at {folder}; `vidsim train --model={folder.parent.name}` first"
        )
    if step is None:
        step = found[-1]
    if step not in found:
        raise InputError(
            f"no checkpoint of step={step} at {folder}, which keeps steps "
            f"{', '.join(map(str, found))}; use --step={found[-1]} for the newest"
        )
    return folder / str(step)


def load_part(folder: str | os.PathLike, part: str, abstract, step: int | None = None):
    """One part of a state, such as `params`, on this process's first device.

    The state is that of `step`, by default the newest. A part may be inside of another: `ema/0.05`.

    It only reads, so the run may be saving meanwhile, and the mesh that it trains on does not
    matter. Every process reads all of it, and all must call it: Orbax counts its operations, and
    after one that it did alone a process would wait for the others at the next for ever.

    Raises:
      InputError: there is no such checkpoint.
    """
    path = path_of(folder, step)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    there = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract
    )
    process = jax.process_index()
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    context.multiprocessing.primary_host = process
    context.multiprocessing.active_processes = {process}
    names = part.split("/")
    wanted = functools.reduce(lambda tree, name: {name: tree}, reversed(names), there)
    with context:
        loaded = ocp.load(path, wanted)
    return functools.reduce(lambda tree, name: tree[name], names, loaded)
