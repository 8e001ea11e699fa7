"""Does attention hand the feed-forward layer a better input, and do the two learn together?

Trains language models of equal parameter count from random init on the same bytes: attention and
MLP, attention only, MLP only, static mixer and MLP; then the full model again with either part
frozen at its random init (its norm still trains). One learning rate serves all of them. Measures
the claims C1 to C10 on the models and says of each whether it held.

Command: python -m experiments.flow            (or: make demo)
Minutes: about 5 on 2 CPU cores; --preset=quick fewer; --preset=tpu has not been run yet
Expected: attention and MLP need far fewer bits per held-out byte than MLP only or static mixer and
    MLP (2.7 to 2.9 against more than 3.2). At this size attention only is as good or better, so
    C10 does not hold: the crossing, if there is one, lies beyond 600 steps of 512 tokens.
Writes: runs/flow/report.html, heads.html (every head of the trained model), *.png, metrics.jsonl,
    summary.json
"""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
import rich.console
import rich.table

from experiments import _flow_claims, _flow_figures, _report
from jax_attn import (
    attention,
    causal,
    count,
    data,
    generate,
    head_summary,
    init_attention,
    init_block,
    init_language_model,
    init_mlp,
    init_static_mixer,
    language_model,
    mlp,
    rope,
    train,
    view,
    window,
)
from jax_attn.command_line import check_positive, parse
from jax_attn.mlp import activate
from jax_attn.report import training_progress

