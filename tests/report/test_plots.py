"""Plots appear when their runs have what it takes, and show what an aggregation by other means gives."""

import collections
import itertools
import math
import random
import statistics

import pytest

import hydrax
from hydrax.core.build import ConfigError
from hydrax.report.draw import MARKERS, _boxes, _covered, draw, spread
from hydrax.report.plot import Heat
from hydrax.report.plots import plots
from hydrax.report.read import read
from hydrax.report.study import study
from tests.report.conftest import SMALL, config, write_run


def names(folder, x=None):
    return [plot.name for plot in plots(study(read([folder])[0]), x)]


def rows(folder, name):
    """The table of a plot, as dicts."""
    (plot,) = (plot for plot in plots(study(read([folder])[0])) if plot.name == name)
    columns, found = plot.table()
    return [dict(zip(columns, row, strict=True)) for row in found]


def test_a_single_run_has_no_plots(tmp_path):
    write_run(tmp_path / "a", config(), {"val_loss": 1.0})
    assert names(tmp_path) == []


def test_rates(tmp_path):
    write_run(tmp_path / "a", config(optim__lr=0.1), {"val_loss": 1.0})
    write_run(tmp_path / "b", config(optim__lr=0.2), {"val_loss": 2.0})
    assert names(tmp_path) == ["learning_rate"]
    assert [(r["lr"], r["val_loss"], r["best"]) for r in rows(tmp_path, "learning_rate")] == [
        (0.1, 1.0, True),
        (0.2, 2.0, False),
    ]


@pytest.fixture
def ratios(tmp_path):
    """Two mixers in three ratios and attention alone, two rates, three seeds; and what was made up."""
    made, random_ = [], random.Random(1)
    hybrids = {(m, p): p.format(m) for m in ("gla", "gdn") for p in ("4*{}", "3*{},attn", "2*({},attn)")}
    for (mixer, form), pattern in [*hybrids.items(), (("attn", ""), "4*attn")]:
        for lr, seed in itertools.product((0.001, 0.01), range(3)):
            loss = random_.uniform(1, 2)
            values = config(model__pattern=pattern, optim__lr=lr, train__seed=seed)
            write_run(tmp_path / f"{len(made)}", values, {"val_loss": loss, "val_bits_per_byte": loss / math.log(2)})
            made.append((mixer, form, pattern, lr, loss / math.log(2)))
    return tmp_path, made


def best(made):
    """Pattern -> mean, lowest and highest of the rate with the lowest mean: by other means than the report's."""
    by_arm = collections.defaultdict(lambda: collections.defaultdict(list))
    for *_, pattern, lr, bits in made:
        by_arm[pattern][lr].append(bits)
    found = {}
    for pattern, rates in by_arm.items():
        values = sorted(rates.values(), key=statistics.mean)[0]
        found[pattern] = (pytest.approx(statistics.mean(values)), min(values), max(values))
    return found


def test_ratio(ratios):
    folder, made = ratios
    assert names(folder) == ["ratio_val_bits_per_byte", "cache", "learning_rate"]
    table, wanted = rows(folder, "ratio_val_bits_per_byte"), best(made)
    text = {"4*{}": "no attention", "3*{},attn": "3:1", "2*({},attn)": "1:1", "": "any"}
    found = {(r["arm"], r["recurrent:full"]): (r["val_bits_per_byte"], r["lowest"], r["highest"]) for r in table}
    arms = {(m, f, p) for m, f, p, *_ in made}
    label = {"4*{}": "{}", "3*{},attn": "{} 3:1", "2*({},attn)": "{} 1:1", "": "{}"}
    assert found == {(label[f].format(m), text[f]): wanted[p] for m, f, p in arms}
    assert all(r["runs"] == 3 for r in table)


