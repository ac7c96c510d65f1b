"""One training step of the decoder, and of its twin in PyTorch if that is installed.

Both have the same shapes and the same optimiser. The twin uses PyTorch's own layers: `nn.LSTM` for
the recurrence, `scaled_dot_product_attention` for attention.
"""

import importlib.util
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.contest.timing import Prepared
from jaxpara import nn, train
from jaxpara.recurrence import cells

VOCABULARY = 256
MIXERS: dict[str, Callable[[int], Any]] = {
    "para_gru": nn.mixers.recurrent(cells.para_gru),
    "attention": nn.mixers.attention(heads=4),
}
TWINS = {"para_gru": "nn.LSTM", "attention": "scaled_dot_product_attention"}


class Sizes(NamedTuple):
    """The sizes of a model and its batches.

    Attributes:
      batch_size: sequences in a step.
      window: tokens predicted in each.
      width: of the residual stream.
      layers: blocks.
    """

    batch_size: int
    window: int
    width: int
    layers: int


def tokens(sizes: Sizes) -> np.ndarray:
    """Random tokens `[batch, window + 1]`, the same for all."""
    shape = (sizes.batch_size, sizes.window + 1)
    return np.random.default_rng(0).integers(0, VOCABULARY, shape)


def ours(mixer: str, sizes: Sizes) -> Prepared:
    """A step of the decoder with one of `MIXERS`, ready to be timed; it returns the loss."""
    model = nn.decoder(VOCABULARY, sizes.width, sizes.layers, mixer=MIXERS[mixer])
    loss, optimizer = train.next_token_loss(model), optax.adamw(1e-3)
    step = jax.jit(train.make_step(loss, optimizer), donate_argnums=0)
    state = jax.jit(lambda key: train.init_state(model, optimizer, key))(jax.random.key(0))
    windows = jax.device_put(tokens(sizes))

    def call() -> jax.Array:
        nonlocal state
        state, values = step(state, windows)
        return jax.block_until_ready(values["loss"])

    began = time.perf_counter()
    call()
    return Prepared(call, time.perf_counter() - began)


def torch_is_there() -> bool:
    """Whether PyTorch can be imported."""
    return importlib.util.find_spec("torch") is not None


def torch_model(mixer: str, sizes: Sizes) -> Any:
    """The twin of one of `MIXERS`: tokens to logits."""
    import torch
    from torch.nn import functional

    width, heads, taps = sizes.width, 4, 4
    hidden = max(8 * width // 3 // 16 * 16, 16)
    linear = lambda a, b: torch.nn.Linear(a, b, bias=False)  # noqa: E731

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mlp_norm = torch.nn.RMSNorm(width), torch.nn.RMSNorm(width)
            self.conv = torch.nn.Conv1d(
                width, width, taps, groups=width, padding=taps - 1, bias=False
            )
            recurrent = mixer == "para_gru"
            self.mixer = (
                torch.nn.LSTM(width, width, batch_first=True)
                if recurrent
                else linear(width, 3 * width)
            )
            self.gate, self.out = linear(width, width), linear(width, width)
            self.up, self.down = linear(width, 2 * hidden), linear(hidden, width)

        def mix(self, x):
            if mixer == "para_gru":
                return self.mixer(x)[0]
            parts = self.mixer(x).unflatten(-1, (3, heads, width // heads))
            y = functional.scaled_dot_product_attention(
                *parts.permute(2, 0, 3, 1, 4), is_causal=True
            )
            return y.transpose(1, 2).flatten(2)

        def forward(self, x):
            u = self.norm(x)
            v = self.conv(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
            x = x + self.out(self.mix(v) * functional.silu(self.gate(u)))
            gate, value = self.up(self.mlp_norm(x)).chunk(2, -1)
            return x + self.down(functional.silu(gate) * value)

    blocks = [Block() for _ in range(sizes.layers)]
    embed, head = torch.nn.Embedding(VOCABULARY, width), linear(width, VOCABULARY)
    return torch.nn.Sequential(embed, *blocks, torch.nn.RMSNorm(width), head)


def twin(mixer: str, sizes: Sizes) -> Prepared:
    """A step of the same model in PyTorch, ready to be timed; it returns the loss."""
    import torch
    from torch.nn import functional

    model = torch_model(mixer, sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    windows = torch.from_numpy(tokens(sizes))

    def call() -> float:
        optimizer.zero_grad()
        logits = model(windows[:, :-1]).flatten(0, 1)
        loss = functional.cross_entropy(logits, windows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    began = time.perf_counter()
    call()
    return Prepared(call, time.perf_counter() - began)
