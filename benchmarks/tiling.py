"""What tiles cost: PSNR of frames that go through a trained autoencoder in tiles and whole.

Trains the quickstart's autoencoder for some steps on its world, in a folder of its own, then takes
larger films of the same world there and back, whole and in tiles of 128x128 pixels.
"""

import subprocess
import sys
import tempfile

import numpy as np
from absl import app, flags

from benchmarks import claim

FORMAT = (256, 192, 17, 10)  # width, height, frames, frames/s
CLIPS = 4
TILE = 16  # latents along a side of a tile, of which a quarter overlaps
CONFIG = "experiments/quickstart.py"

STEPS = flags.DEFINE_integer("steps", 400, "Steps of training.")
RUN = flags.DEFINE_string("run", None, "A finished run to take the autoencoder of; trains none.")


def train(workdir: str, steps: int) -> None:
    """World, shards and autoencoder of the quickstart."""
    experiment = [f"--config={CONFIG}", f"--config.vae.loop.steps={steps}"]
    for verb in (
        ["worlds", *experiment, f"--out={workdir}/world"],
        ["prepare", f"--input={workdir}/world", f"--out={workdir}/shards", "--nofilters"],
        ["train", *experiment, "--model=vae", f"--workdir={workdir}"],
    ):
        done = subprocess.run([sys.executable, "-m", "vidsim.cli.main", *verb], stdout=sys.stderr)
        if done.returncode:
            raise SystemExit(done.returncode)


def main(workdir: str) -> dict:
    import dataclasses

    from vidsim.evaluation import reconstruction
    from vidsim.models import autoencoder
    from vidsim.stages import run as run_folder
    from vidsim.stages import trained
    from vidsim.worlds import physics

    run = run_folder.open_folder(workdir)
    parts = trained.load_vae(run).autoencoder()
    world = dataclasses.replace(run.world, clips=CLIPS, formats=(FORMAT,), seed=run.world.seed + 1)
    films = [physics.render(physics.simulate(world, index)) for index in range(CLIPS)]
    video = np.stack(films).astype(np.float32) / 127.5 - 1

    def psnr_db(tile: int | None) -> float:
        z = autoencoder.encode(*parts, video, tile=tile)
        error = np.asarray(autoencoder.decode(*parts, z, tile=tile)) - video
        return reconstruction.psnr_db(127.5**2 * np.mean(np.square(error)))

    whole, tiled = psnr_db(None), psnr_db(TILE)
    return claim(
        "vae.tiling_psnr_loss_db",
        whole - tiled,
        goal=0.1,
        better="lower",
        beside={"whole_db": whole, "tiled_db": tiled, "format": FORMAT, "tile_latents": TILE},
    )


def run(_) -> None:
    if RUN.value:
        main(RUN.value)
        return
    with tempfile.TemporaryDirectory() as folder:
        train(folder, STEPS.value)
        main(folder)


if __name__ == "__main__":
    app.run(run)