def test_cache(ratios):
    folder, made = ratios
    wanted = {
        (hydrax.cost({"d_model": 16, "vocab_size": 64, "pattern": p}, seq_len=64).cache_bytes, *values)
        for p, values in (
            (p, [v.expected if hasattr(v, "expected") else v for v in vs]) for p, vs in best(made).items()
        )
    }
    found = {(r["cache_bytes"], r["val_bits_per_byte"], r["lowest"], r["highest"]) for r in rows(folder, "cache")}
    assert sorted(found) == [pytest.approx(row) for row in sorted(wanted)]


def test_the_front_is_what_nothing_smaller_beats(ratios):
    from hydrax.report.draw import _front

    (plot,) = (p for p in plots(study(read([ratios[0]])[0])) if p.name == "cache")
    points = [(p.x, p.y.mean) for s in plot.series for p in s.points]
    corners = _front(plot)
    undominated = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert undominated == set(corners) & set(points)
    assert corners == sorted(corners, key=lambda c: (c[0], -c[1]))


def test_ratio_needs_two_ratios_of_a_mixer(tmp_path):
    for i, pattern in enumerate(["gla", "gdn,attn", "attn"]):
        write_run(tmp_path / str(i), config(model__pattern=pattern), {"val_loss": float(i)})
    assert names(tmp_path) == ["cache"]


def test_state_is_what_does_not_grow(tmp_path):
    patterns = ["gla", "gla,attn", "swa", "attn"]
    for i, pattern in enumerate(patterns):
        mixers = {"swa": {"window": 16}}
        values = config(model__pattern=pattern, model__mixers=mixers)
        write_run(tmp_path / str(i), values, {"val_loss": 1.0, "val_accuracy": i / 4})
    table = rows(tmp_path, "state")
    model = {"d_model": 16, "vocab_size": 64, "mixers": {"swa": {"window": 16}}}
    cost = {p: hydrax.cost({**model, "pattern": p}, seq_len=64) for p in patterns}
    assert cost["gla"].state_bytes == cost["gla,attn"].state_bytes > 0 == cost["swa"].state_bytes
    assert {r["arm"]: r["state_bytes"] for r in table} == {
        "gla": cost["gla"].state_bytes,
        "gla 1:1": cost["gla"].state_bytes,
        "swa": cost["swa"].kv_bytes,
        "attn": "any",
    }


def test_state_needs_accuracy(tmp_path):
    for pattern in ("gla", "2*gla"):
        write_run(tmp_path / pattern, config(model__pattern=pattern), {"val_loss": 1.0})
    assert names(tmp_path) == ["cache"]


def test_slices_of_two_keys_are_heat_maps(tmp_path):
    cells = {(n, d): random.Random(n + d).random() for n in (32, 64, 128) for d in (0, 50)}
    for seed in range(2):
        slices = {f"length={n},depth={d}": x + 0.1 * seed for (n, d), x in cells.items()}
        write_run(
            tmp_path / str(seed), config(train__seed=seed), {"val_loss": 1, "val_accuracy": 1, "val_slices": slices}
        )
    assert names(tmp_path) == ["heat_length_depth", "slice_length_over_depth", "slice_depth_over_length"]
    table = rows(tmp_path, "heat_length_depth")
    assert {(int(r["length"]), int(r["depth"])): r["val_accuracy"] for r in table} == pytest.approx(
        {key: x + 0.05 for key, x in cells.items()}
    )
    lengths = {int(r["length"]): r["val_accuracy"] for r in rows(tmp_path, "slice_length_over_depth")}
    assert lengths == pytest.approx({n: (cells[n, 0] + cells[n, 50]) / 2 + 0.05 for n in (32, 64, 128)})


def test_slices_of_one_key_are_lines_in_the_order_of_their_numbers(tmp_path):
    slices = {"length=65-128": 0.2, "length=9-64": 0.9, "length=129-256": 0.1, "odd": 0.5}
    write_run(tmp_path / "a", config(), {"val_loss": 1.0, "val_accuracy": 0.5, "val_slices": slices})
    (plot,) = plots(study(read([tmp_path])[0]))
    assert plot.x.ticks == ["9-64", "65-128", "129-256"]
    assert plot.marks == {"trained up to here": 0.5}  # data.seq_len = 64
    assert [r["val_accuracy"] for r in rows(tmp_path, "slice_length")] == [0.9, 0.2, 0.1]


