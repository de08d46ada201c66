"""The comparison of training steps: variants, turns, and what a row says."""

import json
import math

import jax.numpy as jnp
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.core.config import load_config
from hydrax.eval import training
from hydrax.eval.sides import fla_train
from hydrax.train.config import RunConfig
from launch import bench_train


def config(**overrides) -> RunConfig:
    small = {"model.pattern": "gla", "model.d_model": 16, "data.seq_len": 16, "train.batch_size": 2}
    return build(RunConfig, load_config("quickstart", **small, **overrides).to_dict())


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(training, "isolated", lambda function, *args: function(*args))
    monkeypatch.setattr(training.workers, "limited", lambda seconds, function, *args: function(*args))


def found(*seconds: float, **values) -> training.Sample:
    return training.Sample("a device", 1000, 1.0, list(seconds), 2.0, 7, **values)


def test_variants_take_turns(here):
    cfgs = {"none": config(), "full": config(**{"train.remat": "full"})}
    turns = list(training.compare(training.ours(cfgs, 3), 2, 60))
    assert [(turn.variant, turn.step.samples, len(rows)) for turn, rows in turns] == [
        ("none", 3, 1),
        ("full", 3, 2),
        ("none", 3, 2),
        ("full", 3, 2),
    ]
    rows = turns[-1][1]
    assert [row.variant for row in rows] == list(cfgs)
    for row in rows:
        assert row.step.samples == len(row.step_seconds) == 6
        assert row.tokens_per_second == 32 / row.step.median
        assert row.utilisation is None  # a CPU
        assert math.isfinite(row.loss)
    assert rows[0].loss == pytest.approx(rows[1].loss, rel=1e-5)
    assert rows[0].parameters == rows[1].parameters


def test_rows_say_where_documents_begin_if_those_of_the_run_do():
    told, bare = (set(training.batch(config(**{"data.documents": documents}))) for documents in (True, False))
    assert told - bare == {"segment_ids", "positions"} and bare < told


def test_utilisation_counts_six_flops_per_parameter_and_token(monkeypatch):
    monkeypatch.setitem(training.PEAK, "a device", 1e6)
    row = training._row(training.Variant("hydrax", "", 32, found), [found(0.5, 0.5)], "")
    assert row.tokens_per_second == 64 and row.utilisation == 6 * 1000 * 64 / 1e6 and row.peak_bytes == 7


def test_a_variant_that_fails_is_named_and_the_others_go_on(here, tmp_path):
    turns = iter((found(0.25, note="time only"), found(0.5)))

    def late() -> training.Sample:
        try:
            return next(turns)
        except StopIteration:
            raise RuntimeError("OutOfMemoryError: 80 GiB") from None

    def broken() -> training.Sample:
        raise RuntimeError("SyntaxError: compile")

    variants = [training.Variant(*v) for v in (("fla", "late", 1, late), ("fla", "broken", 1, broken))]
    variants.append(training.Variant("hydrax", "", 1, lambda: found(0.125)))
    *_, (turn, rows) = training.compare(variants, 3, 60)
    assert [row.tokens_per_second for row in rows] == [1 / 0.375, None, 8]
    assert [row.note for row in rows] == ["fails: OutOfMemoryError: 80 GiB", "fails: SyntaxError: compile", ""]
    assert training.line(rows[1]) == "fla broken: fails: SyntaxError: compile"
    assert training.line(turn) == "hydrax: 125.0 ms per step, 8 tokens/s"
    assert list(training.table(rows).columns[5].cells) == ["3", "", "8"]
    training.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_peer_trains_the_same_model():
    recipe = build(RunConfig, load_config("recipes/gdn_hybrid_340m").to_dict())
    eager, compiled = training.theirs("fla", recipe, 5)
    assert (eager.name, compiled.name) == ("eager", "torch.compile") and eager.tokens == 8 * 4096
    model = fla_train.architecture(recipe.model)
    assert model["attn"] == {"layers": [3, 7, 11, 15, 19, 23], "num_heads": 16}
    assert (model["head_dim"], model["num_heads"], model["expand_v"], model["intermediate_size"]) == (128, 8, 1, 2816)
    with pytest.raises(ConfigError, match=r"peer = 'fla': expected layers of gdn and attn, and model.pattern is gla"):
        training.theirs("fla", config(), 5)


def test_overrides_of_a_variant():
    found = bench_train._overrides("train.remat=dots, model.pattern=every(1, gdn, attn), config.optim.lr=1")
    assert found == {"train.remat": "dots", "model.pattern": "every(1, gdn, attn)", "optim.lr": "1"}
    assert bench_train._overrides("") == {}


def test_the_command_writes_its_file(here, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "sample", lambda cfg, steps: found(0.5))
    out, variants = tmp_path / "train.json", "train.remat=none; train.remat=full"
    bench_train.main(["bench_train", "--config=quickstart", f"--variants={variants}", f"--out={out}"])
    saved = json.loads(out.read_text())
    assert [row["variant"] for row in saved["rows"]] == ["train.remat=none", "train.remat=full"]
    assert "--variants" in saved["command"] and "out" not in saved["command"]
    assert out.with_suffix(".png").exists()


@pytest.mark.parametrize("documents", [False, True])
def test_a_long_row_forms_no_buffer_of_all_pairs_of_tokens(documents):
    """Memory of a step on one row of 131072 tokens stays far below the 16 GiB that a mask of all pairs would take."""
    T = 131072
    layers = {"model.pattern": "gdn,attn", "model.d_model": 8, "model.mixers.attn": {"heads": 1}}
    layers |= {"model.mixers.gdn": {"heads": 1, "key_dim": 8, "value_dim": 8}, "model.ffn": "none"}
    rows = {"data.seq_len": T, "data.documents": documents, "train.batch_size": 1, "train.remat": "full"}
    cfg = build(RunConfig, load_config("quickstart", **layers, **rows).to_dict())
    step = training.compiled(cfg, jnp.dtype("float32"))
    assert f"{T},{T}" not in step.as_text()
    assert step.memory_analysis().temp_size_in_bytes < T * T / 8
