"""Structures in use: any carry, any tracing context, overrides, checks, other people's cells."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core

import jaxpara as jp
from jaxpara.recurrence.solve import jacobian_products
from jaxpara.recurrence.solve.claimed_structure import check_structure, require
from jaxpara.recurrence.structure.jacobian_blocks import Group
from jaxpara.recurrence.structure.proof import (
    Block,
    Dense,
    Diagonal,
    jacobian_structure,
    structure_of,
)


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def gru(h, x):
    z = jax.nn.sigmoid(h * 0.7 + x)
    return z * h + (1 - z) * jnp.tanh(x + h), h


def test_a_carry_of_64_by_2048_is_analysed_fast():
    start = time.perf_counter()
    found = jacobian_structure(gru, spec(64, 2048), spec(64, 2048))
    took = time.perf_counter() - start
    print(f"64 x 2048: {took:.3f} s")
    assert found == Diagonal()
    assert took < 2


def test_a_wide_dense_carry_is_analysed_fast():
    start = time.perf_counter()
    found = jacobian_structure(
        lambda h, x: (jnp.tanh(h @ jnp.zeros((2048, 2048)) + x), h), spec(64, 2048), spec(64, 2048)
    )
    took = time.perf_counter() - start
    print(f"64 x 2048 dense: {took:.3f} s")
    assert found.resolve([(64, 2048)]) == (Group((0,), ((0,),)),)
    assert took < 2


def test_a_step_that_closes_over_tracers_is_analysed_under_jit_grad_and_vmap():
    seen = []

    def loss(w, h):
        seen.append(jacobian_structure(lambda h, x: (jnp.tanh(h @ w + x), None), h, h))
        seen.append(jacobian_structure(lambda h, x: (jnp.tanh(h * w[0] + x), None), h, h))
        return (h @ w).sum()

    w, h = jnp.ones((3, 3)), jnp.ones((2, 3))
    jax.jit(jax.grad(loss))(w, h)
    jax.vmap(jax.grad(loss), (0, None))(w[None], h)
    dense = (Group((0,), ((0,),)),)
    assert [s.resolve([(2, 3)]) for s in seen[::2]] == [dense, dense]
    assert seen[1::2] == [Diagonal(), Diagonal()]


def test_only_the_floating_leaves_of_a_carry_count():
    def step(carry, x):
        count, key, h, low = carry
        key, sub = jax.random.split(key)
        h = jnp.tanh(h * x + count) + jax.random.normal(sub, h.shape)
        return (count + (h.sum() > 0), key, h, low + h.astype(low.dtype)), h

    carry = (jnp.int32(0), jax.random.key(0), jnp.ones(3), jnp.ones(3, jnp.bfloat16))
    found = jacobian_structure(step, carry, jnp.ones(3))
    assert isinstance(found, Block)
    assert found.resolve([(3,), (3,)]) == (Group((0, 1), ((0,), (0,))),)


def test_a_carry_without_floating_leaves_is_diagonal():
    found = jacobian_structure(lambda n, x: (n + 1, None), jnp.int32(0), jnp.ones(2))
    assert found == Diagonal() and found.resolve([]) == () and found.size([]) == 0


def test_a_carry_of_another_shape_is_refused():
    with pytest.raises(TypeError, match=r"goes in with shapes \[\(3,\)\] and comes out with \[\(2"):
        jacobian_structure(lambda h, x: (h * x, None), jnp.ones(3), jnp.ones((2, 3)))


def test_a_primitive_without_a_derivative_means_dense():
    opaque = core.Primitive("opaque")
    opaque.def_abstract_eval(lambda a: a)
    found = jacobian_structure(lambda h, x: (opaque.bind(h), None), spec(2, 3), spec(2, 3))
    assert found == Dense() and found.size([(2, 3)]) == 6


def test_a_carry_written_to_a_reference_means_dense():
    def step(h, x):
        ref = jax.new_ref(jnp.zeros(2))
        ref[0] = h[0]
        return jnp.stack([h[0], ref[...][0]]), None

    assert isinstance(jacobian_structure(step, spec(2), spec(2)), Dense)


def test_a_scan_inside_the_step_is_followed():
    def step(h, x):
        inner = lax.scan(lambda c, v: (jnp.tanh(c * v), c), h, jnp.stack([x, x]))
        return inner[0] + inner[1].sum(0), None

    assert jacobian_structure(step, spec(2, 3), spec(2, 3)) == Diagonal()


def test_a_known_rule_overrides_what_is_inside():
    @jax.custom_vjp
    def kernel(h):
        return jnp.tanh(h)

    # A backward rule that cannot be entered: it calls the host.
    def pulled(h, g):
        return (jax.pure_callback(lambda h, g: g, g, h, g),)

    kernel.defvjp(lambda h: (jnp.tanh(h), h), pulled)
    closed = jax.make_jaxpr(kernel)(jnp.ones((2, 3)))
    assert isinstance(structure_of(closed, [0], [0]), Dense)

    def rule(eqn, operands, domain):
        (tangent,) = [value for value in operands if value is not None]
        return [tangent]

    assert structure_of(closed, [0], [0], known={"custom_lin": rule}) == Diagonal()


def test_structure_of_reads_the_leaves_in_the_order_given():
    closed = jax.make_jaxpr(lambda a, w, b: (w @ b, a * 2))(
        jnp.ones(3), jnp.ones((2, 2)), jnp.ones(2)
    )
    found = structure_of(closed, [2, 0], [0, 1])
    assert found.resolve([(2,), (3,)]) == (Group((0,), ((),)), Group((1,), ((0,),)))


# Overrides ---------------------------------------------------------------------------------------


def test_overrides_resolve_as_documented():
    shapes = [(2, 4, 3), (2, 4, 5)]
    assert Diagonal().resolve(shapes) == (Group((0,), ((0, 1, 2),)), Group((1,), ((0, 1, 2),)))
    assert Block(coupled=1).resolve(shapes) == (Group((0, 1), ((0, 1), (0, 1))),)
    assert Block(coupled=1).size(shapes) == 8
    assert Dense(batch=1).resolve(shapes) == (Group((0, 1), ((0,), (0,))),)
    assert Dense().size(shapes) == 2 * 4 * 3 + 2 * 4 * 5
    assert Block(coupled=0).size([(3,), (3,)]) == 2


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Block(coupled=3), r"Block\(coupled=3\) needs 3 axes to couple, but leaf 0 has shape"),
        (Block(), r"sizes \(2, 5\) in leaf 1 .* but of sizes \(2, 3\) in leaf 0"),
        (Dense(batch=3), r"Dense\(batch=3\) needs 3 leading batch axes, but leaf 0"),
        (Dense(batch=2), r"sizes \(2, 5\) in leaf 1"),
        (Block(groups=(Group((0,), ((0,),)),)), r"name each of 0\.\.1 exactly once"),
        (Block(groups=(Group((0, 1), ((0,),)),)), r"one tuple of shared axes for each leaf"),
        (Dense(groups=(Group((0, 1), ((2,), (0,))),)), r"axes \(2,\) of leaf 0, which has shape"),
        (Diagonal(groups=(Group((0, 1), ((0,), (0,))),)), r"use Block\(groups=\.\.\.\)"),
    ],
)
def test_an_override_that_cannot_be_says_why(structure, message):
    with pytest.raises(ValueError, match=message):
        structure.resolve([(2, 3), (2, 5)])


def mixed(h, x):
    return jnp.tanh(h @ jnp.ones((3, 3)) * 0.2 + x), None


@pytest.mark.parametrize("structure", [Diagonal(), Block(coupled=0), Dense(batch=2)])
def test_a_sparser_structure_than_the_proved_one_is_refused_in_every_context(structure):
    solver = jp.shooting(structure=structure)
    run = lambda h, x: jp.newton_scan(mixed, h, x, solver=solver)[0].sum()  # noqa: E731
    message = r"structure=\w+\(.*is sparser than Dense.*leaf 0[^\n]*\n.*jp\.unchecked"
    h, xs = jnp.ones((2, 3)), jnp.ones((4, 2, 3))
    for f in (run, jax.jit(run), jax.grad(run), lambda h, x: jax.vmap(run)(h[None], x[None])):
        with pytest.raises(ValueError, match=message):
            f(h, xs)


def test_a_denser_structure_is_taken_and_an_unchecked_one_trusted():
    h, xs = jnp.ones((2, 3)), jnp.linspace(-1, 1, 24).reshape(4, 2, 3)

    def gradient(structure):
        solver = jp.sequential(structure=structure)
        return jax.grad(lambda h: jp.newton_scan(mixed, h, xs, solver=solver)[0].sum())(h)

    proved = gradient(None)
    np.testing.assert_allclose(gradient(Dense()), proved, rtol=1e-5)
    # It is the user's word that counts: a wrong one shows in the gradient.
    assert np.abs(gradient(jp.unchecked(Diagonal())) - proved).max() > 0.05 * proved.max()


def test_what_is_required_of_a_structure_is_what_the_jacobian_has():
    def step(s, x):
        return [jnp.tanh(s[0] + s[1].T), s[1] * x, s[2] + s[2].sum()], None

    shapes = [spec(2, 3), spec(3, 2), spec(1, 4)]
    closed = jax.make_jaxpr(lambda a, b, c, x: step([a, b, c], x)[0])(*shapes, spec(3, 2))
    together = Group((0, 1), ((0, 1), (1, 0)))
    check = functools.partial(require, closed=closed, carry_in=[0, 1, 2], carry_out=[0, 1, 2])
    check(Block(groups=(together, Group((2,), ((),)))))
    check(Block(groups=(together, Group((2,), ((0,),)))))  # an axis of size one is shared by all
    check(Block(groups=(Group((0, 1), ((0,), (1,))), Group((2,), ((),)))))
    for wrong in (
        Block(groups=(Group((0, 1), ((0,), (0,))), Group((2,), ((),)))).groups,
        (Group((0,), ((0, 1),)), Group((1,), ((0, 1),)), Group((2,), ((),))),
        (together, Group((2,), ((1,),))),
    ):
        with pytest.raises(ValueError, match=r"is sparser than|shared axes must agree"):
            check(Block(groups=wrong))


def test_requirements_on_cut_axes_are_those_of_the_proof():
    def step(h, x):  # two heads of three, packed; units of a head see one another
        heads = h.reshape(2, 3)
        return (heads * 0.3 + jnp.roll(heads, 1, axis=1)).reshape(6, 1) + x, None

    closed = jax.make_jaxpr(lambda h, x: step(h, x)[0])(spec(6, 1), spec(6, 1))
    check = functools.partial(require, closed=closed, carry_in=[0], carry_out=[0])

    def cut(*shared, view=(2, 3, 1)):
        return Block(groups=(Group((0,), (shared,), (view,)),))

    assert jacobian_structure(step, spec(6, 1), spec(6, 1)).groups == cut(0, 2).groups
    for implied in (cut(0, 2), cut(0), cut(2), cut()):
        check(implied)
    # The view's axis 1 is no axis of size one, although the leaf's is.
    for wrong in (cut(1), cut(0, 1), cut(1, 2), cut(0, view=(3, 2, 1))):
        with pytest.raises(ValueError, match="is sparser than"):
            check(wrong)


@pytest.mark.untyped
def test_a_structure_that_is_none_says_what_to_type():
    with pytest.raises(TypeError, match="structure is 'diagonal'; expected jp.structure.Diag"):
        jp.newton(structure="diagonal")


# Layout ------------------------------------------------------------------------------------------


def test_from_lanes_undoes_to_lanes_and_keeps_dtypes():
    groups = (Group((0, 2), ((1,), (0,))), Group((1,), ((0, 1),)))
    leaves = [
        jnp.arange(24.0).reshape(2, 3, 4),
        jnp.arange(4.0).reshape(2, 2),
        jnp.arange(3.0).astype(jnp.bfloat16),
    ]
    held = jacobian_products.to_lanes(groups, leaves)
    assert [lanes.shape for lanes in held] == [(9, 3), (1, 4)]
    np.testing.assert_array_equal(held[0][:, 1], [4, 5, 6, 7, 16, 17, 18, 19, 1])
    back = jacobian_products.from_lanes(groups, held, leaves)
    for a, b in zip(leaves, back, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_spread_columns_undoes_gather_columns_up_to_columns_that_a_group_lacks():
    groups = (Group((0,), ((0,),)), Group((1,), ((0,),)))
    like = [jnp.zeros((2, 3)), jnp.zeros(4)]
    columns = [jnp.arange(18.0).reshape(3, 2, 3), jnp.arange(12.0).reshape(3, 4)]
    matrices = jacobian_products.gather_columns(groups, columns)
    assert [m.shape for m in matrices] == [(3, 3, 2), (1, 1, 4)]
    # Entry [i, j, n] is element i of block n in column j.
    np.testing.assert_array_equal(matrices[0][2, 1], columns[0][1, :, 2])
    back = jacobian_products.spread_columns(groups, matrices, like)
    np.testing.assert_array_equal(back[0], columns[0])
    np.testing.assert_array_equal(back[1], columns[1] * np.array([[1], [0], [0]]))


@pytest.mark.parametrize("size", [1, 3, 9])  # elementwise, unrolled, and by matrix products
def test_products_of_blocks_are_those_of_their_matrices(size):
    k_a, k_b, k_v = jax.random.split(jax.random.key(0), 3)
    a, b = (jax.random.normal(k, (size, size, 5)) for k in (k_a, k_b))
    v = jax.random.normal(k_v, (size, 5))
    for got, subscripts, operands in (
        (jacobian_products.multiply([a], [b]), "ikn,kjn->ijn", (a, b)),
        (jacobian_products.apply([a], [v]), "ijn,jn->in", (a, v)),
        (jacobian_products.apply([a], [v], transpose=True), "ijn,in->jn", (a, v)),
    ):
        exact = np.einsum(subscripts, *(np.asarray(x, np.float64) for x in operands))
        np.testing.assert_allclose(got[0], exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse_mode", [False, True])
def test_blocks_of_are_the_jacobians_of_the_blocks(reverse_mode):
    w = jax.random.normal(jax.random.key(0), (4, 3, 3))

    def step(leaves):
        return [jnp.tanh(jnp.einsum("bhd,hde->bhe", leaves[0], w))]

    h = jax.random.normal(jax.random.key(1), (2, 4, 3))
    groups = Block(coupled=1).resolve([h.shape])
    (got,) = jacobian_products.blocks_of(step, [h], groups, reverse_mode)
    full = jax.jacrev(lambda h: step([h])[0])(h)
    expected = [full[b, k, :, b, k, :] for b in range(2) for k in range(4)]
    np.testing.assert_allclose(jnp.moveaxis(got, -1, 0), expected, rtol=1e-5, atol=1e-6)


# The check ---------------------------------------------------------------------------------------


def mixing(leaves):
    return [jnp.tanh(leaves[0]) + 0.1 * jnp.roll(leaves[1], 1), leaves[1] * 0.5]


@pytest.mark.slow
def test_check_structure_accepts_what_is_true_and_names_the_leaf_that_is_not():
    leaves, key = [jnp.ones(4), jnp.ones(4)], jax.random.key(0)
    check_structure(Dense(), mixing, leaves, key)
    for wrong in (Diagonal(), Block()):
        with pytest.raises(ValueError, match=r"too sparse.*leaf 1 \(shape \(4,\)\) deviates by"):
            check_structure(wrong, mixing, leaves, key)


def test_check_structure_takes_a_step_with_a_custom_vjp():
    @jax.custom_vjp
    def double(h):
        return 2 * h

    double.defvjp(lambda h: (2 * h, None), lambda _, g: (2 * g,))
    leaves, key = [jnp.ones(4)], jax.random.key(0)
    check_structure(Diagonal(), lambda s: [double(s[0])], leaves, key)
    with pytest.raises(ValueError, match="leaf 0"):
        check_structure(Diagonal(), lambda s: [double(jnp.roll(s[0], 1))], leaves, key)


def test_check_structure_works_under_jit():
    @jax.jit(static_argnums=0)
    def run(structure, leaves):
        check_structure(structure, mixing, leaves, jax.random.key(0))
        return mixing(leaves)

    leaves = [jnp.ones(4), jnp.ones(4)]
    jax.block_until_ready(run(Dense(), leaves))
    jax.effects_barrier()
    with pytest.raises(Exception, match=r"too sparse.*leaf 1 "):
        jax.block_until_ready(run(Diagonal(), leaves))
        jax.effects_barrier()


def test_check_structure_is_not_fooled_by_values_that_are_not_finite():
    check_structure(Diagonal(), lambda s: [s[0] * jnp.inf], [jnp.ones(2)], jax.random.key(0))


# Cells of other libraries ------------------------------------------------------------------------


def test_flax_cells_are_dense_with_a_batch_axis():
    nn = pytest.importorskip("flax.linen")
    x = jnp.ones((2, 3))
    for cell, leaves in ((nn.GRUCell(features=4), 1), (nn.OptimizedLSTMCell(features=4), 2)):
        carry = cell.initialize_carry(jax.random.key(0), x.shape)
        params = cell.init(jax.random.key(1), carry, x)
        found = jacobian_structure(lambda c, x, p=params, m=cell: m.apply(p, c, x), carry, x)
        assert isinstance(found, Dense)
        shared = ((0,),) * leaves
        assert found.resolve([(2, 4)] * leaves) == (Group(tuple(range(leaves)), shared),)


def test_equinox_cells_are_dense():
    eqx = pytest.importorskip("equinox")
    gru = eqx.nn.GRUCell(3, 4, key=jax.random.key(0))
    lstm = eqx.nn.LSTMCell(3, 4, key=jax.random.key(0))
    found = jacobian_structure(lambda h, x: (gru(x, h), None), jnp.ones(4), jnp.ones(3))
    assert isinstance(found, Dense) and found.size([(4,)]) == 4
    carry = (jnp.ones(4), jnp.ones(4))
    found = jacobian_structure(lambda c, x: (lstm(x, c), None), carry, jnp.ones(3))
    assert isinstance(found, Dense) and found.size([(4,), (4,)]) == 8
    batched = jacobian_structure(
        lambda h, x: (jax.vmap(gru)(x, h), None), jnp.ones((2, 4)), jnp.ones((2, 3))
    )
    assert batched.resolve([(2, 4)]) == (Group((0,), ((0,),)),)
