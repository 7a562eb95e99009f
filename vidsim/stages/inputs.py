"""The stages before training: world, shards, tokenizer; and the latents between the trainings."""

import math

import jax

from vidsim.data import latents, packing, pipeline, prepare, tfds_source
from vidsim.errors import InputError
from vidsim.parallel import multihost
from vidsim.parallel.sharding import ShardingRules
from vidsim.sampling import generate
from vidsim.stages import curriculum, tasks
from vidsim.stages.run import Run
from vidsim.stages.trained import latent_mark, load_vae
from vidsim.text import tokenizer
from vidsim.training import state
from vidsim.worlds import physics as world


def render_world(run: Run) -> dict:
    if not run.rendered:
        inputs = ", ".join(source.input for source in run.sources)
        return {"skipped": f"data come from {inputs}"}
    return multihost.run_once(lambda: world.write(run.world, run.path("world")), "worlds")


def prepare_shards(run: Run) -> dict:
    def work():
        counts = {}
        for source in run.sources:
            tfds_source.as_folder(source.input, run.path("tfds", source.name))
            done = prepare.prepare(run.shards_config(source), on=run.engine)
            counts[source.name] = {name: n for name, n in done.items() if name != "out"}
        return counts if run.data.sources else counts[""]

    return multihost.run_once(work, "prepare")


def train_tokenizer(run: Run) -> dict:
    def train():
        texts = [text for row in run.shards.index for text, _ in row["captions"]]
        found = tokenizer.train(
            texts, vocabulary=run.text.vocabulary, max_tokens=run.text.max_tokens
        )
        tokenizer.save(found, run.path("tokenizer.model"))
        return {"vocabulary": found.vocabulary, "texts": len(texts)}

    return multihost.run_once(train, "tokenizer")


def latent_plan(run: Run, config: latents.Config, mark: str = "planned") -> latents.Plan:
    """What is encoded of the clips; without a `mark`, as it will be once there is a VAE."""
    channels = run.vae.latent_channels
    return latents.plan(run.clips.index, config, stride=run.stride, channels=channels, mark=mark)


def check_mesh(run: Run) -> None:
    """Finds before any stage what of the transformer does not divide over the devices of this run.

    Raises:
        InputError: the mesh over the devices; rows or tokens of a phase, parameters or heads over
            the mesh.
    """
    for phase in run.phases:
        tasks.check_divides(phase.pack.rows, phase.pack.lengths, run.mesh)
    state.shardings_of_params(tasks.dit_task(run).make_model, run.mesh, ShardingRules())
    encoder = {"dit.text.heads": run.text.heads} if run.text.depth else {}
    for name, heads in ({"dit.model.heads": run.dit.heads} | encoder).items():
        parts = math.prod(run.mesh.shape[axis] for axis in ("tensor", "sequence"))
        if heads % parts:
            raise InputError(
                f"{name}={heads} do not divide over mesh tensor x sequence = {parts}; use a "
                f"multiple of {parts}, or a smaller axis"
            )


def check_rows(run: Run) -> None:
    """Finds before anything is trained what would stop the transformer after hours.

    Raises:
        InputError: in a phase no clip is as large as a token, none is left to train on, one latent
            frame of a clip and its caption do not fit a row, or the mix asks for a source, for
            images or for videos that are not there.
    """
    words = run.words()
    for number, phase in enumerate(run.phases, 1):
        own = number == len(run.phases)
        where = ("dit.pack", "latents") if own else (f"dit.earlier[{number - 1}]",) * 2
        rows = latent_plan(run, phase.latents).rows
        counts = pipeline.token_counts(rows, words, run.dit.patch, run.data.caption_weights)
        names = f"{where[0]}.lengths", f"{where[1]}.area={phase.latents.area}"
        packing.check_fits(counts, [row["id"] for row in rows], phase.pack, names=names)
        tasks.groups_of(rows, "train", phase.mix)


def encode_latents(run: Run) -> dict:
    """Every host encodes its pieces on its own devices; process 0 writes the index."""
    models = load_vae(run)

    def encode(folder: str, config: latents.Config) -> dict:
        plan = latent_plan(run, config, latent_mark(run, models, config))
        multihost.run_once(lambda: latents.begin(run.path(folder), plan), "latent folder")

        def encode_share():
            latents.encode(
                run.path(folder),
                plan,
                run.clips,
                generate.encoder_over(models, jax.local_devices()),
                hosts=(jax.process_index(), jax.process_count()),
                devices=jax.local_device_count(),
                threads=run.pipeline.threads,
            )

        multihost.run_everywhere(encode_share, "encode")
        return multihost.run_once(lambda: latents.finish(run.path(folder), plan), "latent index")

    found = {folder: encode(folder, config) for folder, config in run.caches.items()}
    return found if len(found) > 1 else found[curriculum.CACHE]
