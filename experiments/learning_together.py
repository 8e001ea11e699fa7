"""Do attention and MLP learn together: through which route, what is each worth, who is first?

The small character model, trained whole, and with attention, the MLPs or both frozen at their
random init (norms and embedding always train). On the way, in each layer:

- The split of the gradient. Attention's output a enters h = x + a, and y = h + MLP(norm(h)) leaves
  the block. What arrives at a comes past this block's MLP, dL/dy, and through it; everything above
  is left as it is. Each route is taken through attention on to its four matrices, and the two
  add up to their gradient. The share of the MLP's route is <g_mlp, g> / <g, g>; below 0 or above 1
  the routes pull against each other, which their cosine says too. On fixed windows of the training
  text.
- Norms of gradients and updates of attention and MLP, of every step, averaged between measurements.
- Resets: held-out loss with all attention, or all MLPs, replaced by a random draw. What that costs
  is what the part has learned, and what others have come to expect of it.

Who is first: what freezing a part costs in the first tenth of the training, as a share of what it
costs in the end. Then swaps: the whole model's attention, its MLPs or both are made random again,
all else is kept, and all is trained for `again` steps by one schedule; beside it a fresh start.

Command: python -m experiments.learning_together
Minutes: 18 on one CPU core; --preset=quick about 1; --preset=tpu has not been run yet
Expected: the routes add up to the gradient, to rounding, and neither is below 5 % (claim of this
  library); freezing either costs loss. Open: who is first. Bigrams, which need no attention, are
  learned before what needs context (arXiv:2306.00802), so the MLPs might be
Writes: runs/learning_together/summary.json, metrics.jsonl, learning_together.png, routes.png
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress

from experiments import _character
from experiments._character import Character
from experiments._findings import Answer, Figure, Verdict, gate, positive, run, script
from experiments._gradient_routes import PARTS, compared, inner, routes
from experiments._learn import learn
from experiments._report import save
from experiments._seed_curves import collected, early, half_way, norms_of, path, steps_of
from experiments._side_by_side import apart, beside, keys, replaced, stacked, together
from experiments._together_figures import Curve, learning_figure, routes_figure
from jax_attn import data, read_mesh
from jax_attn.command_line import check_positive
from jax_attn.report import training_progress

FROZEN = {"attention frozen": ("attention",), "MLPs frozen": ("mlp",), "both frozen": PARTS}
AGAIN = ("fresh start", "both random", "attention kept, MLPs random", "MLPs kept, attention random")
SMALL = Character(D=64, steps=1500)
MARGIN = 0.01  # nats that a part must be worth
FRESH = 4  # key of the random draw that parts are reset to


@dataclasses.dataclass(frozen=True)
class Config:
    """The model; steps between measurements, and after a swap; windows: `looked` for gradients."""

    model: Character = SMALL
    every: int = 50
    again: int = 400
    looked: int = 32
    eval_windows: int = 128
    seeds: int = 3
    mesh: str = ""
    out: str = "runs/learning_together"


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {
        **{"model.L": 2, "model.steps": 120, "model.warmup": 20, "every": 20, "again": 40},
        **{"looked": 8, "eval_windows": 32, "out": "runs/learning_together/quick"},
    },
    "tpu": {
        **{"model.D": 512, "model.N": 8, "model.L": 8, "model.T": 256, "model.B": 64},
        **{"model.steps": 10_000, "model.warmup": 500, "every": 250, "again": 2000},
        **{"looked": 128, "eval_windows": 512},
        "out": "runs/learning_together/tpu",
    },
}


def check(cfg: Config) -> jax.sharding.Mesh:
    """Refuse sizes that mean nothing, before anything is compiled."""
    check_positive(cfg)
    mesh = read_mesh(cfg.mesh)
    _character.check(cfg.model, mesh)
    return mesh


def draw(model: Character, key: jax.Array) -> Any:
    """Draw parameters, layers apart."""
    return apart(_character.init(model, key))


def heldout(cfg: Config, chunks: jax.Array, params: Any) -> jax.Array:
    """Measure the loss of windows [chunks,B,T+1], in nats."""
    loss = partial(_character.loss, cfg.model, together(params))
    return jnp.mean(jax.lax.map(loss, chunks))


def look(
    cfg: Config, chunks: jax.Array, windows: jax.Array, fresh: Any, params: Any
) -> dict[str, Any]:
    """Measure losses, as it is and with each part reset, and the split of the gradient."""
    tried = stacked([params, *(replaced(part, params, fresh) for part in PARTS)])
    losses = jax.lax.map(partial(heldout, cfg, chunks), tried)
    layers = together(params)
    outputs, leaves = routes(cfg.model, layers, windows)
    gradient = jax.grad(partial(_character.loss, cfg.model))(layers, windows)
    gradient = gradient["layers"]["attention"]
    left = jax.tree.map(lambda g, a, b: g - (a + b), gradient, leaves["mlp"], leaves["skip"])
    error_L = jnp.sqrt(inner(left, left) / inner(gradient, gradient))
    return {
        **dict(zip(("heldout", *(f"reset_{part}" for part in PARTS)), losses, strict=True)),
        **compared(leaves),
        "output_share_L": compared(outputs)["share_L"],
        "split_error": jnp.max(error_L),
    }


def brief(cfg: Config, chunks: jax.Array, params: Any) -> dict[str, jax.Array]:
    """Measure the held-out loss alone."""
    return {"heldout": heldout(cfg, chunks, params)}


def verdicts(
    steps: Sequence[int],
    freezing: Mapping[str, np.ndarray],
    again: Mapping[str, Any],
    error: Any,
    part_RSL: np.ndarray,
    half: Mapping[str, Any],
) -> list[Verdict]:
    """Judge the numbers.

    Args:
      steps: of the measurements.
      freezing: what each way of `FROZEN` costs, [measurements, seeds].
      again: held-out loss that each of `AGAIN` ends at, one for each seed.
      error: of the split against the gradient, one for each seed.
      part_RSL: the norm of the MLP's route over the sum of both norms, [measurements, seeds, L].
      half: by part, the step at which a reset costs half of what it costs in the end.
    Returns: verdicts.
    """
    attention, mlps, both = (freezing[name][-1] for name in FROZEN)
    _, without, *kept = (np.asarray(again[name]) for name in AGAIN)
    lesser = np.minimum(part_RSL, 1 - part_RSL).min(axis=(0, 2))
    first = [early(steps, freezing[name]) for name in ("attention frozen", "MLPs frozen")]
    own, bigrams = "margin of this experiment", "bigrams before context, arXiv:2306.00802"
    return [
        gate(
            "the two routes add up to attention's gradient (float32)", error, most=1e-5, exact=True
        ),
        gate(
            "neither route has below 5 % of both norms, in any layer at any time",
            lesser,
            least=0.05,
            source="both carry the gradient",
        ),
        gate("freezing attention costs loss", attention, least=MARGIN, source=own),
        gate("freezing the MLPs costs loss", mlps, least=MARGIN, source=own),
        positive(
            "freezing both costs more than the two costs added",
            both - attention - mlps,
            source="each makes up for the other",
        ),
        gate(
            "trained attention beside random MLPs ends ahead of both random",
            without - kept[0],
            least=MARGIN,
            source=own,
        ),
        gate(
            "trained MLPs beside random attention end ahead of both random",
            without - kept[1],
            least=MARGIN,
            source=own,
        ),
        positive(
            "MLPs are first: of what freezing costs in the end, more is there in the first tenth",
            first[1] - first[0],
            source=bigrams,
        ),
        positive(
            "MLPs are first: half of what a reset costs in the end is there earlier, by steps",
            np.asarray(half["attention"]) - np.asarray(half["mlp"]),
            source=bigrams,
        ),
    ]


def trained(
    cfg: Config,
    text: data.Text,
    mesh: jax.sharding.Mesh,
    progress: rich.progress.Progress,
    log: pathlib.Path,
) -> tuple[list[dict[str, np.ndarray]], dict[str, Curve]]:
    """Train the whole model, beside it those with frozen parts, then on from what it has learned.

    Returns: measurements of the whole model; held-out loss of all.
    """
    model, L = cfg.model, cfg.model.L
    chunks = jnp.asarray(_character.chunks(text.heldout, model.T, cfg.eval_windows))
    rows = _character.drawn(text.train, model.B, model.T)
    windows = jax.jit(_character.drawn(text.train, cfg.looked, model.T))(jax.random.key(FRESH))
    # Draws run once, but optimising them takes XLA longer than compiling the step.
    quickly = {"xla_backend_optimization_level": 0}
    fresh = jax.jit(partial(draw, model), compiler_options=quickly)(jax.random.key(FRESH))

    def one_loss(params: Any, windows: jax.Array, key: jax.Array) -> Any:
        return _character.loss(model, together(params), windows), {}

    def sum_of_losses(params: Any, windows: jax.Array, key: jax.Array) -> Any:
        return jnp.sum(jax.vmap(lambda one: one_loss(one, windows, key)[0])(params)), {}

    fit = partial(learn, seeds=cfg.seeds, mesh=mesh, progress=progress, log=log)
    whole = fit(
        partial(draw, model),
        one_loss,
        _character.optimizer(model),
        rows,
        steps=model.steps,
        every=cfg.every,
        measure=partial(look, cfg, chunks, windows, fresh),
        title="none frozen",
        parts=[key for part in PARTS for key in keys(part, L)],
    )

    def several(key: jax.Array) -> Any:
        return stacked([draw(model, key)] * len(FROZEN))

    frozen = [[key for part in parts for key in keys(part, L)] for parts in FROZEN.values()]
    parted = fit(
        several,
        sum_of_losses,
        beside(_character.optimizer(model), frozen),
        rows,
        steps=model.steps,
        every=cfg.every,
        measure=jax.vmap(partial(brief, cfg, chunks)),
        title=", ".join(FROZEN),
    )

    def swapped(key: jax.Array, found: Any) -> Any:
        other = draw(model, jax.random.fold_in(key, 1))
        kept = [replaced(part, found, other) for part in ("mlp", "attention")]
        return stacked([draw(model, key), replaced("attention", kept[0], other), *kept])

    again = fit(
        swapped,
        sum_of_losses,
        beside(
            _character.optimizer(dataclasses.replace(model, steps=cfg.again)), [()] * len(AGAIN)
        ),
        lambda key: rows(jax.random.fold_in(key, 1)),
        steps=cfg.again,
        every=max(cfg.again // 16, 1),
        measure=jax.vmap(partial(brief, cfg, chunks)),
        title=", ".join(AGAIN),
        given=whole.params,
    )
    curves = {"none frozen": Curve(steps_of(whole.rows), collected(whole.rows, "heldout"))}
    for names, found in ((FROZEN, parted), (AGAIN, again)):
        loss_RSM = collected(found.rows, "heldout")
        for i, name in enumerate(names):
            curves[name] = Curve(steps_of(found.rows), loss_RSM[:, :, i])
    return whole.rows, curves


def find(cfg: Config, mesh: jax.sharding.Mesh, out: pathlib.Path) -> Answer:
    """Train, judge, draw."""
    text = data.load_text(cfg.model.data or None, T=cfg.model.T)
    with training_progress() as progress:
        rows, curves = trained(cfg, text, mesh, progress, out / "metrics.jsonl")
    windows = _character.chunks(text.heldout, cfg.model.T, cfg.eval_windows)
    steps, L = steps_of(rows), cfg.model.L
    losses = collected(rows, "heldout")
    freezing = {name: curves[name].loss_RS - losses for name in FROZEN}
    damage = {part: collected(rows, f"reset_{part}") - losses for part in PARTS}
    half = {part: half_way(steps, cost_RS) for part, cost_RS in damage.items()}
    share_RSL, cosine_RSL = collected(rows, "share_L"), collected(rows, "cosine_L")
    norms = {
        kind: {part: norms_of(rows, kind, keys(part, L)) for part in PARTS}
        for kind in ("grad", "update")
    }
    paths = {part: path(steps, norm_RSL) for part, norm_RSL in norms["update"].items()}

    def row(what: str, x_RS: np.ndarray, half: Any = None) -> dict[str, Any]:
        ends = {"at first": x_RS[0], "at last": x_RS[-1]}
        return {"what": what, **ends, "half at step": half, "in the first tenth": None}

    table = [row(f"held-out loss, {name}", curve.loss_RS) for name, curve in curves.items()]
    pairs = np.full(losses.shape, _character.loss_of_pairs(text, windows))
    table.append(row("held-out loss, counting pairs of bytes", pairs))
    table += [
        row(f"cost, {name}", cost_RS) | {"in the first tenth": early(steps, cost_RS)}
        for name, cost_RS in freezing.items()
    ]
    for part, title in (("attention", "attention"), ("mlp", "MLPs")):
        table.append(row(f"cost of a reset, {title}", damage[part], half[part]))
        table.append(row(f"way of the updates, {title}", paths[part], half_way(steps, paths[part])))
    for name, x_RSL in (("share of the MLP's route", share_RSL), ("cosine of routes", cosine_RSL)):
        table += [row(f"{name}, layer {i + 1}", x_RSL[:, :, i]) for i in range(L)]
    save(
        learning_figure(steps, freezing, damage, half, {name: curves[name] for name in AGAIN}),
        out / "learning_together.png",
    )
    save(routes_figure(steps, share_RSL, cosine_RSL, norms), out / "routes.png")
    seeds = f"Mean of {cfg.seeds} seeds, bands from least to largest."
    return Answer(
        table,
        verdicts(
            steps,
            freezing,
            {name: curves[name].loss_RS[-1] for name in AGAIN},
            collected(rows, "split_error").max(axis=0),
            collected(rows, "part_L"),
            half,
        ),
        [
            Figure(
                "learning_together.png",
                "What freezing parts at their random init costs, and what their reset costs, along "
                "the training, with a dot at half of its end; the loss when parts are made random "
                f"again and all is trained on. {seeds}",
            ),
            Figure(
                "routes.png",
                "The gradient of attention's matrices by layer: the share that came through the "
                "block's own MLP, and whether the two routes agree; norms of gradients and updates "
                f"of a step. {seeds}",
            ),
        ],
        text,
        _character.untrained(text, windows, losses[-1]),
    )


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status is 0 whatever the verdicts are."""
    return run(__doc__ or "", Config, PRESETS, argv, check, find)


if __name__ == "__main__":
    script(main)
