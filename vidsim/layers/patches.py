"""Latents to tokens and back: a token is a square of latents of one frame."""

# L tokens, P patch values, C channels; t latent frames, h latent rows, w latent columns


def patchify(latents_tHWC, patch: int):
    """Latents [t, h, w, c] to tokens [t * h/p * w/p, p * p * c]; numpy or jax."""
    t, h, w, c = latents_tHWC.shape
    x = latents_tHWC.reshape(t, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, patch * patch * c)


def unpatchify(patches_LP, grid: tuple[int, int, int], patch: int):
    """The inverse of `patchify`; `grid` is (t, h, w) in latents."""
    t, h, w = grid
    x = patches_LP.reshape(t, h // patch, w // patch, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(t, h, w, -1)
