"""The gradient that reaches attention, split by the two ways past its own block.

A block makes h = x + a of attention's output a, and y = h + MLP(norm(h)). The gradient at a is that
at h: dL/dy, past this block's MLP, and what comes back through it. Everything above the block is
left as it is. Each route is taken on through attention to its leaves; both maps are linear.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments import _character
from experiments._character import Character
from jax_attn import language_model, norm, train

PARTS = ("attention", "mlp")


def routes(model: Character, params: Any, windows: jax.Array) -> tuple[Any, Any]:
    """Split the gradient that reaches each layer's attention by the two ways past its block.

    Args:
      model, windows: of `_character.loss`.
      params: the parameters, layers stacked.
    Returns: (outputs, leaves), each {"mlp", "skip"}: the gradients that arrive at attention's
      output [L,B,T,D], and what they make of attention's leaves.
    """
    layers, attend = params["layers"], _character.attend(model)
    # A norm inside the part it belongs to: the part then reads the residual stream itself.
    whole = {part: {"own": layers[part], "norm": layers[f"{part}_norm"]} for part in PARTS}

    def mix(part: Any, x_BTD: jax.Array) -> Any:
        return attend(part["own"], norm(part["norm"], x_BTD)), {"x_BTD": x_BTD}

    def feed(part: Any, h_BTD: jax.Array) -> Any:
        y_BTD = _character.feed(part["own"], norm(part["norm"], h_BTD))
        return y_BTD + part["added_BTD"], {"h_BTD": h_BTD}

    def loss(added_LBTD: jax.Array) -> Any:
        blocks = whole | {"mlp": whole["mlp"] | {"added_BTD": added_LBTD}}
        tree = params | {"layers": blocks}
        logits_BTV, aux = language_model(tree, windows[:, :-1], attend=mix, feed=feed)
        return train.next_token_loss(logits_BTV, windows[:, 1:]), aux

    B, T = windows[:, 1:].shape
    added_LBTD = jnp.zeros((model.L, B, T, model.D), params["embed_VD"].dtype)
    # What is added to the MLP's output is added to the block's: its gradient is dL/dy.
    skip_LBTD, aux = jax.grad(loss, has_aux=True)(added_LBTD)

    def layer(part: Any, x_BTD: jax.Array, h_BTD: jax.Array, skip_BTD: jax.Array) -> Any:
        def fed(h_BTD: jax.Array) -> jax.Array:
            return _character.feed(part["mlp"]["own"], norm(part["mlp"]["norm"], h_BTD))

        def mixed(own: Any) -> jax.Array:
            return mix(part["attention"] | {"own": own}, x_BTD)[0]

        outputs = {"mlp": jax.vjp(fed, h_BTD)[1](skip_BTD)[0], "skip": skip_BTD}
        back = jax.vjp(mixed, part["attention"]["own"])[1]
        return outputs, {route: back(g_BTD)[0] for route, g_BTD in outputs.items()}

    x_LBTD, h_LBTD = aux["attention"]["x_BTD"], aux["mlp"]["h_BTD"]
    return jax.vmap(layer)(whole, x_LBTD, h_LBTD, skip_LBTD)


def inner(one: Any, other: Any) -> jax.Array:
    """Multiply trees whose leaves lead with L, summed over all but L."""
    made = jax.tree.map(lambda a, b: jnp.sum(a * b, axis=tuple(range(1, a.ndim))), one, other)
    return sum(jax.tree.leaves(made), start=jnp.zeros(()))


def compared(split: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Measure two routes against their sum: the MLP's share of it, their cosine, all [L].

    Args:
      split: "mlp" and "skip", trees whose leaves lead with L.
    Returns: share_L, cosine_L, and part_L: the MLP's norm over the sum of both norms.
    """
    mlp_L, skip_L = (inner(split[route], split[route]) for route in ("mlp", "skip"))
    both_L = inner(split["mlp"], split["skip"])
    norms_L = jnp.sqrt(mlp_L), jnp.sqrt(skip_L)
    return {
        "share_L": (mlp_L + both_L) / (mlp_L + 2 * both_L + skip_L),
        "cosine_L": both_L / (norms_L[0] * norms_L[1]),
        "part_L": norms_L[0] / (norms_L[0] + norms_L[1]),
    }