# Of every head at every evaluation, on held-out text: means, and the largest of the largest logits.
SEEN = ("entropy", "expected_distance", "first_mass", "max_logit")
PROMPT = "def read(self, name):\n    "


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes by their letters; steps and seeds of every model; where text comes from and goes."""

    D: int = 64
    N: int = 4
    F: int = 256
    L: int = 2
    T: int = 64
    B: int = 8
    # On a CPU the backward pass of an exact GELU takes as long as the rest of this model.
    activation: str = "relu"
    steps: int = 400
    seeds: int = 3
    learning_rate: float = 4e-3
    warmup: int = 40
    weight_decay: float = 0.1
    eval_every: int = 40
    eval_windows: int = 128
    data: str = ""
    out: str = "runs/flow"


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {"steps": 60, "seeds": 1, "warmup": 10, "eval_every": 20},
    "tpu": {
        **{"D": 512, "N": 8, "F": 2048, "L": 6, "T": 256, "B": 64, "steps": 5000},
        **{"learning_rate": 1e-3, "warmup": 200, "eval_every": 250, "eval_windows": 512},
        "activation": "gelu",
    },
}


def check(cfg: Config) -> None:
    """Refuse sizes that mean nothing, before anything is compiled."""
    check_positive(cfg)
    if not cfg.learning_rate > 0:
        raise ValueError(f"--learning_rate must be > 0, got {cfg.learning_rate}")
    activate(cfg.activation, jnp.zeros(1))
    if cfg.D % cfg.N or (cfg.D // cfg.N) % 2:
        raise ValueError(f"--N={cfg.N} heads must divide --D={cfg.D} into even widths, for RoPE")
    if cfg.T < 8:
        raise ValueError(f"--T must be at least 8, got {cfg.T}: the claims look at sentences")
    if not cfg.out:
        raise ValueError("--out must name a folder")


class Model(NamedTuple):
    """One row of the comparison: how to draw all seeds of it, what stays at its init."""

    title: str
    init: Callable[[jax.Array], Any]
    frozen: str = ""


def attend(cfg: Config) -> Callable[..., Any]:
    """Bind the options of every attention layer here: causal, RoPE."""
    return partial(attention, mask=causal(), rope=rope.plain(cfg.D // cfg.N))


def bind(cfg: Config, attend: Callable[..., Any]) -> partial[Any]:
    """Bind the options of this experiment to the language model."""
    return partial(language_model, attend=attend, feed=partial(mlp, activation=cfg.activation))


def models(cfg: Config) -> dict[str, Model]:
    """Declare the models. Each block has as many parameters as the full one, to within 1 %."""
    D, N, H, T = cfg.D, cfg.N, cfg.D // cfg.N, cfg.T
    budget = 4 * D * D + 2 * D * cfg.F
    static = 2 * D * D + N * T * T

    def lm(layer: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
        init = partial(init_language_model, V=data.VOCABULARY, D=D, L=cfg.L, layer=layer)
        # Random draws run once, but optimising them takes XLA longer than compiling the step.
        return jax.jit(jax.vmap(init), compiler_options={"xla_backend_optimization_level": 0})

    def feed(spent: int) -> Callable[[jax.Array], Any]:
        return partial(init_mlp, D=D, F=max(1, round((budget - spent) / (2 * D))))

    heads = partial(init_attention, D=D, N=N)
    more_heads = partial(init_attention, D=D, N=round(budget / (4 * D * H)), H=H)
    mixer = partial(init_static_mixer, D=D, N=N, T=T)
    full = lm(partial(init_block, D=D, attention=heads, mlp=feed(4 * D * D)))
    made = {
        "both": Model("attention → MLP", full),
        "attention": Model("attention only", lm(partial(init_block, D=D, attention=more_heads))),
        "mlp": Model("MLP only", lm(partial(init_block, D=D, mlp=feed(0)))),
        "static": Model(
            "static mixer → MLP", lm(partial(init_block, D=D, mixer=mixer, mlp=feed(static)))
        ),
        "frozen_attention": Model("attention frozen → MLP", full, "attention"),
        "frozen_mlp": Model("attention → MLP frozen", full, "mlp"),
    }
    one = jax.random.split(jax.random.key(0), 1)
    sizes = {name: count(jax.eval_shape(model.init, one)) for name, model in made.items()}
    for name, size in sizes.items():
        if abs(size / sizes["both"] - 1) > 0.01:
            raise ValueError(
                f"model {name!r} has {size:,} parameters but 'both' has {sizes['both']:,}: more "
                f"than 1 % apart; with D={D}, N={N}, T={T} give another F than {cfg.F}"
            )
    return made


def optimizer(cfg: Config, frozen: str) -> optax.GradientTransformation:
    """Clip, AdamW, warm-up (at most half the steps) and cosine; a frozen part gets no update."""
    warmup = min(cfg.warmup, cfg.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(
        # Not from 0: both parts are to move from the first step on.
        cfg.learning_rate / max(warmup, 1),
        cfg.learning_rate,
        warmup_steps=warmup,
        decay_steps=cfg.steps,
        end_value=cfg.learning_rate / 10,
    )
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=cfg.weight_decay)
    )
    if not frozen:
        return tx

    def label(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if jax.tree_util.DictKey(frozen) in path else "trained", params
        )

    return optax.multi_transform({"trained": tx, "frozen": optax.set_to_zero()}, label)


class Trained(NamedTuple):
    """One model after training; leaves of the trees have a leading axis of seeds."""

    title: str
    parameters: int
    before: Any
    after: Any
    history: train.History
    bits: np.ndarray


def losses(cfg: Config, text: data.Text) -> tuple[train.LossFn, Callable[[Any], Any]]:
    """Build the training loss of one model, and the held-out loss of all its seeds."""
    apply = bind(cfg, attend(cfg))
    watched = bind(cfg, partial(attend(cfg), observe=SEEN, reduce=head_summary))
    tokens = data.windows(text.heldout, B=cfg.B, T=cfg.T, count=max(cfg.eval_windows // cfg.B, 1))

    def loss_fn(params: Any, tokens: jax.Array, key: jax.Array) -> Any:
        logits_BTV, _ = apply(params, tokens[:, :-1])
        return train.next_token_loss(logits_BTV, tokens[:, 1:]), {}

    @jax.jit
    @jax.vmap
    def evaluate(params: Any) -> dict[str, jax.Array]:
        def one(tokens: jax.Array) -> Any:
            logits_BTV, aux = watched(params, tokens[:, :-1])
            seen = aux["attention"]["seen"] if "attention" in params["layers"] else {}
            return train.next_token_loss(logits_BTV, tokens[:, 1:]), seen

        loss, seen = jax.lax.map(one, tokens)
        made = {"bits_per_byte": train.bits_per_byte(jnp.mean(loss))}
        for name, heads in seen.items():
            largest = name == "max_logit"
            made[name] = jnp.max(heads["max"], 0) if largest else jnp.mean(heads["mean"], 0)
        return made

    return loss_fn, evaluate


def train_model(
    cfg: Config,
    text: data.Text,
    name: str,
    model: Model,
    loss_fn: train.LossFn,
    evaluate: Callable[[Any], Any],
    progress: Any,
) -> Trained:
    """Train all seeds of one model at once by vmap; seed i sees the same data in every model."""

    def batch(step: int) -> np.ndarray:
        draws = [data.batch(text.train, seed, step, B=cfg.B, T=cfg.T) for seed in range(cfg.seeds)]
        return np.stack(draws)

    tx = optimizer(cfg, model.frozen)
    seeds = jnp.stack([jax.random.key(seed) for seed in range(cfg.seeds)])
    before = model.init(seeds)
    parts = tuple(part for part in ("attention", "mixer", "mlp") if part in before["layers"])
    step_fn = jax.jit(
        jax.vmap(train.make_train_step(loss_fn, tx, parts=parts), in_axes=(0, 0, None)),
        donate_argnums=0,
    )
    state = jax.jit(jax.vmap(partial(train.init_state, tx=tx)))(before)

    state, history = train.fit(
        step_fn,
        state,
        batch,
        steps=cfg.steps,
        key=jax.random.key(0),
        evaluate=evaluate,
        eval_every=cfg.eval_every,
        metrics_path=pathlib.Path(cfg.out, "metrics.jsonl"),
        tags={"model": name},
        title=model.title,
        tokens_per_step=cfg.seeds * cfg.B * cfg.T,
        progress=progress,
    )
    bits = np.asarray(history.eval[-1]["eval/bits_per_byte"])
    size = count(before) // cfg.seeds
    return Trained(model.title, size, before, state.params, history, bits)


def write_sample(cfg: Config, params: Any) -> str:
    """Let the trained model continue a prompt, looking back no further than it was trained to."""
    near = partial(attend(cfg), mask=causal() & window(cfg.T - 1))
    tokens = generate(
        params,
        jnp.asarray(data.encode(PROMPT))[None],
        steps=400,
        key=jax.random.key(0),
        temperature=0.7,
        model=bind(cfg, near),
    )
    return data.decode(np.asarray(tokens[0]))


def main(argv: list[str] | None = None) -> int:
    """Train, measure, write the report; the exit code is 0 whatever the verdicts are."""
    began = time.perf_counter()
    cfg = parse(Config, PRESETS, __doc__ or "", argv)
    out = pathlib.Path(cfg.out)
    try:
        check(cfg)
        made = models(cfg)
        text = data.load_text(cfg.data or None, T=cfg.T)
        loss_fn, evaluate = losses(cfg, text)
        inputs = data.windows(text.heldout, B=7, T=cfg.T, count=1)[0, :, :-1]
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.jsonl").unlink(missing_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    trained = {}
    with training_progress() as progress:
        for name, model in made.items():
            trained[name] = train_model(cfg, text, name, model, loss_fn, evaluate, progress)
    print("measuring the claims, drawing the figures", file=sys.stderr)
    claims = _flow_claims.measure(cfg, trained, bind(cfg, attend(cfg)), jnp.asarray(inputs))
    figures = _flow_figures.draw(cfg, trained, claims.seen, out)
    maps_LNTT = claims.seen["line"]["after"][:, 0]
    page = view.attention_html(
        list(claims.seen["texts"][0]), maps_LNTT, out / "heads.html", title="Heads after training"
    )
    sample = write_sample(cfg, jax.tree.map(lambda leaf: leaf[0], trained["both"].after))

    rows = [
        {
            "model": model.title,
            "parameters": model.parameters,
            "bits_per_byte": round(float(model.bits.mean()), 4),
            "min": round(float(model.bits.min()), 4),
            "max": round(float(model.bits.max()), 4),
        }
        for model in trained.values()
    ]
    summary = {
        "config": dataclasses.asdict(cfg),
        **_report.environment(),
        "text": {"name": text.name, "sha256": text.sha256},
        "table": rows,
        "claims": [{**claim._asdict(), "verdict": claim.verdict} for claim in claims.claims],
        "seconds": round(time.perf_counter() - began, 1),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    _report.write_html(
        out / "report.html",
        title="Attention hands the feed-forward layer an output",
        intro=(__doc__ or "").split("\n\n")[1],
        summary=summary,
        figures=figures,
        sample=sample,
    )
    show(rich.console.Console(), summary)
    print(f"wrote {out / 'report.html'} and {page} in {summary['seconds']:.0f} s")
    return 0


def show(console: rich.console.Console, summary: dict[str, Any]) -> None:
    """Print the table and one verdict line a claim."""
    seeds = summary["config"]["seeds"]
    table = rich.table.Table(box=rich.box.SIMPLE, title=f"held-out bits per byte, {seeds} seeds")
    for title in ("model", "parameters", "mean", "min", "max"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for row in summary["table"]:
        figures = (f"{row[key]:.3f}" for key in ("bits_per_byte", "min", "max"))
        table.add_row(row["model"], f"{row['parameters']:,}", *figures)
    console.print(table)
    for claim in summary["claims"]:
        style = {True: "green", False: "red", None: "yellow"}[claim["holds"]]
        verdict = f"[{style}]{claim['name']:>3} {claim['verdict'].upper()}[/]"
        console.print(f"{verdict}  {claim['statement']}", highlight=False)
        console.print(f"    {claim['measured']}", highlight=False, markup=False)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("stopped; the steps made so far are in metrics.jsonl", file=sys.stderr)
        raise SystemExit(130) from None
