"""The stages before training: world, shards, tokenizer; and the latents between the trainings."""

import functools

from vidsim.data import latents, prepare
from vidsim.errors import InputError
from vidsim.parallel import multihost
from vidsim.sampling import generate
from vidsim.stages.run import Run, load_vae
from vidsim.text import tokenizer
from vidsim.worlds import physics as world


def render_world(run: Run) -> dict:
    if run.data.input:
        return {"skipped": f"data come from {run.data.input}"}
    return multihost.run_once(lambda: world.write(run.world, run.path("world")), "worlds")


def prepare_shards(run: Run) -> dict:
    config = prepare.Config(
        input=run.data.input or str(run.path("world")),
        out=str(run.path("shards")),
        validation_share=run.data.validation_share,
        max_seconds=run.data.max_seconds,
    )
    return multihost.run_once(lambda: prepare.prepare(config), "prepare")


def train_tokenizer(run: Run) -> dict:
    def train():
        texts = [text for row in run.shards.index for text, _ in row["captions"]]
        found = tokenizer.train(
            texts, vocabulary=run.tokenizer.vocabulary, max_tokens=run.tokenizer.max_tokens
        )
        if found.vocabulary > run.text.vocabulary:
            raise InputError(
                f"tokenizer.vocabulary={found.vocabulary} is more than dit.text.vocabulary="
                f"{run.text.vocabulary}; make them equal"
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
            mark=latents.fingerprint(models.vae_params, run.latents),
        )

    return multihost.run_once(encode, "encode")
