"""Checkpoints: the state and, beside it, the position in the plan of the data."""

import os
import pathlib

import jax
from orbax.checkpoint import v1 as ocp

from vidsim.errors import InputError
from vidsim.training.state import TrainState

policies = ocp.training.preservation_policies


class Checkpoints:
    """The checkpoints of one run, saved in the background and renamed into place when whole."""

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2):
        self.folder = pathlib.Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
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

    def save(self, state: TrainState, *, step: int, index_hash: str) -> None:
        """Starts saving; returns once the arrays are copied. Saves nothing twice."""
        if self.latest == step:
            return
        position = {"step": step, "index_hash": index_hash}
        self._checkpointer.save_async(step, state, force=True, custom_metadata=position)

    def restore(self, abstract_state: TrainState, *, index_hash: str) -> TrainState:
        """The newest state, on the shardings of `abstract_state`.

        Raises:
          InputError: the data are not those that the run was trained on.
        """
        metadata = self._checkpointer.metadata(self.latest)
        saved = (metadata.custom_metadata or {}).get("index_hash")
        if saved != index_hash:
            raise InputError(
                f"{self.folder} was trained on data with index {saved}, the data now have "
                f"{index_hash}; restore the data, or start a new --workdir"
            )
        return self._checkpointer.load(self.latest, abstract_state)

    def wait(self) -> None:
        self._checkpointer.wait()

    def close(self) -> None:
        self._checkpointer.close()


def load_part(folder: str | os.PathLike, part: str, abstract):
    """One field of the newest state in `folder`, such as `ema`, on this process's first device.

    It only reads, so the run may be saving meanwhile, and the mesh that it trains on does not
    matter. Every process reads all of it, and all must call it: Orbax counts its operations, and
    after one that it did alone a process would wait for the others at the next for ever.

    Raises:
      InputError: there is no checkpoint.
    """
    folder = pathlib.Path(folder).absolute()
    if not folder.is_dir():
        raise InputError(f"no checkpoints at {folder}; train first, or give an exported folder")
    # A checkpoint is renamed to its step, a number, when it is whole.
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    if not steps:
        raise InputError(f"{folder} holds no checkpoint yet; train on, or give another run")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    there = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract
    )
    process = jax.process_index()
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    context.multiprocessing.primary_host = process
    context.multiprocessing.active_processes = {process}
    with context:
        return ocp.load(folder / str(max(steps)), {part: there})[part]
