"""The stages before training: world, shards, tokenizer; and the latents between the trainings."""

import functools

from vidsim.data import latents, prepare
from vidsim.parallel import multihost
from vidsim.sampling import generate
from vidsim.stages.run import Run, latent_mark, load_vae
from vidsim.text import tokenizer
from vidsim.worlds import physics as world


def render_world(run: Run) -> dict:
    if run.data.input:
        return {"skipped": f"data come from {run.data.input}"}
    return multihost.run_once(lambda: world.write(run.world, run.path("world")), "worlds")


def prepare_shards(run: Run) -> dict:
    def work():
        counts = prepare.prepare(run.shards_config())
        return {name: count for name, count in counts.items() if name != "out"}

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


def encode_latents(run: Run) -> dict:
    models = load_vae(run)

    def encode():
        return latents.write(
            run.path("latents"),
            run.clips,
            functools.partial(generate.encode, models),
            run.latents,
            frames_a_latent=run.vae.compression[0],
            mark=latent_mark(run, models),
        )

    return multihost.run_once(encode, "encode")
