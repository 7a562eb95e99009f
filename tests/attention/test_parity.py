"""Equality with PyTorch, where it is installed (the extra `parity`)."""

import numpy as np
import pytest

from vidsim.attention import segments
from vidsim.layers import conv3d

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")


def test_attention_in_segments_equals_torch_with_a_mask():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 12, 2, 8)).astype(np.float32)
    segment_ids = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12])
    mask = torch.from_numpy(segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    heads_first = (torch.from_numpy(x).transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask)
    ours = segments.attend(q, k, v, segment_ids)
    expected = np.where(segment_ids[..., None, None] > 0, expected.transpose(1, 2).numpy(), 0)
    # Float32 sums of 12 terms around 1, in another order.
    np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_a_convolution_of_frames_with_their_past_equals_torch():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 5, 4, 4, 3)).astype(np.float32)
    kernel = rng.standard_normal((3, 3, 3, 3, 2)).astype(np.float32)
    led = np.concatenate([x[:, :1], x[:, :1], x], axis=1)
    expected = torch.nn.functional.conv3d(
        torch.from_numpy(led).permute(0, 4, 1, 2, 3),
        torch.from_numpy(kernel).permute(4, 3, 0, 1, 2),
        padding=(0, 1, 1),
    )
    ours = conv3d.conv3d(led, kernel)
    # Float32 sums of 81 products around 1, in another order.
    np.testing.assert_allclose(ours, expected.permute(0, 2, 3, 4, 1).numpy(), atol=2e-5)
