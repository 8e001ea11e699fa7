"""Do the founding statements about shapes, independence and context hold exactly?

Attention maps (4, 256, 768) to (4, 256, 768) with Wq, Wk, Wv, Wo of 768 x 768 in 12 heads; the
feed-forward layer goes 768 -> 3072 -> 768 (C6). Attention hands on an output, and each part has
its own random init (C7). Without attention "mat" is processed on its own; with it, "mat" depends
on every token before it and on none after it (C9).

Command: python -m experiments.seed_shapes
Minutes: 0.2 on 2 CPU cores
Expected: every row says yes; 4·768² = 2,359,296 and 2·768·3072 = 4,718,592 parameters.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.table

from jax_attn import attention, block, causal, count, init_attention, init_block, init_mlp, mlp

B, T, D, N, F = 4, 256, 768, 12, 3072


def layer(attention_seed: int, mlp_seed: int) -> dict:
    """Draw a block whose parts have their own seeds."""
    return init_block(
        jax.random.key(0),
        D,
        attention=lambda _: init_attention(jax.random.key(attention_seed), D, N),
        mlp=lambda _: init_mlp(jax.random.key(mlp_seed), D, F),
    )


def same(left, right) -> bool:
    """Say whether two trees are bit-equal."""
    equal = jax.tree.map(lambda x, y: bool((x == y).all()), left, right)
    return all(jax.tree.leaves(equal))


def rows() -> list[tuple[str, str, str, bool]]:
    """Measure every statement: claim, statement, measured, does it hold."""
    attend = jax.jit(partial(attention, mask=causal()))
    run = jax.jit(lambda params, x_BTD: block(params, x_BTD, attend=attend)[0])
    x_BTD = jax.random.normal(jax.random.key(7), (B, T, D))
    params = layer(1, 2)
    y_BTD = attend(params["attention"], x_BTD)
    made = []

    weights = {name: leaf.reshape(-1) for name, leaf in params["attention"].items()}
    square = all(leaf.size == D * D for leaf in weights.values())
    made.append(
        ("C6", f"attention: {(B, T, D)} -> same", str(y_BTD.shape), y_BTD.shape == (B, T, D))
    )
    made.append(("C6", "Wq, Wk, Wv, Wo: 768 x 768 each", f"{count(params['attention']):,}", square))
    z_BTD = jax.jit(mlp)(params["mlp"], y_BTD)
    sizes = (params["mlp"]["w_in_DF"].shape, params["mlp"]["w_out_FD"].shape)
    made.append(
        ("C6", f"MLP: {D} -> {F} -> {D}", f"{count(params['mlp']):,}", sizes == ((D, F), (F, D)))
    )
    made.append(
        ("C6", "attention's output fits the MLP", str(z_BTD.shape), z_BTD.shape == x_BTD.shape)
    )

    other = layer(1, 3)
    equal = same(attend(other["attention"], x_BTD), y_BTD)
    changed = not same(other["mlp"], params["mlp"])
    made.append(
        (
            "C7",
            "another MLP init: attention's output",
            "bit-equal" if equal else "differs",
            equal and changed,
        )
    )
    other = layer(4, 2)
    equal = same(other["mlp"], params["mlp"])
    changed = not same(other["attention"], params["attention"])
    made.append(
        (
            "C7",
            "another attention init: the MLP's weights",
            "bit-equal" if equal else "differs",
            equal and changed,
        )
    )

    # "mat" is the last token of a sentence, here at position t with a tail behind it.
    t = 200
    before_BTD = x_BTD.at[:, :t].set(jax.random.normal(jax.random.key(8), (B, t, D)))
    alone = {name: leaf for name, leaf in params.items() if name.startswith("mlp")}
    equal = same(run(alone, x_BTD)[:, t], run(alone, before_BTD)[:, t])
    made.append(
        ("C9", "MLP only: 'mat' under another prefix", "bit-equal" if equal else "differs", equal)
    )
    gap = float(jnp.abs(run(params, x_BTD)[:, t] - run(params, before_BTD)[:, t]).max())
    made.append(("C9", "with attention: 'mat' changes by", f"{gap:.3f}", gap > 0))

    gradient_BTD = jax.grad(lambda x_BTD: jnp.sum(run(params, x_BTD)[:, t] ** 2))(x_BTD)
    norms_BT = jnp.linalg.norm(gradient_BTD, axis=-1)
    least, later = float(norms_BT[:, :t].min()), float(norms_BT[:, t + 1 :].max())
    made.append(("C9", "least gradient to a token before 'mat'", f"{least:.2e}", least > 0))
    made.append(("C9", "largest gradient to a token after it", f"{later:.0f}", later == 0))
    return made


def main() -> int:
    """Print the table; exit 1 if a statement does not hold."""
    if len(sys.argv) > 1:
        print(f"error: no options here, got {sys.argv[1]!r}", file=sys.stderr)
        return 2
    measured = rows()
    table = rich.table.Table(box=rich.box.SIMPLE)
    for title in ("claim", "statement", "measured", "holds"):
        table.add_column(title)
    for claim, statement, value, holds in measured:
        table.add_row(claim, statement, value, "yes" if holds else "NO")
    rich.console.Console().print(table)
    return 0 if all(holds for *_, holds in measured) else 1


if __name__ == "__main__":
    raise SystemExit(main())
