"""The same model, optimizer and loop in PyTorch, as one would write them there."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]


class Block(nn.Module):
    """Attention and MLP, each after an RMSNorm, each added to its input."""

    def __init__(self, D: int, N: int) -> None:
        super().__init__()
        self.N = N
        self.norm1 = nn.RMSNorm(D, eps=1e-6)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.norm2 = nn.RMSNorm(D, eps=1e-6)
        self.up = nn.Linear(D, 4 * D, bias=False)
        self.down = nn.Linear(4 * D, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.N, D // self.N).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """Embedding with learned positions, blocks, a norm, and the embedding again as the head."""

    def __init__(self, V: int, D: int, N: int, L: int, T: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.position = nn.Embedding(T, D)
        self.blocks = nn.ModuleList([Block(D, N) for _ in range(L)])
        self.norm = nn.RMSNorm(D, eps=1e-6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)

    def take(self, params: Any) -> None:
        """Copy the parameters of the JAX model."""
        D = self.embed.weight.shape[1]

        def put(weight: torch.Tensor, value: Any) -> None:
            weight.data.copy_(torch.from_numpy(np.array(value)))

        put(self.embed.weight, params["embed_VD"])
        put(self.position.weight, params["position_TD"])
        put(self.norm.weight, params["norm"]["scale_D"])
        layers = params["layers"]
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            of = {name: np.asarray(x)[i] for name, x in layers["attention"].items()}
            qkv = [of[name].reshape(D, D) for name in ("wq_DNH", "wk_DKH", "wv_DKE")]
            put(block.qkv.weight, np.concatenate(qkv, axis=1).T)
            put(block.out.weight, of["wo_NED"].reshape(D, D).T)
            put(block.up.weight, np.asarray(layers["mlp"]["w_in_DF"])[i].T)
            put(block.down.weight, np.asarray(layers["mlp"]["w_out_FD"])[i].T)
            put(block.norm1.weight, np.asarray(layers["attention_norm"]["scale_D"])[i])
            put(block.norm2.weight, np.asarray(layers["mlp_norm"]["scale_D"])[i])


def loss_of(model: Model, windows_BT: np.ndarray) -> torch.Tensor:
    """Return the mean cross entropy of the next byte."""
    tokens = torch.from_numpy(windows_BT.astype(np.int64))
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Trainer:
    """A plain training loop: AdamW in its fused form, gradients clipped, the loss read at times."""

    def __init__(
        self, model: Model, batch: Callable[[int], np.ndarray], *, steps: int, rate: float,
        warmup: int, weight_decay: float, clip: float, log_every: int,
    ) -> None:  # fmt: skip
        self.model, self.batch, self.clip, self.log_every = model, batch, clip, log_every
        self.made, self.losses = 0, []
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )

        def factor(step: int) -> float:
            if step < warmup:
                return step / warmup
            along = (step - warmup) / max(steps - warmup, 1)
            return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(along, 1.0)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def advance(self, steps: int) -> None:
        """Make some steps."""
        for _ in range(steps):
            loss = loss_of(self.model, self.batch(self.made))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.schedule.step()
            if self.made % self.log_every == 0:
                self.losses.append(loss.item())
            self.made += 1
