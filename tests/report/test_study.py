"""Arms, the best rate of each, and their names, from runs whose figures are known."""

import itertools
import statistics

import pytest

from hydrax.models.spec import model_config, resolve
from hydrax.report import labels
from hydrax.report.read import read
from hydrax.report.study import MEASURES, comparable, study
from tests.report.conftest import config, write_run


def layers(pattern, **model):
    return resolve(model_config({"d_model": 16, "vocab_size": 64, "pattern": pattern, **model}))


def test_runs_that_differ_in_rate_and_seeds_are_one_arm(tmp_path):
    losses = {(0.01, 0): 2.0, (0.01, 1): 2.4, (0.1, 0): 1.0, (0.1, 1): 3.5}
    for (lr, seed), loss in losses.items():
        write_run(
            tmp_path / f"{lr}-{seed}", config(optim__lr=lr, train__seed=seed, data__seed=seed), {"val_loss": loss}
        )
    (arm,) = study(read([tmp_path])[0]).arms
    assert arm.rate == 0.01  # 2.2 is better than 2.25, though the best run has another rate
    found = arm.band(MEASURES[-1].of)
    assert (found.mean, found.low, found.high, found.seeds) == (pytest.approx(2.2), 2.0, 2.4, 2)
    assert arm.by_rate.keys() == {0.01, 0.1}


def test_a_rate_at_which_a_seed_diverged_is_not_the_best(tmp_path):
    losses = {(0.01, 0): 2.0, (0.01, 1): 2.4, (0.1, 0): 1.0, (0.1, 1): None}
    for (lr, seed), loss in losses.items():
        write_run(tmp_path / f"{lr}-{seed}", config(optim__lr=lr, train__seed=seed), {"val_loss": loss})
    runs = comparable(read([tmp_path])[0])
    assert len(runs) == 3
    assert study(runs).arms[0].rate == 0.01


def test_what_has_no_influence_makes_no_arm(tmp_path):
    same = [{}, {"train__tensorboard": True}, {"train__log_every": 3}, {"mesh__fsdp": 1}, {"sample__tokens": 0}]
    # an option of a mixer that is not in the model
    same.append({"model__mixers": {"gla": {"heads": 2}}})
    for i, keys in enumerate(same):
        write_run(tmp_path / str(i), config(model__pattern="gdn", **keys), {"val_loss": 1.0})
    found = study(read([tmp_path])[0])
    assert len(found.arms) == 1 and found.varied == []


def test_arms_are_named_by_few_keys(tmp_path):
    # the width follows from the pattern: it need not be said
    sizes = itertools.product([("gla", 32), ("3*gla,attn", 48)], [16, 32])
    for i, ((pattern, ffn_dim), length) in enumerate(sizes):
        keys = {"model__pattern": pattern, "model__ffn_dim": ffn_dim, "data__seq_len": length}
        write_run(tmp_path / str(i), config(**keys), {"val_loss": 1.0})
    found = study(read([tmp_path])[0])
    assert [arm.label for arm in found.arms] == ["gla, T 16", "gla, T 32", "gla 3:1, T 16", "gla 3:1, T 32"]
    assert [arm.family for arm in found.arms] == ["gla", "gla", "gla 3:1", "gla 3:1"]
    assert found.told == ["model.pattern", "data.seq_len"]
    assert set(found.varied) == {"model.pattern", "model.ffn_dim", "data.seq_len"}


def test_accuracy_comes_before_loss(tmp_path):
    accuracies = {0.01: 0.4, 0.1: 0.6}
    for lr, accuracy in accuracies.items():
        write_run(tmp_path / str(lr), config(optim__lr=lr), {"val_loss": accuracy, "val_accuracy": accuracy})
    found = study(read([tmp_path])[0])
    assert (found.quality.key, found.arms[0].rate) == ("val_accuracy", 0.1)


@pytest.mark.parametrize(
    ("pattern", "share"),
    [
        ("gdn", 0),
        ("attn", 1),
        ("3*gdn,attn", 1 / 4),
        ("2*(gla,attn)", 1 / 2),
        ("gated_conv,gdn,gated_conv,attn", 1 / 2),  # a short convolution remembers nothing
        ("3*swa,attn", 1 / 4),  # nor is a window full attention
        ("2*heads(1*attn,3*gdn)", 1 / 4),
        ("heads(1*attn,3*gdn),attn", 5 / 8),
    ],
)
def test_share_of_full_attention(pattern, share):
    assert float(labels.full_share(layers(pattern, mixers={"attn": {"heads": 4}, "gdn": {"heads": 4}}))) == share


def test_models_without_memory_have_no_share():
    assert labels.full_share(layers("gated_conv")) is None


def test_names_of_models():
    patterns = ["gdn", "attn", "6*gdn,2*attn", "every(11,gla,attn)", "2*mamba2,gdn,attn", "gated_conv,kda"]
    named = labels.of_models({p: layers(p, **({"num_layers": 12} if "every" in p else {})) for p in patterns})
    assert list(named.values()) == ["gdn", "attn", "gdn 3:1", "gla 11:1", "mamba2+gdn+attn 2:1:1", "kda"]


def test_models_of_one_ratio_are_told_apart_by_their_patterns():
    patterns = ["gdn,attn", "attn,gdn", "gla"]
    assert labels.of_models({p: layers(p) for p in patterns}) == {p: p for p in patterns}
    long = [f"{','.join(['gdn'] * 20)},{last}" for last in ("attn,gdn", "gdn,attn")]
    assert list(labels.of_models({p: layers(p) for p in long}).values()) == long  # cut, they would be equal


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("data.seq_len", 512, "T 512"),
        ("model.mixers.gdn.allow_neg_eigval", True, "allow_neg_eigval"),
        ("model.mixers.gdn.allow_neg_eigval", False, "no allow_neg_eigval"),
        ("optim.weight_decay", 0.1, "weight_decay 0.1"),
        ("data.task", "mqar", "mqar"),
        ("model.ffn_dim", None, ""),
    ],
)
def test_names_of_settings(key, value, text):
    assert labels.of_setting(key, value) == text


def test_colours_go_to_mixers_where_arms_are_many(tmp_path):
    patterns = [f"{n}*{mixer},attn" for mixer in ("gla", "gdn") for n in range(1, 6)]
    for i, pattern in enumerate(patterns):
        write_run(tmp_path / str(i), config(model__pattern=pattern), {"val_loss": float(i)})
    found = study(read([tmp_path])[0])
    assert [arm.recurrent for arm in found.arms] == ["gdn"] * 5 + ["gla"] * 5
    assert [found.style(arm) for arm in found.arms] == [(0, i) for i in range(5)] + [(1, i) for i in range(5, 10)]
    assert statistics.fmean(float(arm.share) for arm in found.arms) == pytest.approx(
        statistics.fmean(1 / (n + 1) for n in range(1, 6))
    )
