"""Accuracies on the way through the evaluation step."""

import jax
import jax.numpy as jnp
import numpy as np

from hydrax.train.loss import chunked_argmax
from hydrax.train.step import _counts, make_eval_step
from tests.train import tiny


def batch(rows=6, tokens=12, labels=3):
    rng = np.random.default_rng(0)
    asked = np.sort(np.argsort(rng.random((rows, tokens)), axis=1)[:, :labels], axis=1)
    weights = (np.arange(labels) < rng.integers(0, labels, (rows, 1), endpoint=True)).astype(np.float32)
    weights[0] = 1
    return {
        "tokens": rng.integers(tiny.VOCABULARY, size=(rows, tokens)).astype(np.int32),
        "asked": asked.astype(np.int32),
        "targets": rng.integers(tiny.VOCABULARY, size=(rows, labels)).astype(np.int32),
        "weights": weights,
        "slices": np.eye(2, dtype=np.float32)[rng.integers(2, size=rows)],
    }


def test_answers_alone_give_the_loss_and_the_counts_of_all_tokens():
    plan, few = tiny.plan(), batch()
    params = plan.init(jax.random.key(0))
    evaluate = jax.jit(make_eval_step(plan))
    said = np.argmax(plan.merge(params)(few["tokens"]), axis=-1)
    few["targets"][:4] = np.take_along_axis(said, few["asked"], 1)[:4]  # right by construction
    full = {k: np.zeros(few["tokens"].shape, few[k].dtype) for k in ("targets", "weights")}
    for name, x in full.items():
        np.put_along_axis(x, few["asked"], few[name], 1)
    whole = {k: x for k, x in few.items() if k != "asked"} | full
    some, everything = (jax.device_get(evaluate(params, b)) for b in (few, whole))
    for name in some:
        np.testing.assert_allclose(some[name], everything[name], rtol=1e-5)
    real = few["weights"].sum(1) > 0
    assert some["rows"] == real.sum() and some["right"] >= real[:4].sum()


def test_counts_equal_a_naive_loop():
    data = batch()
    said = np.where(np.random.default_rng(1).random((6, 3)) < 0.6, data["targets"], 0)
    found = jax.device_get(_counts(jnp.asarray(said), data, tiny.plan()))
    slices, expected = np.zeros(2), {"rows": 0, "right": 0.0, "sequences": 0}
    for row in range(6):
        hits = [said[row, q] == data["targets"][row, q] for q in range(3) if data["weights"][row, q]]
        if hits:
            expected["rows"] += 1
            expected["right"] += np.mean(hits)
            expected["sequences"] += all(hits)
            slices[data["slices"][row].argmax()] += np.mean(hits)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)
    np.testing.assert_allclose(found["slice_right"], slices, rtol=1e-6)
    assert found["slice_rows"].sum() == expected["rows"]
    assert found["class_tokens"].sum() == data["weights"].sum()
    counted = data["weights"] * (said == data["targets"])
    np.testing.assert_array_equal(found["class_right"], np.bincount(data["targets"].ravel(), counted.ravel(), 50))


def test_chunks_do_not_change_what_is_likeliest():
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 11, 4), (4, 9)))
    expected = jnp.argmax(hidden @ head, -1)
    for chunk in (3, 4, 11, None):
        np.testing.assert_array_equal(chunked_argmax(hidden, lambda x: x @ head, chunk=chunk), expected)
