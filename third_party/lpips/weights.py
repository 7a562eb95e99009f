"""LPIPS with VGG16 (arXiv:1801.03924) as the feature network of a perceptual loss.

    phi_l = sqrt(w_l) F_l / |F_l|      F_l: features of layer l, a vector a position; w_l: its head
    distance = sum_l mean |phi_l(x) - phi_l(y)|^2                 (Eq. 1, mean over frames, too)

One safetensors file holds the state dicts of torchvision's `vgg16` and of the heads; who has both
writes it once:

    import torch, torchvision, safetensors.torch
    net = torchvision.models.vgg16(weights="IMAGENET1K_V1").state_dict()
    heads = torch.load("lpips/weights/v0.1/vgg.pth")
    safetensors.torch.save_file({**net, **heads}, "lpips_vgg16.safetensors")
"""

# N frames, H height, W width, C channels in, D channels out

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from vidsim.errors import InputError
from vidsim.training.vae_losses import FeatureNetwork

# Of each block the convolutions by their numbers in `features`, and their channels. A block begins
# with pooling, except for the first; its last activation is what is compared.
BLOCKS = (
    ((0, 2), 64),
    ((5, 7), 128),
    ((10, 12, 14), 256),
    ((17, 19, 21), 512),
    ((24, 26, 28), 512),
)
SHIFT = (-0.030, -0.088, -0.188)  # the mean colour of ImageNet, of pixels in [-1, 1]
SCALE = (0.458, 0.448, 0.450)
SMALLEST = 2 ** (len(BLOCKS) - 1)  # pixels along a side that leave one at the last block


def shapes() -> dict[str, tuple[int, ...]]:
    """Every array that is read, by its name in the state dicts, in torch's layout."""
    found, before = {}, 3
    for block, (numbers, channels) in enumerate(BLOCKS):
        for number in numbers:
            found[f"features.{number}.weight"] = (channels, before, 3, 3)
            found[f"features.{number}.bias"] = (channels,)
            before = channels
        found[f"lin{block}.model.1.weight"] = (1, channels, 1, 1)
    return found


def load(path: str | os.PathLike) -> FeatureNetwork:
    """Reads a file of VGG16 and heads; what else it holds, such as the classifier, is left.

    Raises:
      InputError: there is no such file, it is not safetensors, an array is missing or has another
        shape, or a head has negative weights.
    """
    if not pathlib.Path(path).is_file():
        raise InputError(
            f"perceptual_network={str(path)!r} is no file; give a safetensors file of "
            "VGG16 and LPIPS, or set perceptual_weight to 0"
        )
    arrays = {}
    try:
        with safe_open(path, framework="numpy") as file:
            there = set(file.keys())
            for name, shape in shapes().items():
                if name not in there:
                    raise InputError(
                        f"{path} lacks {name!r}; give the state dicts of torchvision's vgg16 and "
                        "of lpips' heads (v0.1, vgg) in one file"
                    )
                found = tuple(file.get_slice(name).get_shape())
                if found != shape:
                    raise InputError(
                        f"{path}: {name} has shape {found}, VGG16 has {shape}; give vgg16 "
                        "without batch normalisation"
                    )
                arrays[name] = file.get_tensor(name).astype(np.float32)
    except SafetensorError as error:
        raise InputError(f"{path} is no safetensors file ({error}); convert the weights") from None
    params = []
    for block, (numbers, _) in enumerate(BLOCKS):
        head = arrays[f"lin{block}.model.1.weight"].reshape(-1)
        if head.min() < 0:
            raise InputError(
                f"{path}: lin{block}.model.1.weight falls to {head.min():.3g}, a distance needs "
                "weights from 0 up; give the published heads, or clip them"
            )
        convolutions = [
            (
                arrays[f"features.{number}.weight"].transpose(2, 3, 1, 0),
                arrays[f"features.{number}.bias"],
            )
            for number in numbers
        ]
        params.append({"convolutions": convolutions, "root": np.sqrt(head)})
    return FeatureNetwork(features, params)


def features(params, video_BTHWC: jax.Array) -> list[jax.Array]:
    """The maps phi_l, [B * T, h, w, D], of a video in [-1, 1].

    Raises:
      InputError: a side is too short for the four poolings.
    """
    height, width = video_BTHWC.shape[2:4]
    if min(height, width) < SMALLEST:
        raise InputError(
            f"frames of {width}x{height} are too small for VGG16, which halves them "
            f"{len(BLOCKS) - 1} times; use {SMALLEST} pixels or more, or perceptual_weight=0"
        )
    x = video_BTHWC.reshape(-1, *video_BTHWC.shape[2:]).astype(jnp.float32)
    x = (x - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
    maps = []
    for number, block in enumerate(params):
        if number:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, *((1, 2, 2, 1),) * 2, "VALID")
        for kernel, bias in block["convolutions"]:
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + bias)
        # A position without any activation has length 0, where a root has no gradient.
        length = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-20))
        maps.append(x / (length + 1e-10) * block["root"])
    return maps
