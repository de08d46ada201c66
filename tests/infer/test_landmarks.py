"""Text of models with landmarks: generation and scores are those of full passes over rows as training lays them."""

import jax
import numpy as np
import pytest
from flax import nnx

import hydrax
from hydrax.core.build import ConfigError
from hydrax.data.landmarks import Landmarks
from hydrax.eval.scoring import Scorer
from hydrax.infer.sample import known_landmarks
from hydrax.models.lm import LM
from hydrax.models.spec import model_config
from tests.tolerances import TOLERANCE, assert_close

EVERY, LANDMARK, N = 3, 40, 8
OPTIONS = {
    "d_model": 32,
    "vocab_size": LANDMARK + 1,
    "pattern": "gla,landmark",
    "mixers": {"gla": {"heads": 2}, "landmark": {"heads": 2, "section": EVERY}},
}
PROMPTS = np.random.default_rng(0).integers(0, LANDMARK, (4, 7))


@pytest.fixture(scope="module")
def model():
    lm = hydrax.build(OPTIONS, seed=1)
    lm.embed.weight[...] *= 10  # so that a token follows from the others and not from itself
    return lm


@pytest.fixture(scope="module")
def predicted(model):
    """Logits after each token of a document, by one pass over it with its landmarks."""
    forward = jax.jit(lambda row: model(row[None])[0])

    def logits(tokens):
        row, at = [], []
        for i, token in enumerate(tokens):
            if i and i % EVERY == 0:
                row.append(LANDMARK)
            at.append(len(row))
            row.append(token)
        return forward(np.array(row + [0] * (24 - len(row)), np.int32))[np.array(at)]

    return logits


def continued(prompt, predicted):
    """The definition: the most likely token of the full pass, but never a landmark, appended."""
    tokens = list(prompt)
    for _ in range(N):
        tokens.append(int(predicted(tokens)[-1][:LANDMARK].argmax()))
    return tokens[len(prompt) :]


def test_steps_are_the_full_pass_in_every_phase_of_a_section(model, predicted):
    lengths = [7, 1, 3, 5]
    made = hydrax.generate(model, PROMPTS, max_new_tokens=N, temperature=0, lengths=lengths)
    wanted = [continued(prompt[:n], predicted) for prompt, n in zip(PROMPTS, lengths, strict=True)]
    np.testing.assert_array_equal(made, wanted)
    assert len(np.unique(made)) > 3, "a degenerate model would pass anything"


def test_scores_are_the_full_pass(model, predicted):
    sequences = [PROMPTS[0], PROMPTS[1, :4]]
    for score, tokens in zip(Scorer(model).texts(sequences), sequences, strict=True):
        log_p = jax.nn.log_softmax(predicted(tokens[:-1]))
        assert_close("nll", score.nll, -log_p[np.arange(len(tokens) - 1), tokens[1:]], TOLERANCE["fp32_op"])


def shape_of(options):
    """A model without its arrays."""
    return nnx.eval_shape(lambda: LM(model_config(OPTIONS | options), key=jax.random.key(0)))


def test_models_without_landmark_layers_have_those_of_their_data():
    plain = shape_of({"pattern": "gla"})
    assert known_landmarks(plain) is None and known_landmarks(plain, Landmarks(5, 7)) == Landmarks(5, 7)


@pytest.mark.parametrize(
    ("options", "landmarks", "message"),
    [
        ({}, Landmarks(4, 9), "landmarks = 4: expected 3, the section of landmark layers"),
        ({}, Landmarks(3, 41), "landmarks = 41: expected an id below 41"),
        ({"prefix": {"meta_tokens": 2}}, None, "model.prefix.meta_tokens = 2: expected 0 with landmarks"),
    ],
)
def test_what_does_not_fit_is_refused(options, landmarks, message):
    with pytest.raises(ConfigError, match=message):
        hydrax.generate(shape_of(options), PROMPTS, max_new_tokens=1, landmarks=landmarks)
