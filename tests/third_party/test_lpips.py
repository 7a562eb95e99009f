import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from vidsim.errors import InputError
from vidsim.third_party.lpips import weights
from vidsim.training import vae_losses

rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """Random weights of every array, such that activations keep their size."""
    found = {"classifier.0.weight": np.zeros((2, 2), np.float32)}
    for name, shape in weights.shapes().items():
        if name.startswith("lin"):
            value = rng.uniform(0, 1, shape)
        else:
            value = rng.normal(size=shape) * (2 / np.prod(shape[1:])) ** 0.5 if shape[1:] else 0.1
        found[name] = np.broadcast_to(value, shape).astype(np.float32)
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


@pytest.fixture(scope="module")
def file(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "lpips_vgg16.safetensors"
    save_file(arrays, path)
    return path


@jax.jit
def distance_and_gradient(params, video, other):
    network = vae_losses.FeatureNetwork(weights.features, params)
    return jax.value_and_grad(lambda y: vae_losses.perceptual(network, video, y))(other)


def videos() -> tuple[np.ndarray, np.ndarray]:
    return tuple(rng.uniform(-1, 1, (1, 2, 35, 48, 3)).astype(np.float32) for _ in range(2))


def distance_in_torch(arrays, one, other) -> float:
    """LPIPS as its authors compute it, frame by frame, from the state dicts."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    shift = torch.tensor(weights.SHIFT)[None, :, None, None]
    scale = torch.tensor(weights.SCALE)[None, :, None, None]
    # torchvision's vgg16: convolutions by channels, M a pooling; activations follow the former.
    plan = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
    compared = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

    def maps(frames):
        x, found, number = (frames - shift) / scale, [], 0
        for layer in plan:
            if layer == "M":
                x, number = functional.max_pool2d(x, 2, 2), number + 1
                continue
            kernel, bias = (
                torch.from_numpy(arrays[f"features.{number}.{part}"]) for part in ("weight", "bias")
            )
            x = functional.relu(functional.conv2d(x, kernel, bias, padding=1))
            if number + 1 in compared:
                found.append(x / (torch.sqrt((x**2).sum(1, keepdim=True)) + 1e-10))
            number += 2
        return found

    total = 0.0
    with torch.no_grad():
        pairs = zip(
            *(maps(torch.from_numpy(v[0].transpose(0, 3, 1, 2))) for v in (one, other)), strict=True
        )
        for layer, (a, b) in enumerate(pairs):
            head = torch.from_numpy(arrays[f"lin{layer}.model.1.weight"])
            total += functional.conv2d((a - b) ** 2, head).mean()
    return float(total)


def test_distance_is_that_of_the_authors(arrays, file):
    one, other = videos()
    wanted = distance_in_torch(arrays, one, other)
    network = weights.load(file)
    found = vae_losses.perceptual(network, one, other)
    assert wanted > 0.01
    # Thirteen convolutions of float32, summed in another order.
    assert float(found) == pytest.approx(wanted, rel=1e-4)


def test_equal_videos_have_no_distance_and_a_black_one_has_a_gradient(file):
    network = weights.load(file)
    video = np.zeros((1, 1, 16, 16, 3), np.float32)
    value, gradient = distance_and_gradient(network.params, video, video)
    # Two programs of the same sums may round differently.
    assert abs(value) < 1e-9 and np.isfinite(gradient).all()
    value, gradient = distance_and_gradient(network.params, video, video + 0.5)
    assert value > 1e-4 and np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_positions_without_activation_have_a_finite_gradient(arrays, tmp_path):
    dead = {name: -np.abs(v) if name == "features.2.bias" else v for name, v in arrays.items()}
    dead["features.2.weight"] = -np.abs(arrays["features.2.weight"])
    save_file(dead, tmp_path / "dead.safetensors")
    network = weights.load(tmp_path / "dead.safetensors")
    video = np.full((1, 1, 16, 16, 3), 0.3, np.float32)
    maps = network.features(network.params, video)
    assert not np.any(maps[0])
    _, gradient = distance_and_gradient(network.params, video, video + 0.1)
    assert np.isfinite(gradient).all()


def test_weights_of_another_architecture_are_told_before_they_are_used(arrays, file, tmp_path):
    def told(match: str, **changes) -> None:
        changed = {**arrays, **{name.replace("__", "."): v for name, v in changes.items()}}
        save_file({k: v for k, v in changed.items() if v is not None}, tmp_path / "other")
        with pytest.raises(InputError, match=match):
            weights.load(tmp_path / "other")

    told(r"lacks 'features.14.weight'; give the state dicts", features__14__weight=None)
    narrow = np.zeros((32, 3, 3, 3), np.float32)
    told(r"has shape \(32, 3, 3, 3\), VGG16 has \(64, 3, 3, 3\)", features__0__weight=narrow)
    head = -np.ones((1, 64, 1, 1), np.float32)
    told(r"lin0.model.1.weight falls to -1, a distance needs", lin0__model__1__weight=head)
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(InputError, match="is no safetensors file"):
        weights.load(tmp_path / "text")
    with pytest.raises(InputError, match=r"perceptual_network='.*none' is no file; give a"):
        weights.load(tmp_path / "none")
    network = weights.load(file)
    with pytest.raises(InputError, match=r"frames of 24x8 are too small for VGG16"):
        network.features(network.params, np.zeros((1, 1, 8, 24, 3), np.float32))