def test_a_slice_with_one_value_has_no_plot(tmp_path):
    write_run(tmp_path / "a", config(), {"val_loss": 1.0, "val_accuracy": 0.5, "val_slices": {"pairs=8": 0.5}})
    assert names(tmp_path) == []


def test_curves(tmp_path):
    losses = {seed: [random.Random(seed * n).random() for n in range(1, 31)] for seed in (1, 2)}
    for seed, values in losses.items():
        records = [{"step": n, "loss": x} for n, x in enumerate(values, 1)]
        write_run(tmp_path / str(seed), config(train__seed=seed), {"val_loss": 1.0}, records)
    assert names(tmp_path) == ["loss_tokens", "loss_flops"]
    table = rows(tmp_path, "loss_tokens")
    assert [r["tokens"] for r in table] == [256 * n for n in range(1, 31)]  # 4 rows of 64
    pairs = list(zip(*losses.values(), strict=True))
    assert [r["loss"] for r in table] == pytest.approx([sum(p) / 2 for p in pairs])
    assert [(r["lowest"], r["highest"]) for r in table] == [(min(p), max(p)) for p in pairs]
    per_token = hydrax.cost(config()["model"], seq_len=64).train_flops_per_token
    assert [r["flops"] for r in rows(tmp_path, "loss_flops")] == pytest.approx(
        [256 * n * per_token for n in range(1, 31)]
    )


def test_long_curves_are_means_over_parts(tmp_path):
    records = [{"step": n, "loss": float(n)} for n in range(1, 601)]
    write_run(tmp_path / "a", config(), {"val_loss": 1.0}, records)
    table = rows(tmp_path, "loss_tokens")
    assert len(table) == 60
    assert [r["loss"] for r in table] == [10 * i + 5.5 for i in range(60)]
    assert [r["tokens"] for r in table] == [256 * (10 * i + 5.5) for i in range(60)]


def test_curves_of_validation_where_there_are_enough(tmp_path):
    records = [{"step": n, "loss": 2.0, "val_loss": 1 / n, "val_accuracy": n / 4} for n in range(1, 5)]
    write_run(tmp_path / "a", config(), {"val_loss": 0.25, "val_accuracy": 1.0}, records)
    assert names(tmp_path) == ["val_loss_tokens", "val_loss_flops", "val_accuracy_tokens", "val_accuracy_flops"]
    assert [r["val_loss"] for r in rows(tmp_path, "val_loss_tokens")] == [1, 1 / 2, 1 / 3, 1 / 4]


def test_speed_needs_several_lengths(tmp_path):
    for pattern, length in [("gla", 16), ("gla", 32), ("attn", 16)]:
        speeds = {"val_loss": 1.0, "tokens_per_second": 1000.0 * length}
        write_run(tmp_path / f"{pattern}{length}", config(model__pattern=pattern, data__seq_len=length), speeds)
    assert "speed" in names(tmp_path)
    assert [(r["arm"], r["seq_len"], r["tokens_per_second"]) for r in rows(tmp_path, "speed")] == [
        ("gla", 16, 16000.0),
        ("gla", 32, 32000.0),
    ]


def test_a_key_of_ones_own(tmp_path):
    for decay, loss in ((0.3, 1.0), (0.1, 3.0), (0.2, 2.0)):
        write_run(tmp_path / str(decay), config(optim__weight_decay=decay), {"val_loss": loss})
    assert names(tmp_path) == []
    (plot,) = plots(study(read([tmp_path])[0]), "optim.weight_decay")
    assert [row[1:3] for row in plot.table()[1]] == [["0.1", 3.0], ["0.2", 2.0], ["0.3", 1.0]]
    with pytest.raises(
        ConfigError, match=r"x = 'train.steps': expected a key in which arms differ: optim.weight_decay"
    ):
        names(tmp_path, "train.steps")


