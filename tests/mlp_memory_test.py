"""Units as memories: triggers by brute force, shares by hand, verdicts either way."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _character, mlp_memory
from experiments._character import Character
from jax_attn import data, language_model, make_mesh, train

SMALL = mlp_memory.Config(
    model=Character(D=8, N=2, L=2, T=13, B=2, steps=2), eval_windows=3, windows=35, top=5, seeds=2
)
TINY = ["--model.D=8", "--model.N=2", "--model.L=2", "--model.T=13", "--model.B=2"]
RUN = [*TINY, "--model.steps=2", "--every=2", "--eval_windows=3", "--windows=35", "--top=5"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run it once, on one device: compiling for one takes a third of the time."""
    out = tmp_path_factory.mktemp("mlp_memory")
    mesh = make_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlp_memory, "read_mesh", lambda text: mesh)
        assert mlp_memory.main([*RUN, "--seeds=2", f"--out={out}"]) == 0
    return out


def test_writes_all_it_promises(ran: Path) -> None:
    summary = json.loads((ran / "summary.json").read_text())
    *table, places = summary["table"]
    assert [(row["model"], row["layer"]) for row in table] == [
        (model, layer) for model in ("trained", "random init") for layer in (1, 2)
    ]
    for row in table:
        for name in ("last 1", "last 3", "agrees", "by chance", "active", "largest"):
            assert len(row[name]) == 2
            assert all(0 <= share <= 1 for share in row[name])
        assert row["last 1"] >= row["last 2"] >= row["last 3"] >= [1 / 5, 1 / 5]
    assert places["agrees"] is None
    assert len(places["last 1"]) == 2
    assert len(summary["verdicts"]) == 7
    rows = [json.loads(line) for line in (ran / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2]
    for figure in summary["figures"]:
        assert (ran / figure["file"]).stat().st_size > 10_000


@pytest.fixture(scope="module")
def searched() -> tuple[dict, np.ndarray, mlp_memory.Seen]:
    """Parameters of one seed, windows, and what its units do on them, in the shape of one seed."""
    params = jax.jit(partial(_character.init, SMALL.model))(jax.random.key(3))
    params["norm"]["scale_D"] = jnp.linspace(0.5, 2.0, 8)
    _, chunks = mlp_memory.windows_of(SMALL, data.load_text(None))
    chunks = chunks.reshape(4, 8, 14)
    seen = jax.jit(partial(mlp_memory.look, SMALL))(params, chunks)
    return params, chunks.reshape(-1, 14), jax.tree.map(lambda x: np.asarray(x)[None], seen)


def hidden(params: dict, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray, jax.Array]:
    """All units at all places, [L,B,T,F], what is predicted there, and the loss."""

    def feed(part: dict, x_BTD: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        units = jax.nn.relu(x_BTD @ part["w_in_DF"])
        return units @ part["w_out_FD"], {"units": units}

    attend = _character.attend(SMALL.model)
    run = jax.jit(partial(language_model, attend=attend, feed=feed))
    logits_BTV, aux = run(params, windows[:, :-1])
    loss = train.next_token_loss(logits_BTV, jnp.asarray(windows[:, 1:]))
    return np.asarray(aux["mlp"]["units"]), np.asarray(logits_BTV.argmax(-1)), loss


def test_triggers_are_those_that_a_search_finds(searched) -> None:
    params, windows, seen = searched
    units_LBTF, predicted_BT, loss = hidden(params, windows)
    # These are the units of the model that was trained, not of another activation.
    np.testing.assert_allclose(loss, _character.loss(SMALL.model, params, windows), rtol=1e-5)
    late = units_LBTF[:, :, mlp_memory.BEFORE :]
    best_LFB = np.sort(late.max(2).swapaxes(1, 2))[..., ::-1]
    np.testing.assert_allclose(seen.value[0], best_LFB[..., : SMALL.top], rtol=1e-4, atol=1e-6)
    layer, unit = np.ogrid[:2, :32]
    at = units_LBTF[layer[..., None], seen.window[0], seen.position[0], unit[..., None]]
    np.testing.assert_allclose(at, seen.value[0], rtol=1e-4, atol=1e-6)
    assert all(len(set(row)) == SMALL.top for row in seen.window[0].reshape(-1, SMALL.top))
    np.testing.assert_allclose(seen.active[0], (units_LBTF > 0).mean((1, 2, 3)), rtol=1e-3)
    named_LF = seen.says[0].argmax(-1)
    equal = [(named_LF[i][late[i].argmax(-1)] == predicted_BT[:, 8:]).mean() for i in (0, 1)]
    np.testing.assert_allclose(seen.largest[0], equal, atol=1e-6)


def test_values_name_bytes_of_the_text_through_norm_and_embedding(searched) -> None:
    params, windows, seen = searched
    value = np.asarray(params["layers"]["mlp"]["w_out_FD"])
    value = value / np.sqrt((value**2).mean(-1, keepdims=True) + 1e-6)
    says = (value * np.asarray(params["norm"]["scale_D"])) @ np.asarray(params["embed_VD"]).T
    known = np.unique(windows)
    np.testing.assert_allclose(seen.says[0][..., known], says[..., known], rtol=1e-4, atol=1e-5)
    others = np.setdiff1d(np.arange(256), known)
    assert np.isneginf(seen.says[0][..., others]).all()
    assert 10 < known.size < 100


def test_numbers_of_a_layer_are_those_counted_by_hand(searched) -> None:
    _, windows, seen = searched
    numbers = mlp_memory.measured(windows, seen)
    unit_last, agrees, rank = [], [], []
    for window, position, says in zip(
        seen.window[0, 1], seen.position[0, 1], seen.says[0, 1], strict=True
    ):
        places = zip(window, position, strict=True)
        ends = [bytes(windows[w, p - 1 : p + 1].tolist()) for w, p in places]
        unit_last.append(max(ends.count(end) for end in ends) / SMALL.top)
        following = windows[window[0], position[0] + 1]
        agrees.append(says.argmax() == following)
        rank.append(sum(x > says[following] for x in says))
    assert numbers["last 2"][0, 1] == pytest.approx(np.mean(unit_last))
    assert numbers["agrees"][0, 1] == pytest.approx(np.mean(agrees))
    assert numbers["rank"][0, 1] == pytest.approx(np.mean(rank))


def test_shares_of_like_triggers() -> None:
    windows = np.array([[9, 1, 2, 3, 0], [9, 5, 2, 3, 0], [9, 5, 7, 3, 0]])
    window, position = np.array([[0, 1, 2], [0, 1, 2]]), np.array([[3, 3, 3], [3, 2, 1]])
    expected = {1: (1, 1 / 3), 2: (2 / 3, 1 / 3)}
    for last, shares in expected.items():
        np.testing.assert_allclose(mlp_memory.alike(windows, window, position, last), shares)
    same = np.zeros((2, 2), int), np.full((2, 2), 3)
    np.testing.assert_array_equal(mlp_memory.alike(windows, *same, 3), 1.0)


def test_agreement_and_its_chance() -> None:
    top = np.array([[1, 1, 2, 3], [1, 1, 1, 1]])
    following = np.array([[1, 2, 2, 1], [1, 1, 1, 1]])
    agrees, chance = mlp_memory.agreement(top, following)
    np.testing.assert_allclose(agrees, [0.5, 1.0])
    pairs = (top[:, :, None] == following[:, None, :]).mean((1, 2))
    np.testing.assert_allclose(chance, pairs)


def test_random_places_are_alike_as_often_as_bytes_are_frequent() -> None:
    windows = np.random.default_rng(0).integers(2, size=(50, 30))
    made = mlp_memory.anywhere(windows, units=400, top=25, seed=0)
    assert 0.5 < made["last 1"] < 0.65  # the larger of two like shares of 25
    assert made["last 1"] > made["last 2"] > made["last 3"] > 0.125
    assert made == mlp_memory.anywhere(windows, units=400, top=25, seed=0)


def test_units_are_written_out(searched) -> None:
    _, windows, seen = searched
    layers = mlp_memory.striking(windows, seen)
    assert [len(rows) for rows in layers] == [3, 3]
    for layer, rows in enumerate(layers):
        assert len({cells[3][0] for cells in rows}) == 3
        right = [int(cells[4].split()[0]) for cells in rows]
        assert right == sorted(right, reverse=True)
        unit = int(rows[0][0].removeprefix(f"{layer + 1}."))
        window, position = seen.window[0, layer, unit], seen.position[0, layer, unit]
        following = windows[window, position + 1]
        assert right[0] == (following == seen.says[0, layer, unit].argmax()).sum()
        end = windows[window[0], position[0] - 7 : position[0] + 1]
        first = f"{mlp_memory.shown(end)} → {mlp_memory.shown(following[:1])}"
        assert rows[0][1].startswith(first)
    assert mlp_memory.shown([97, 32, 10, 0, 200]) == "a␣↵··"


def numbers(
    last_1: list[float], agrees: list[float], last_3: tuple[float, float] = (0.25, 0.4)
) -> dict[str, np.ndarray]:
    """Plant two seeds alike, two layers: shares with the same last bytes, and agreement."""
    made = {"last 1": last_1, "last 3": list(last_3), "agrees": agrees}
    made |= {"by chance": [0.03] * len(last_1)}
    return {name: np.array([values, values]) for name, values in made.items()}


def test_verdicts_come_out_either_way() -> None:
    init = numbers([0.5, 0.5], [0.03, 0.03], (0.1, 0.1))
    places = {"last 3": np.array([0.17, 0.18])}
    good = mlp_memory.verdicts(numbers([0.9, 0.7], [0.03, 0.2]), init, places)
    assert [v.holds for v in good] == [True] * 7
    leaky = numbers([0.5, 0.5], [0.2, 0.2], (0.2, 0.4))  # deeper in later layers at init already
    bad = mlp_memory.verdicts(numbers([0.3, 0.6], [0.2, 0.05]), leaky, places)
    assert [v.holds for v in bad] == [False] * 7
    mixed = numbers([0.9, 0.7], [0.03, 0.2])
    mixed["agrees"][1, 1] = 0.04
    assert [v.holds for v in mlp_memory.verdicts(mixed, init, places)][4:6] == [None, None]
    alike = {"last 3": np.array([0.3, 0.3])}  # random places, nearly as alike as triggers
    assert mlp_memory.verdicts(mixed, init, alike)[1].holds is False


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--top=0", "--top must be at least 1, got 0"),
        ("--model.D=0", "--model.D must be at least 1, got 0"),
        ("--model.T=8", "--model.T must be above 8, got 8: triggers end later"),
        ("--top=33", "--top=33 triggers, one a window, but --windows=35 are 32"),
        ("--windows=1000000", "text_bytes has "),
        ("--mesh=date=8", "a mesh looks like data=2"),
        ("--out=", "--out must name a folder"),
    ],
)
def test_wrong_arguments_are_one_line(argument, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {option.partition("=")[0]: option for option in [*RUN, "--model.B=8", argument]}
    assert mlp_memory.main(list(given.values())) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_presets_can_be_run() -> None:
    for preset in mlp_memory.PRESETS.values():
        model = {k.removeprefix("model."): v for k, v in preset.items() if "." in k}
        own = {k: v for k, v in preset.items() if "." not in k}
        cfg = dataclasses.replace(
            mlp_memory.Config(), model=Character(**{**{"B": 8}, **model}), **own
        )
        mlp_memory.check(cfg)
