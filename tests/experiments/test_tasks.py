"""The synthetic problems against slow definitions of their own, and the split without leaks."""

import itertools

import numpy as np
import pytest

from experiments.tasks import groups
from experiments.tasks.induction import induction
from experiments.tasks.problem import Examples, Problem, sample
from experiments.tasks.recall import recall
from experiments.tasks.words import group_word, modular_sum, parity

PROBLEMS = {
    "parity": parity(),
    "mod5": modular_sum(modulus=5),
    "S3": group_word(group="S3"),
    "A5": group_word(group="A5"),
    "A5 generators": group_word(group="A5", letters="generators"),
    "S5": group_word(group="S5"),
    "recall": recall(pairs=3, keys=6, values=5),
    "induction": induction(hops=2, alphabet=3),
}
CONSTANT = Problem(
    "nothing", 1, 1, lambda _, batch, time: Examples(*np.zeros((3, batch, time), np.int32))
)
EVERY = pytest.mark.parametrize("name", PROBLEMS)


def drawn(problem, **changes):
    settings = dict(seed=3, step=5, batch_size=7, length=20) | changes
    return sample(problem, **settings)


def slow_sum(tokens, modulus):
    total, answers = 0, []
    for token in tokens:
        total += int(token)
        answers.append(total - total // modulus * modulus)
    return answers


def slow_word(tokens, group):
    """By matrices: a row vector that is 1 at point i is at point p(i) after permutation p."""
    points = len(group.elements[0])
    product, answers = np.eye(points, dtype=int), []
    for token in tokens:
        matrix = np.zeros((points, points), int)
        for i, image in enumerate(group.elements[token]):
            matrix[i, image] = 1
        product = product @ matrix
        answers.append(group.elements.index(tuple(product.argmax(axis=1).tolist())))
    return answers


def slow_recall(tokens, pairs):
    known, answers = {}, [None] * (2 * pairs)
    for i in range(pairs):
        known[tokens[2 * i]] = tokens[2 * i + 1]
    assert len(known) == pairs, "a key was shown twice"
    return answers + [known[token] for token in tokens[2 * pairs :]]


def slow_induction(tokens, hops):
    """The definition, with 1-based positions and 0 for nowhere."""
    x = [None, *tokens]

    def find(i, hops):
        if hops == 0 or i == 0:
            return i
        here = find(i, hops - 1)
        return max((j for j in range(2, here + 1) if x[j - 1] == x[here]), default=0)

    return [x[j] if (j := find(i, hops)) else None for i in range(1, len(x))]


SLOW = {
    "parity": lambda t: slow_sum(t, 2),
    "mod5": lambda t: slow_sum(t, 5),
    "S3": lambda t: slow_word(t, groups.named("S3")),
    "A5": lambda t: slow_word(t, groups.named("A5")),
    "A5 generators": lambda t: slow_word(t, groups.named("A5")),
    "S5": lambda t: slow_word(t, groups.named("S5")),
    "recall": lambda t: slow_recall(t, 3),
    "induction": lambda t: slow_induction(t, 2),
}


@EVERY
def test_answers_are_those_of_a_slow_definition(name):
    examples = drawn(PROBLEMS[name])
    assert examples.mask.any()
    for tokens, targets, mask in zip(*examples, strict=True):
        expected = SLOW[name](tokens.tolist())
        assert [bool(m) for m in mask] == [answer is not None for answer in expected]
        assert targets[mask].tolist() == [answer for answer in expected if answer is not None]


def test_three_hops_follow_the_same_definition():
    examples = drawn(induction(hops=3, alphabet=2), length=30)
    for tokens, targets, mask in zip(*examples, strict=True):
        expected = slow_induction(tokens.tolist(), 3)
        assert targets[mask].tolist() == [answer for answer in expected if answer is not None]


@EVERY
def test_examples_have_the_types_of_a_batch(name):
    examples = drawn(PROBLEMS[name])
    assert [leaf.shape for leaf in examples] == [(7, 20)] * 3
    assert [leaf.dtype for leaf in examples] == [np.int32, np.int32, np.bool_]
    for leaf in examples[:2]:
        assert leaf.min() >= 0 and leaf.max() < PROBLEMS[name].vocab_size


@EVERY
def test_examples_are_a_function_of_seed_and_step(name):
    first, again = drawn(PROBLEMS[name]), drawn(PROBLEMS[name])
    assert all(map(np.array_equal, first, again))
    for changed in (dict(seed=4), dict(step=6), dict(held_out=True)):
        other = drawn(PROBLEMS[name], **changed)
        assert not np.array_equal(first.tokens, other.tokens)


def test_no_sequence_is_in_both_splits_even_where_every_one_turns_up():
    seen = {True: set(), False: set()}
    for step, held_out in itertools.product(range(40), (True, False)):
        examples = sample(parity(), seed=0, step=step, batch_size=64, length=8, held_out=held_out)
        seen[held_out] |= {tuple(row) for row in examples.tokens.tolist()}
    assert len(seen[True]) + len(seen[False]) == 2**8 and not seen[True] & seen[False]
    assert 15 < len(seen[True]) < 50, "about an eighth of 256"


@pytest.mark.parametrize(("length", "share"), [(32, 0.44), (128, 0.36), (256, 0.35)])
def test_repeating_the_token_is_right_for_two_hops_as_often_as_the_documents_say(length, share):
    examples = drawn(induction(), length=length, batch_size=512)
    asked = np.asarray(examples.mask)
    right = np.asarray(examples.tokens == examples.targets)[asked]
    assert np.mean(right) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("name, order", [("S3", 6), ("S4", 24), ("S5", 120), ("A5", 60)])
def test_group_tables_are_groups_that_do_not_commute(name, order):
    group = groups.named(name)
    table, numbers = group.table, np.arange(order)
    assert len(group.elements) == len(set(group.elements)) == order
    assert table.min() >= 0 and table.max() < order, "closed"
    for a in range(order):  # (a b) c = a (b c) for all b, c
        assert np.array_equal(table[table[a]], table[a][table])
    assert np.array_equal(table[0], numbers) and np.array_equal(table[:, 0], numbers)
    for rows in (table, table.T):  # a row holds every element: each has an inverse
        assert all(np.array_equal(np.sort(row), numbers) for row in rows)
    assert not np.array_equal(table, table.T)


@pytest.mark.parametrize("name", ["S3", "S4", "S5", "A5"])
def test_generators_reach_every_element(name):
    group = groups.named(name)
    reached, edge = {0}, {0}
    while edge:
        edge = {int(group.table[a, g]) for a in edge for g in group.generators} - reached
        reached |= edge
    assert len(reached) == len(group.elements)


def test_commutators_of_a5_are_all_of_it():
    """What makes its word problem as hard as constant memory allows: it is not solvable."""
    group = groups.named("A5")
    inverse = group.table.argmin(axis=1)  # the column in which the identity, 0, stands
    ab = group.table
    commutators = ab[ab[inverse][:, inverse], ab]
    assert set(commutators.ravel().tolist()) == set(range(60))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: modular_sum(modulus=1), "modulus=1 leaves nothing to track"),
        (lambda: group_word(group="S9"), "no group is named 'S9'; the names are S3"),
        (lambda: group_word(group="S3", letters="some"), "letters='some'; give one of all"),
        (lambda: recall(pairs=9, keys=8), "pairs=9 with keys=8: give 1 to 8"),
        (lambda: induction(hops=0), "hops=0, alphabet=8: give at least 1 hop"),
        (lambda: drawn(recall(pairs=8), length=16), "length=16 is too short .* at least 17"),
        (
            lambda: drawn(CONSTANT),
            "length=20: nothing has too few sequences of this length",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_problem_of_ones_own_is_a_function():
    def draw(generator, batch_size, length):
        tokens = generator.integers(4, size=(batch_size, length), dtype=np.int32)
        return Examples(tokens, np.maximum.accumulate(tokens, axis=1), np.ones_like(tokens, bool))

    examples = drawn(Problem("running maximum", 4, 1, draw))
    assert (np.diff(examples.targets, axis=1) >= 0).all() and len(examples.tokens) == 7