def test_a_model_of_another_version_has_no_costs_but_the_rest(tmp_path):
    for lr in (0.1, 0.2):
        values = config(optim__lr=lr)
        values["model"]["from_the_future"] = 1
        write_run(tmp_path / str(lr), values, {"val_loss": lr})
    assert names(tmp_path) == ["learning_rate"]


def test_spread():
    assert spread([5.0, 1.0, 9.0], 2.0) == [5.0, 1.0, 9.0]
    assert spread([1.0, 1.0], 2.0) == [0.0, 2.0]
    assert spread([10.0, 1.0, 1.5, 2.0], 1.0) == [10.0, 0.5, 1.5, 2.5]
    places = [random.Random(i).random() for i in range(20)]
    moved = spread(places, 0.1)
    gaps = [b - a for a, b in itertools.pairwise(sorted(moved))]
    assert min(gaps) > 0.1 - 1e-9
    assert sorted(range(20), key=lambda i: places[i]) == sorted(range(20), key=lambda i: moved[i])


def test_names_of_points_cover_nothing(ratios):
    (plot,) = (p for p in plots(study(read([ratios[0]])[0])) if p.name == "cache")
    figure = draw(plot)
    (axes,) = figure.axes
    figure.canvas.draw()
    boxes = [(b.x0, b.y0, b.x1, b.y1) for b in (text.get_window_extent() for text in axes.texts)]
    assert len(boxes) == 7
    inside = axes.get_window_extent()
    for i, box in enumerate(boxes):
        assert _covered(box, boxes[:i], inside) == 0
    spots = axes.transData.transform([(p.x, p.y.mean) for s in plot.series for p in s.points])
    assert sum(_covered(box, [(x - 2, y - 2, x + 2, y + 2) for x, y in spots], inside) for box in boxes) == 0


def test_names_beside_lines_do_not_overlap(tmp_path):
    for i in range(14):
        for lr in (0.1, 0.2):
            write_run(
                tmp_path / f"{i}-{lr}", config(optim__weight_decay=i / 10, optim__lr=lr), {"val_loss": 1 + 1e-4 * i}
            )
    (plot,) = plots(study(read([tmp_path])[0]))
    figure = draw(plot)
    (axes,) = figure.axes
    figure.canvas.draw()
    edges = sorted((box.y0, box.y1) for box in (text.get_window_extent() for text in axes.texts))
    assert len(edges) == 14
    assert all(top <= bottom + 1 for (_, top), (bottom, _) in itertools.pairwise(edges))
    assert max(text.get_window_extent().x1 for text in axes.texts) <= figure.bbox.x1
    assert len(MARKERS) < 14  # markers repeat, names do not
    assert len({text.get_text() for text in axes.texts}) == 14


def test_boxes_follow_lines():
    found = _boxes([(0, 0), (10, 0), (10, 6)], 2.0)
    assert {(0.0, 0.0), (10.0, 0.0), (10.0, 6.0)} <= {((a + c) / 2, (b + d) / 2) for a, b, c, d in found}


def test_heat_maps_of_several_arms_are_drawn(tmp_path):
    slices = {f"length={n},depth={d}": 0.5 for n in (32, 64) for d in (0, 50)}
    for pattern in ("gla", "gdn", "attn", "swa"):
        figures = {"val_loss": 1.0, "val_accuracy": 0.5, "val_slices": slices}
        write_run(tmp_path / pattern, config(model__pattern=pattern), figures)
    (heat,) = (p for p in plots(study(read([tmp_path])[0])) if isinstance(p, Heat))
    titles = [axes.get_title() for axes in draw(heat).axes if axes.get_visible()]
    assert sorted(filter(None, titles)) == ["attn", "gdn", "gla", "swa"]
    assert SMALL["data.seq_len"] == 64
