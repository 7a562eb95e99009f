"""The transformer of `vidsim/models/dit.py` in plain PyTorch, and its training step.

The same matrices, norms, rotations and modulation on a row of one segment, whose attention needs no
mask: PyTorch's fused kernel takes it as it is. Text is looked up and goes in without an encoder.
"""

# B batch, L tokens, P patch values, D width, N heads, K head dim, S rows of modulation

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks import _step
from vidsim import trees
from vidsim.layers import rotary, time_embedding
from vidsim.models import dit
from vidsim.text import encoder

EPSILON = 1e-6


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def rms_normalise(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], eps=EPSILON).to(x.dtype)


def scaled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() * scale).to(x.dtype)


def rotate(x_BLNK, cos_LK, sin_LK):
    first, second = x_BLNK.float().chunk(2, dim=-1)
    cos, sin = cos_LK[:, None], sin_LK[:, None]
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat(turned, dim=-1).to(x_BLNK.dtype)


class Block(nn.Module):
    def __init__(self, config: dit.Config):
        super().__init__()
        D, self.heads = config.width, config.heads
        self.query, self.key, self.value, self.out = (linear(D, D) for _ in range(4))
        self.gate, self.up = linear(D, config.mlp_hidden), linear(D, config.mlp_hidden)
        self.down = linear(config.mlp_hidden, D)
        self.query_scale = nn.Parameter(torch.ones(D // self.heads))
        self.key_scale = nn.Parameter(torch.ones(D // self.heads))
        self.modulation = nn.Parameter(torch.zeros(dit.MODULATIONS, D))

    def forward(self, x_BLD, modulation_BS6D, chosen_LS, cos_LK, sin_LK):
        B, L, D = x_BLD.shape
        rows = (modulation_BS6D + self.modulation).to(x_BLD.dtype)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            chosen_LS @ rows[:, :, i] for i in range(dit.MODULATIONS)
        )
        h = rms_normalise(x_BLD) * (1 + scale_a) + shift_a
        q, k, v = (f(h).view(B, L, self.heads, -1) for f in (self.query, self.key, self.value))
        q = rotate(scaled(rms_normalise(q), self.query_scale), cos_LK, sin_LK)
        k = rotate(scaled(rms_normalise(k), self.key_scale), cos_LK, sin_LK)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, D)
        x_BLD = x_BLD + gate_a * self.out(attended)
        h = rms_normalise(x_BLD) * (1 + scale_m) + shift_m
        return x_BLD + gate_m * self.down(F.silu(self.gate(h)) * self.up(h))


class DiT(nn.Module):
    """`checkpointed` makes the activations of every layer again in the backward pass."""

    def __init__(
        self, config: dit.Config, text: encoder.Config, patch_values: int, *, checkpointed: bool
    ):
        super().__init__()
        D, self.width, self.checkpointed = config.width, config.width, checkpointed
        self.embedding = nn.Embedding(text.vocabulary, text.features)
        self.text_scale = nn.Parameter(torch.ones(text.features))
        self.patches_in, self.text_in = linear(patch_values, D), linear(text.features, D)
        self.time = nn.Sequential(
            linear(2 * time_embedding.FREQUENCIES, D), nn.SiLU(), linear(D, D)
        )
        self.modulation = linear(D, dit.MODULATIONS * D)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_modulation, self.head = linear(D, 2 * D), linear(D, patch_values)

    def forward(self, x_BLP, text_ids_BL, times_S, is_text_L, chosen_LS, cos_LK, sin_LK):
        features = rms_normalise(self.embedding(text_ids_BL)) * self.text_scale
        text = features * is_text_L[:, None]
        x = self.patches_in(x_BLP) * ~is_text_L[:, None] + self.text_in(text)
        frequencies = 1000.0 * 10_000.0 ** (
            -torch.arange(time_embedding.FREQUENCIES, device=x.device) / time_embedding.FREQUENCIES
        )
        phase = times_S[None, :, None] * frequencies
        embedded = F.silu(self.time(torch.cat([phase.cos(), phase.sin()], dim=-1)))
        modulation = self.modulation(embedded).unflatten(-1, (dit.MODULATIONS, self.width))
        chosen = chosen_LS.to(x.dtype)
        for block in self.blocks:
            inputs = (x, modulation, chosen, cos_LK, sin_LK)
            x = (
                checkpoint(block, *inputs, use_reentrant=False)
                if self.checkpointed
                else block(*inputs)
            )
        shift, scale = (chosen @ self.head_modulation(embedded)).chunk(2, dim=-1)
        return self.head(rms_normalise(x) * (1 + scale) + shift).float()


def weights_of(params) -> dict[str, torch.Tensor]:
    """The parameters of `models/dit.py` by the names of `DiT`."""
    renamed = {
        "text/embedding": "embedding.weight",
        "text/norm/scale": "text_scale",
        "time/first/kernel": "time.0.weight",
        "time/second/kernel": "time.2.weight",
    }
    found = {}
    for name, array in trees.flatten(params).items():
        tensor = torch.from_numpy(np.array(array))
        if name.endswith("/kernel"):
            tensor = tensor.mT
        name = renamed.get(name, name.replace("mlp/", "").replace("/kernel", ".weight"))
        if name.startswith("blocks/"):
            part = name.removeprefix("blocks/")
            found |= {f"blocks.{layer}.{part}": one for layer, one in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


class Step:
    """As `_step.Step`: trains on one row again and again, products in bfloat16 by autocast."""

    def __init__(
        self,
        config: dit.Config,
        text: encoder.Config,
        row: dict[str, np.ndarray],
        *,
        checkpointed: bool,
        compiled: bool,
    ):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        tensors = {name: torch.from_numpy(array).to(self.device) for name, array in row.items()}
        self.x0, self.is_patch = tensors["patches_BLP"], ~tensors["is_text_BL"]
        index_L = tensors["time_index_BL"][0]
        rotation = rotary.rotation(row["positions_BL3"][0], config.width // config.heads)
        # One segment has three times (none, a first, a second), of which the row uses two.
        self.row = (
            tensors["is_text_BL"][0],
            F.one_hot(index_L.long(), 3),
            *(torch.from_numpy(np.array(part_Lk)).to(self.device) for part_Lk in rotation),
        )
        self.text_ids = tensors["text_ids_BL"]
        model = DiT(config, text, self.x0.shape[-1], checkpointed=checkpointed).to(self.device)
        self.parameters = list(model.parameters())
        self.model = torch.compile(model) if compiled else model
        adamw = _step.ADAMW
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=adamw["learning_rate"],
            betas=(adamw["b1"], adamw["b2"]),
            weight_decay=adamw["weight_decay"],
            fused=True,
        )

    def step(self) -> float:
        """The loss of one update: on velocity, of predicted clean patches (`diffusion/flow.py`)."""
        t = torch.sigmoid(torch.randn((), device=self.device))
        times_S = torch.stack([torch.zeros_like(t), t, t])
        noise = torch.randn_like(self.x0)
        x_t = torch.where(self.is_patch[..., None], (1 - t) * self.x0 + t * noise, self.x0)
        with torch.autocast(self.device, torch.bfloat16):
            x0_hat = self.model(x_t, self.text_ids, times_S, *self.row)
        error = (x0_hat - self.x0).square().mean(-1) / t.clamp(min=0.05).square()
        loss = (error * self.is_patch).sum() / self.is_patch.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, _step.CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss)
