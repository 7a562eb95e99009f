"""The stages before training: world, shards, tokenizer; and the latents between the trainings."""

import jax

from vidsim.data import latents, prepare, tfds_source
from vidsim.data.windows import windows_of
from vidsim.errors import InputError
from vidsim.parallel import multihost
from vidsim.sampling import generate
from vidsim.stages import curriculum
from vidsim.stages.run import Run, latent_mark, load_vae
from vidsim.text import tokenizer
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


def check_rows(run: Run) -> None:
    """Finds before anything is trained what would stop the transformer after hours.

    Raises:
        InputError: one latent frame of a clip does not fit a row.
    """
    for number, phase in enumerate(run.phases, 1):
        own = number == len(run.phases)
        area, rows = ("latents", "dit.pack") if own else (f"dit.earlier[{number - 1}]",) * 2
        longest = phase.pack.lengths[-1]
        windows = windows_of(run.clips.index, run.stride, area=phase.latents.area, max_frames=1)
        largest = max(windows, key=lambda window: window.height * window.width, default=None)
        if largest is None:
            return  # encoding says so
        tokens = largest.height * largest.width // run.stride.token**2 + 1
        if tokens > longest:
            raise InputError(
                f"one latent frame of {run.clips.index[largest.record]['id']} at {largest.width}x"
                f"{largest.height} and its caption need {tokens} tokens or more, and rows have "
                f"{longest}; lower {area}.area={phase.latents.area}, or raise {rows}.lengths"
            )


def encode_latents(run: Run) -> dict:
    """Every host encodes its pieces on its own devices; process 0 writes the index."""
    models = load_vae(run)

    def encode(folder: str, config: latents.Config) -> dict:
        plan = latents.plan(
            run.clips.index,
            config,
            stride=run.stride,
            channels=run.vae.latent_channels,
            mark=latent_mark(run, models, config),
        )

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
