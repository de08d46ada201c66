import numpy as np
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.tasks.state_recall import ADDRESS, BIT, INIT, OPS, PAD, QUERY, VAR, StateRecall
from tests.tasks.reading import draw, labels, right


def read(row, bits):
    """Position and token of the answer, the queried pointer's first address and its last."""
    tokens = row.tolist()
    init, ops, query = tokens.index(INIT), tokens.index(OPS), tokens.index(QUERY)
    memory = [token - BIT for token in tokens[:init]]
    assert init == bits and set(memory) <= {0, 1} and ops == init + 11
    told = tokens[init + 1 : ops]
    pointers = {var: address - ADDRESS for var, address in zip(told[::2], told[1::2], strict=True)}
    assert sorted(pointers) == list(range(VAR, VAR + 5)) and len(set(pointers.values())) == 5
    first = pointers[tokens[query + 1]]
    swaps = tokens[ops + 1 : query]
    for a, b in zip(swaps[::2], swaps[1::2], strict=True):
        assert a != b
        pointers[a], pointers[b] = pointers[b], pointers[a]
    assert set(tokens[query + 2 :]) <= {PAD}
    last = pointers[tokens[query + 1]]
    return {query + 1: BIT + memory[last]}, first, last, memory


@pytest.mark.parametrize(("bits", "swaps", "length"), [(8, 8, 40), (32, 32, 112), (5, 0, 20)])
def test_answers_follow_from_the_inputs(bits, swaps, length):
    task = StateRecall(bits=bits, swaps=swaps, length=length)
    sample = draw(task, 200)
    rows = zip(sample["inputs"], sample["targets"], sample["meta"]["address"], sample["meta"]["slice"], strict=True)
    for row, targets, address, part in rows:
        answer, first, last, _ = read(row, bits)
        assert answer == labels(targets) and [first, last] == address.tolist()
        assert task.slices[part] == ("stayed" if first == last else "moved")


def test_the_first_address_is_worth_chance_where_pointers_moved_and_more_elsewhere():
    sample = draw(StateRecall(bits=16, swaps=16, length=62), 4000)
    guess = sample["targets"].copy()
    for i, row in enumerate(sample["inputs"]):
        answer, first, _, memory = read(row, 16)
        guess[i, next(iter(answer))] = BIT + memory[first]
    moved = sample["meta"]["slice"] == 0
    hit = ((guess == sample["targets"]) | (sample["targets"] < 0)).all(1)
    assert 0.75 < moved.mean() < 0.85  # well mixed pointers: 4 of 5
    assert abs(hit[moved].mean() - 0.5) < 0.05 and hit[~moved].all() and hit.mean() > 0.57


def test_chance_is_one_half():
    sample = draw(StateRecall(), 4000)
    guess = np.random.default_rng(1).integers(BIT, BIT + 2, sample["targets"].shape)
    assert abs(right(sample, guess) - 0.5) < 0.03


def test_pointers_and_swaps_are_uniform():
    inputs = draw(StateRecall(bits=10, swaps=10, length=44), 3000)["inputs"]
    queried = np.bincount(inputs[:, 43] - VAR)
    pairs = np.zeros((5, 5), int)
    np.add.at(pairs, (inputs[:, 22:42:2] - VAR, inputs[:, 23:42:2] - VAR), 1)
    assert abs(queried - 600).max() < 5 * 600**0.5
    assert (np.diag(pairs) == 0).all() and abs(pairs[~np.eye(5, dtype=bool)] - 1500).max() < 5 * 1500**0.5


@pytest.mark.parametrize(
    ("options", "key"), [({"bits": 4}, "bits"), ({"length": 109}, "length"), ({"swaps": -1}, "swaps")]
)
def test_bad_options_are_one_line(options, key):
    with pytest.raises(ConfigError, match=f"^{key} = .*expected.*$") as error:
        build(StateRecall, options)
    assert "\n" not in str(error.value)
