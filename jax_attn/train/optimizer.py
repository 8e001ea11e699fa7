"""Optimizers by the names of leaves, out of optax's: what is frozen, what learns at another rate.

All return a `GradientTransformation`, so they combine, and what they keep is saved and placed on a
mesh with the rest of the optimizer's state.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from jax_attn.train.step import keys_of, leaves_of

PyTree = Any


class AverageState(NamedTuple):
    """Hold a running mean of parameters.

    Attributes:
      params: the mean, of the parameters' structure, in float32 or wider.
    Example:
      >>> AverageState({"w_D": jax.numpy.ones(3)}).params["w_D"].shape
      (3,)
    """

    params: PyTree


def freeze(tx: optax.GradientTransformation, keys: Sequence[str]) -> optax.GradientTransformation:
    """Leave parameters as they are by name; the optimizer keeps nothing for them.

    Args:
      tx: the optimizer of all others; norms that it clips by are those of the others alone.
      keys: such as `"attention"` or `"embed_VD"`; a leaf is frozen if its path contains one.
    Returns: the optimizer.
    Raises: ValueError: keys is one string; when it starts, a key that no parameter has.
    Example:
      >>> params = {"attention": {"w_D": jax.numpy.ones(2)}, "mlp": {"w_D": jax.numpy.ones(2)}}
      >>> tx = freeze(optax.sgd(1.0), ["attention"])
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates["attention"]["w_D"].tolist(), updates["mlp"]["w_D"].tolist()
      ([0.0, 0.0], [-1.0, -1.0])
    """
    groups = {key: "frozen" for key in keys_of("freeze: keys", keys)}
    return _grouped("freeze", groups, {"frozen": optax.set_to_zero()}, tx)


def scale_rates(
    tx: optax.GradientTransformation, factors: Mapping[str, float]
) -> optax.GradientTransformation:
    """Multiply the learning rate of parameters by name.

        updates' = factor * tx(grads)

    Args:
      tx: the optimizer; its last step should be the learning rate, as in optax's own.
      factors: key to factor, `{"embed_VD": 0.1}`; the first key in a leaf's path counts, others
        have 1. Weight decay inside `tx` is scaled too.
    Returns: the optimizer.
    Raises: ValueError: when it starts, a key that no parameter has.
    Example:
      >>> params = {"embed_VD": jax.numpy.ones(2), "mlp": {"w_D": jax.numpy.ones(2)}}
      >>> tx = scale_rates(optax.sgd(1.0), {"embed_VD": 0.5})
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates["embed_VD"].tolist(), updates["mlp"]["w_D"].tolist()
      ([-0.5, -0.5], [-1.0, -1.0])
    """
    groups = {key: key for key in factors}
    scales = {key: optax.scale(factor) for key, factor in factors.items()}
    return optax.chain(tx, _grouped("scale_rates", groups, scales, optax.identity()))


def average_params(decay: float) -> optax.GradientTransformation:
    """Keep an exponential moving average of the parameters; put it last in `optax.chain`.

        mean' = decay * mean + (1 - decay) * params',  starting at the initial parameters

    Polyak and Juditsky 1992; an update that the step leaves out leaves the mean out too.

    Args:
      decay: from 0 to below 1.
    Returns: an optimizer that passes updates on; `averaged(opt_state)` has the mean.
    Raises: ValueError naming the decay; when it starts, inside `freeze` or another mask, which
      hides parameters from it.
    Example:
      >>> params = {"w_D": jax.numpy.ones(2)}
      >>> tx = optax.chain(optax.sgd(1.0), average_params(0.5))
      >>> _, kept = tx.update(params, tx.init(params), params)
      >>> averaged(kept)["w_D"].tolist()
      [0.5, 0.5]
    """
    if not 0 <= decay < 1:
        raise ValueError(f"average_params: decay must be from 0 to below 1, got {decay!r}")

    def wide(x: jax.Array) -> jax.Array:
        # A bfloat16 mean would not move: the change is smaller than its last digit.
        return jax.numpy.array(x, jax.numpy.promote_types(x.dtype, jax.numpy.float32))

    def init(params: PyTree) -> AverageState:
        leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
        if any(isinstance(x, optax.MaskedNode) for x in leaves):
            raise ValueError(
                "average_params: some parameters are masked; put it outside of what masks them: "
                "chain(freeze(tx, keys), average_params(decay))"
            )
        return AverageState(jax.tree.map(wide, params))

    def update(updates: PyTree, state: AverageState, params: PyTree = None) -> Any:
        if params is None:
            raise ValueError("average_params: update needs the parameters: tx.update(g, s, params)")
        new = optax.apply_updates(params, updates)
        mean = jax.tree.map(
            lambda m, p: decay * m + (1 - decay) * p.astype(m.dtype), state.params, new
        )
        return updates, AverageState(mean)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def averaged(opt_state: PyTree) -> PyTree:
    """Find the mean that `average_params` keeps, to evaluate or to save.

    Args:
      opt_state: `state.opt_state`.
    Returns: parameters, in float32 or wider.
    Raises: ValueError if there is none, or more than one.
    Example:
      >>> tx = average_params(0.9)
      >>> averaged(tx.init({"w_D": jax.numpy.ones(2)}))["w_D"].tolist()
      [1.0, 1.0]
    """
    found = means_of(opt_state)
    if len(found) != 1:
        raise ValueError(f"averaged: the state holds {len(found)} means; use average_params once")
    return found[0].params


def means_of(opt_state: PyTree) -> list[AverageState]:
    """Find what `average_params` keeps, anywhere in an optimizer's state."""

    def is_mean(x: Any) -> bool:
        return isinstance(x, AverageState)

    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_mean) if is_mean(x)]


def _grouped(
    owner: str,
    groups: Mapping[str, str],
    transforms: Mapping[str, optax.GradientTransformation],
    rest: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Give the leaves of each key the transformation of its group, all others `rest`."""

    def label(params: PyTree) -> PyTree:
        found = leaves_of(owner, params, tuple(groups))
        leaves, tree = jax.tree.flatten(params)
        of = {i: groups[key] for key in reversed(tuple(groups)) for i in found[key]}
        return jax.tree.unflatten(tree, [of.get(i, "") for i in range(len(leaves))])

    return optax.multi_transform({**transforms, "": rest}, label)
