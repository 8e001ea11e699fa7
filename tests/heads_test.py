"""Edits of heads by brute force, ranks by hand, verdicts either way."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _character, _heads_sweep, heads
from experiments._character import Character
from experiments._heads_sweep import HEADS, MLPS, masks, shuffled, sorted_out
from jax_attn import intervene, language_model, make_mesh
from tests.formulas import draw

MODEL = Character(D=12, N=3, L=2, T=7, B=2)
TINY = ["--model.D=12", "--model.N=3", "--model.L=2", "--model.T=7", "--model.B=2"]
RUN = [*TINY, "--model.steps=2", "--every=1", "--eval_windows=5", "--seeds=2"]


@pytest.mark.long
def test_writes_all_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(heads, "read_mesh", lambda text: mesh)
    assert heads.main([*RUN, f"--out={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    table = {row["what"]: row for row in summary["table"]}
    assert len(table) == len(summary["table"])
    for kind in HEADS:
        row = table[f"cost of {kind}, attention"]
        assert all(len(row[name]) == 2 for name in ("one head", "one layer", "all layers"))
        assert min(table[f"prediction moved by {kind}, attention"]["all layers"]) > 0
    for kind in MLPS:
        assert min(table[f"prediction moved by {kind}, MLP"]["all layers"]) > 0
    assert len(summary["verdicts"]) == 8
    assert len(summary["figures"]) == 3
    for figure in summary["figures"]:
        assert (tmp_path / figure["file"]).stat().st_size > 10_000
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]


@pytest.fixture(scope="module")
def swept() -> Any:
    """A model, windows of it, what a run without edits holds, and all edits at once."""
    params = draw(partial(_character.init, MODEL), scale=0.5)
    windows = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, MODEL.T + 1)))
    clean = jax.jit(partial(_heads_sweep.clean, MODEL))(params, windows[:, :-1])
    mean = (clean.o_LBTNE[:, 0].mean(axis=1), clean.mlp_LBTD[:, 0].mean(axis=1))
    runs, key = masks(MODEL.L, MODEL.N), jax.random.key(1)
    made = jax.jit(partial(_heads_sweep.sweep, MODEL))(params, mean, runs, windows, key)
    found = {name: sorted_out(np.asarray(x), MODEL.L, MODEL.N) for name, x in made.items()}
    return params, windows, clean, mean, key, made["loss"][0], found


def test_each_run_edits_one_thing() -> None:
    runs = masks(MODEL.L, MODEL.N)
    assert len(runs.heads) == len(runs.mlps) == 56, "a multiple of 8"
    edited = runs.heads.any(axis=(2, 3)).sum(axis=1) + runs.mlps.any(axis=2).sum(axis=1)
    assert edited.tolist() == [0] + [1] * (5 * 9 + 3 * 3) + [0]
    numbers = sorted_out(np.arange(56.0), MODEL.L, MODEL.N)
    for k, kind in enumerate(HEADS):
        found = numbers["heads"][kind]
        for (layer, head), run in np.ndenumerate(found["head"]):
            assert np.argwhere(runs.heads[int(run)]).tolist() == [[k, layer, head]]
        for layer, run in enumerate(found["layer"]):
            expected = [[k, layer, head] for head in range(MODEL.N)]
            assert np.argwhere(runs.heads[int(run)]).tolist() == expected
        assert runs.heads[int(found["all"]), k].all()
    for k, kind in enumerate(MLPS):
        found = numbers["mlps"][kind]
        for layer, run in enumerate(found["layer"]):
            assert np.argwhere(runs.mlps[int(run)]).tolist() == [[k, layer]]
        assert runs.mlps[int(found["all"]), k].all()


def test_weights_are_permuted_within_the_past() -> None:
    p_BNTS = np.tril(np.random.default_rng(0).uniform(0.1, 1, (2, 3, 9, 9)))
    made, other = (np.asarray(shuffled(jnp.asarray(p_BNTS), jax.random.key(i))) for i in (0, 1))
    assert (np.triu(made, 1) == 0).all()
    np.testing.assert_array_equal(np.sort(made, axis=-1), np.sort(p_BNTS.astype(made.dtype)))
    assert (made != other).any()
    # Every place is as likely as another.
    row_BNTS = jnp.zeros((3000, 1, 3, 3)).at[..., 0].set(1.0)
    shares = np.asarray(shuffled(row_BNTS, jax.random.key(2))).mean(axis=(0, 1))
    np.testing.assert_allclose(shares[2], 1 / 3, atol=0.04)


def test_the_run_without_edits_is_the_model(swept: Any) -> None:
    params, windows, _, _, _, usual, found = swept
    expected = jax.jit(partial(_character.loss, MODEL))(params, windows)
    np.testing.assert_allclose(usual, expected, rtol=1e-5)
    for x in found["moved"]["heads"].values():
        assert (x["head"] > 0).all()


def test_heads_are_edited_as_outputs_put_in_by_hand(swept: Any) -> None:
    params, windows, clean, mean, key, usual, found = swept
    o, v = np.asarray(clean.o_LBTNE), np.asarray(clean.v_LBSNE)
    counts = np.arange(1, MODEL.T + 1)[None, None, :, None, None]
    q, k = np.asarray(clean.q_LBTNH), np.asarray(clean.k_LBSNH)
    logits = np.einsum("LBTNH,LBSNH->LBNTS", q, k) / np.sqrt(q.shape[-1])
    p = np.exp(logits) * np.tri(MODEL.T)
    p = jnp.asarray(p / p.sum(axis=-1, keepdims=True))
    keys = jax.random.split(key, MODEL.L)
    p = np.stack([shuffled(one, at) for one, at in zip(p, keys, strict=True)])
    by_hand = {
        "zero": 0 * o,
        "mean": np.broadcast_to(mean[0][:, None, None], o.shape),
        "uniform": np.cumsum(v, axis=2) / counts,
        "patched": np.concatenate([o[:, 1:], o[:, :1]], axis=1),
        "permuted": np.einsum("LBNTS,LBSNE->LBTNE", p, v),
    }

    @jax.jit
    def predicted(heads_LN: jax.Array, o_LBTNE: jax.Array) -> jax.Array:
        edit = intervene.given_output(heads_LN, o_LBTNE)
        attend, feed = _character.attend(MODEL), _character.feed
        logits_BTV, _ = language_model(
            params, windows[:, :-1], attend=attend, feed=feed, intervene=edit
        )
        return jax.nn.log_softmax(logits_BTV)

    p_BTV = np.exp(predicted(jnp.zeros((2, 3), bool), jnp.asarray(o)))
    for kind, given in by_hand.items():
        for layer, head in ((0, 1), (1, 2)):
            chosen = intervene.heads(MODEL.L, MODEL.N, [(layer, head)])
            log_p_BTV = np.asarray(predicted(chosen, jnp.asarray(given, jnp.float32)))
            targets_BT = np.asarray(windows[:, 1:])[..., None]
            cost = -np.take_along_axis(log_p_BTV, targets_BT, axis=2).mean() - usual
            change = np.abs(np.exp(log_p_BTV) - p_BTV).sum(axis=-1).mean() / 2
            got = found["loss"]["heads"][kind]["head"][layer, head]
            np.testing.assert_allclose(got, cost, rtol=1e-3, atol=2e-5)
            got = found["moved"]["heads"][kind]["head"][layer, head]
            np.testing.assert_allclose(got, change, rtol=1e-3, atol=1e-6)


def test_mlps_are_edited_as_biases_put_in_by_hand(swept: Any) -> None:
    """An MLP whose output is a constant is one without its last matrix, and with a bias."""
    params, windows, _, mean, _, usual, found = swept
    loss = jax.jit(partial(_character.loss, MODEL))
    for layer in range(MODEL.L):
        for kind, bias_LD in (("zero", 0 * mean[1]), ("mean", mean[1])):
            leaves = dict(params["layers"]["mlp"])
            leaves["w_out_FD"] = leaves["w_out_FD"].at[layer].set(0.0)
            leaves["b_out_D"] = jnp.zeros_like(bias_LD).at[layer].set(bias_LD[layer])
            cost = loss(params | {"layers": params["layers"] | {"mlp": leaves}}, windows) - usual
            got = found["loss"]["mlps"][kind]["layer"][layer]
            np.testing.assert_allclose(got, cost, rtol=1e-3, atol=2e-5)


@pytest.mark.long
def test_statistics_are_those_of_maps_written_out(swept: Any) -> None:
    params, windows, clean, *_ = swept
    seen = jax.jit(partial(_heads_sweep.statistics, MODEL))(params, windows)
    wo = np.asarray(params["layers"]["attention"]["wo_NED"])
    written = np.einsum("LBTNE,LNED->LBTND", clean.o_LBTNE, wo)
    np.testing.assert_allclose(
        seen["norm"], np.linalg.norm(written, axis=-1).mean(axis=(1, 2)), rtol=1e-4
    )
    value_LBSN = np.linalg.norm(np.einsum("LBSNE,LNED->LBSND", clean.v_LBSNE, wo), axis=-1)
    q, k = np.asarray(clean.q_LBTNH), np.asarray(clean.k_LBSNH)
    p = np.exp(np.einsum("LBTNH,LBSNH->LBNTS", q, k) / np.sqrt(q.shape[-1])) * np.tri(MODEL.T)
    p = p / p.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(seen["max_prob"], p.max(axis=-1).mean(axis=(1, 3)), rtol=1e-4)
    np.testing.assert_allclose(seen["first_mass"], p[..., 0].mean(axis=(1, 3)), rtol=1e-4)
    weighted = p * value_LBSN.transpose(0, 1, 3, 2)[:, :, :, None]
    usual = np.cumsum(value_LBSN, axis=2) / np.arange(1, MODEL.T + 1)[None, None, :, None]
    ratio = weighted.sum(axis=-1)[..., 1:] / usual.transpose(0, 1, 3, 2)[..., 1:]
    np.testing.assert_allclose(seen["small_values"], ratio.mean(axis=(1, 3)), rtol=1e-4)
    share = weighted / weighted.sum(axis=-1, keepdims=True)
    moved = np.abs(share - p).sum(axis=-1).mean(axis=(1, 3)) / 2
    np.testing.assert_allclose(seen["apart"], moved, rtol=1e-3)
    # A gate's gradient is that of Wo along itself.
    gradient = jax.jit(jax.grad(partial(_character.loss, MODEL)))
    of_windows = [gradient(params, window[None]) for window in windows]
    along = [np.sum(g["layers"]["attention"]["wo_NED"] * wo, axis=(2, 3)) for g in of_windows]
    np.testing.assert_allclose(seen["gate"], np.abs(along).mean(axis=0), rtol=1e-3, atol=1e-6)


def test_ranks_and_their_correlation() -> None:
    assert heads.ranks(np.array([3.0, 1.0, 3.0, 7.0])).tolist() == [2.5, 1.0, 2.5, 4.0]
    x = np.array([[1.0, 2.0, 3.0, 4.0]])
    assert heads.spearman(x, np.exp(x)) == pytest.approx(1.0)
    assert heads.spearman(x, -(x**3)) == pytest.approx(-1.0)
    # Of ranks 2 1 4 3, the squared differences add up to 4: 1 - 6 * 4 / (4 * 15).
    assert heads.spearman(x, np.array([[5.0, 2.0, 9.0, 8.0]])) == pytest.approx(0.6)
    assert np.isnan(heads.spearman(x, np.ones((1, 4))))
    # Layers that differ are no correlation within layers.
    layers = np.array([[1.0, 2.0, 3.0], [11.0, 12.0, 13.0]])
    other = np.array([[2.0, 1.0, 3.0], [13.0, 12.0, 11.0]])
    assert heads.spearman(layers, other) == pytest.approx((0.5 - 1.0) / 2)
    assert heads.spearman(layers.reshape(1, -1), other.reshape(1, -1)) > 0.5


def test_chance_is_that_of_tables_and_more_for_the_best_of_many() -> None:
    rng = np.random.default_rng(1)
    x, damage = rng.normal(size=10), rng.normal(size=10)
    one = heads.by_chance({"x": x}, damage)
    assert one == pytest.approx(0.648, abs=0.03)  # the table's bound for n = 10, two sides, 5 %
    many = heads.by_chance({str(i): rng.normal(size=10) for i in range(5)}, damage)
    assert one + 0.05 < many < 1


def planted(order: tuple[float, ...], moved: float, told: str, small: float) -> list[bool | None]:
    """Three seeds of 2 x 8 heads; `told`: the predictor that follows the damage, if any."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 1.5, (3, 2, 8))
    damage = {kind: base * scale for kind, scale in zip(HEADS, order, strict=True)}
    predictors = {name: rng.normal(size=base.shape) for name in heads.PREDICTORS}
    predictors |= {told: np.log(base)} if told else {}
    full = np.full(base.shape, 1.0)
    return [v.holds for v in heads.verdicts(damage, moved * full, predictors, small * full)]


def test_verdicts_come_out_either_way() -> None:
    small = (0.006, 0.002, 0.004, 0.005, 0.005)
    assert planted(small, 0.04, "gate", 0.9) == [True] * 8
    assert planted((0.1, 0.3, 0.2, 0.1, 0.1), 0.06, "entropy", 1.1) == [
        *(False, False, False, False, False, True, False, False)
    ]
    assert planted((0.3, 0.1, 0.2, 0.1, 0.3), 0.06, "", 1.1)[5] is not True


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.steps=0", "--model.steps must be at least 1, got 0"),
        ("--eval_windows=1", "--eval_windows must be at least 2, to patch from another, got 1"),
        ("--model.N=3", "--model.N=3 heads must divide --model.D=128 into even widths, for RoPE"),
        ("--model.data=no-such-file", "no-such-file"),
        ("--mesh=date=8", "a mesh looks like data=2"),
        ("--out=", "--out must name a folder"),
    ],
)
def test_wrong_arguments_are_one_line(argument, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert heads.main([argument, "--model.B=8"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())
