"""`jp.auto`: the measured map is looked up, obeyed and explained."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxpara as jp
from experiments.fit_choice import fit
from jaxpara import compat
from jaxpara.recurrence import choice, rule
from jaxpara.recurrence.solve import linear_kernel

ROOT = pathlib.Path(__file__).resolve().parents[2]


def gru_step(h, gates):
    z = jax.nn.sigmoid(gates[0] + 0.3 * h)
    h = z * h + (1 - z) * jnp.tanh(gates[1] - 0.2 * h)
    return h, h


def gates(time, batch, state):
    return tuple(jax.random.normal(jax.random.key(i), (time, batch, state)) for i in range(2))


@pytest.fixture(params=["0.10", "0.11", "0.12"])
def with_jax(request, monkeypatch):
    """The rule as it is under a version of JAX, each of which has a map."""
    release = tuple(map(int, request.param.split(".")))
    monkeypatch.setattr(compat, "RELEASE", release)
    monkeypatch.setattr(rule, "_map", rule._map.__wrapped__)
    return release


def test_every_measured_point_with_a_gain_of_1_2_is_chosen_and_every_loss_is_not(with_jax):
    measured = rule._map("cpu")
    assert measured is not None and len(measured["points"]) > 20
    assert tuple(map(int, measured["jax"].split(".")[:2])) == with_jax
    sizes = ("steps", "elements", "block", "inputs")
    for point in measured["points"]:
        solver, reason = rule.pick("cpu", **{size: point[size] for size in sizes})
        same = [p for p in measured["points"] if [p[s] for s in sizes] == [point[s] for s in sizes]]
        # One batch of 8 x 32 and one of 1 x 256: the rule sees no difference, and is careful.
        best = min(max(p["speedup"].values()) for p in same)
        if best >= 1.2:
            assert solver is not None, point
        if best < 1.0:
            assert solver is None, point
        assert measured["device"] in reason


def test_the_page_has_the_ranges_of_the_maps(monkeypatch):
    page = (ROOT / "docs/measured/recurrence.md").read_text()
    head = "| cell | points | JAX 0.10 | JAX 0.11 | JAX 0.12 |"
    rows = page[page.index(head) :].split("\n\n")[0].splitlines()[2:]
    cells = ("para_gru", "stacked_para_gru", "para_lstm", "slstm", "dense")
    assert len(rows) == len(cells)
    for row, cell in zip(rows, cells, strict=True):
        shown = [column.strip() for column in row.strip("|").split("|")][1:]
        for minor, said in zip((10, 11, 12), shown[1:], strict=True):
            monkeypatch.setattr(compat, "RELEASE", (0, minor))
            points = rule._map.__wrapped__("cpu")["points"]
            gains = [max(p["speedup"].values()) for p in points if p["cell"] == cell]
            assert shown[0] == str(len(gains))
            low, high, below = re.fullmatch(r"(\S+) to (\S+), (\d+) below 1", said).groups()
            # Two decimals, one from 10 on.
            assert float(low) == pytest.approx(min(gains), abs=0.005)
            assert float(high) == pytest.approx(max(gains), abs=0.05 if max(gains) > 10 else 0.005)
            assert int(below) == sum(gain < 1 for gain in gains)


def test_the_map_is_of_the_newest_jax_that_is_not_newer_than_this_one(monkeypatch):
    known = {
        (0, 9): "0.10",  # older than every map: the oldest
        (0, 10): "0.10",
        (0, 13): "0.12",
        (1, 0): "0.12",
    }
    for release, expected in known.items():
        monkeypatch.setattr(compat, "RELEASE", release)
        assert rule._map.__wrapped__("cpu")["jax"].startswith(expected + ".")
    assert rule._map.__wrapped__("tpu") is None


def test_gates_cut_out_of_one_input_are_looked_up_among_their_kind(monkeypatch):
    monkeypatch.setattr(compat, "RELEASE", (0, 10))
    monkeypatch.setattr(rule, "_map", rule._map.__wrapped__)
    init = jnp.zeros((1, 256))
    apart = jp.explain_choice(gru_step, init, gates(1024, 1, 256))
    side_by_side = jp.explain_choice(
        lambda h, x: gru_step(h, jnp.split(x, 2, axis=-1)), init, jnp.zeros((1024, 1, 512))
    )
    assert apart.solver == rule.PATHS["implicit"]  # 1.6 times lax.scan
    assert side_by_side.solver is None  # 0.75 times: every gate's gradient is padded to the input
    without = jp.explain_choice(lambda h, _: (jnp.sin(h), h), init, length=1024)
    assert without.solver == apart.solver  # no inputs are no wide inputs


def test_the_shipped_map_covers_the_grid_that_auto_promises(with_jax):
    points = rule._map("cpu")["points"]
    assert {128, 1024, 8192, 32768} <= {p["steps"] for p in points}
    assert min(p["elements"] for p in points) <= 8
    assert max(p["elements"] for p in points) >= 2048
    assert {1, 2} <= {p["block"] for p in points} and {1, 3} <= {p["inputs"] for p in points}


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("fused", {"steps": 4096, "elements": 1024, "block": 1, "kernel": True}),
        ("fused", {"steps": 16, "elements": 10**6, "block": 4, "kernel": True}),
        ("implicit", {"steps": 4, "elements": 1024, "block": 1, "kernel": True}),  # decoding
        ("shooting", {"steps": 4096, "elements": 1024, "block": 2}),
        ("implicit", {"steps": 16, "elements": 1024, "block": 2}),  # short
        ("implicit", {"steps": 4096, "elements": 1024, "block": 256}),  # dense
    ],
)
def test_auto_without_a_map_guesses_and_says_so(platform, path, call, monkeypatch):
    monkeypatch.setattr(rule, "_map", lambda _: None)
    solver, reason = rule.pick(platform, **call)
    assert solver == rule.PATHS[path]
    assert "a guess: not measured" in reason and platform in reason


def test_on_a_gpu_that_runs_no_kernel_auto_takes_another_path_and_names_the_device(monkeypatch):
    monkeypatch.setattr(rule, "_map", lambda _: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    why = "the GPU kernels need Hopper or newer"
    monkeypatch.setattr(choice, "unfit", lambda platform: why if platform == "gpu" else None)

    def chosen(steps, solver=None):
        return jp.explain_choice(
            gru_step, jnp.zeros((2, 4)), gates(steps, 2, 4), solver=solver or jp.auto()
        )

    assert chosen(512).solver == rule.PATHS["shooting"] and why in str(chosen(512))
    assert chosen(64).solver == rule.PATHS["implicit"]
    # Asked about a device that is elsewhere, it does not hold this one against it.
    assert chosen(512, jp.auto(platform="tpu")).solver == rule.PATHS["fused"]


@pytest.mark.parametrize(
    "step, init, xs, says",
    [
        (gru_step, jnp.zeros((2, 4)), gates(64, 2, 4), "measured at block 1"),
        (lambda h, x: (h + x, None), jnp.zeros((), jnp.int32), jnp.arange(5), "no floating leaf"),
        (lambda h, x: (h * 1j + x, None), 0j, jnp.ones(5), "complex"),
        (lambda h, x: (h + x, None), jnp.zeros(3), jnp.ones((0, 3)), "no steps"),
    ],
)
def test_the_explanation_names_the_reason(step, init, xs, says):
    assert says in str(jp.explain_choice(step, init, xs))


def test_shapes_are_explained_as_arrays_are():
    init, xs = jnp.zeros((2, 4)), gates(64, 2, 4)
    shapes = jax.eval_shape(lambda: (init, xs))
    for solver in (None, jp.shooting(), jp.fused()):
        choice = jp.explain_choice(gru_step, *shapes, solver=solver)
        assert choice == jp.explain_choice(gru_step, init, xs, solver=solver)
    with pytest.raises(TypeError):
        jp.newton_scan(gru_step, *shapes)


def test_the_explanation_is_of_what_runs():
    choice = jp.explain_choice(gru_step, jnp.zeros((2, 4)), gates(64, 2, 4), solver=jp.newton())
    assert choice.solver == jp.newton(linear="sequential")  # what is best on a CPU
    assert isinstance(choice.structure, jp.structure.Diagonal) and not choice.refused
    assert "newton" in str(choice) and "asked for" in str(choice)


def dense_step(h, x):
    h = jnp.tanh(h @ jnp.full((4, 4), 0.1) + x[0])
    return h, h


# What the log says of a step that no kernel takes, and of a platform without kernels.
NO_KERNEL = {
    "a product": (dense_step, {}, r"no kernel runs: the step uses 'dot_general' at .*test_choice"),
    "a product, by XLA": (dense_step, {"implementation": "xla"}, "uses 'dot_general'"),
    "the platform": (gru_step, {}, r"no kernel runs: there is none for the platform 'cpu'$"),
    "the window": (
        gru_step,
        {"implementation": "mosaic_tpu_interpret", "window": 10**6},
        r"no kernel runs: mosaic_tpu_interpret: .*1000000",
    ),
    "none": (gru_step, {"implementation": "xla"}, "^fused.*: asked for$"),
}


@pytest.mark.parametrize("name", NO_KERNEL)
def test_the_explanation_of_fused_says_what_the_log_says(name, caplog, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    step, options, says = NO_KERNEL[name]
    linear_kernel.say.cache_clear()
    shapes = jax.eval_shape(lambda: (jnp.zeros((2, 4)), gates(10**6, 2, 4)))
    solver = jp.fused(**options)
    found = jp.explain_choice(step, *shapes, solver=solver)
    assert re.search(says, str(found)) and not caplog.records
    assert found.refused == (name != "none")
    jax.eval_shape(lambda *call: jp.newton_scan(step, *call, solver=solver), *shapes)
    said = [r.message for r in caplog.records]
    why = found.reason.removeprefix("fused was asked for, but no kernel runs: ")
    assert said == ([f"no kernel runs, shooting instead: {why}"] if found.refused else [])
    assert found.solver is not None and found.solver.name == ("shooting" if said else "fused")


def test_a_gain_is_worded_as_speed_and_a_jacobian_by_its_blocks(monkeypatch):
    point = {"block": 2, "steps": 64, "elements": 8, "inputs": 1, "speedup": {"implicit": 1.03}}
    measured = {"points": [point], "device": "a machine", "jax": "0.12.0"}
    monkeypatch.setattr(rule, "_map", lambda platform: measured)
    call = gru_step, jnp.zeros((2, 4)), gates(64, 2, 4)
    scan = str(jp.explain_choice(*call, solver=jp.auto(platform="cpu")))
    assert "sequential is only 1.03 times as fast as lax.scan with its own derivative" in scan
    point["speedup"]["implicit"] = 3.6
    gain = str(jp.explain_choice(*call, solver=jp.auto(platform="cpu")))
    assert "Diagonal Jacobian: 3.6 times as fast as lax.scan with its own" in gain
    both = lambda carry, x: ((jnp.sin(carry[0] + carry[1]), carry[0]), None)  # noqa: E731
    pair = (jnp.zeros(4), jnp.zeros(4))
    blocks = str(jp.explain_choice(both, pair, jnp.zeros(64), solver=jp.shooting()))
    assert "Block Jacobian in blocks of 2 x 2: asked for" in blocks and "(" not in blocks[30:]


def test_auto_equals_lax_scan_in_values_and_gradients():
    init, xs = jnp.zeros((2, 4)), gates(64, 2, 4)

    def loss(scan):
        return lambda init, xs: jnp.sum(jnp.sin(scan(gru_step, init, xs)[1]))

    value, grads = jax.jit(jax.value_and_grad(loss(jp.newton_scan), (0, 1)))(init, xs)
    expected, exact = jax.jit(jax.value_and_grad(loss(lax.scan), (0, 1)))(init, xs)
    assert jnp.allclose(value, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
        # Both in float32: each rounds the products of up to 64 Jacobians in another order.
        assert jnp.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_undifferentiated_sequential_solve_stores_no_state_that_is_not_asked_for():
    def ends_only(scan):
        def run(init, xs):
            return scan(lambda h, x: (gru_step(h, x)[0], None), init, xs)[0]

        compiled = jax.jit(run).lower(jnp.zeros((2, 4)), gates(512, 2, 4)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def ours(f, init, xs):
        return jp.newton_scan(f, init, xs, solver=jp.sequential())

    trajectory = 512 * 2 * 4 * 4
    assert ends_only(ours) < ends_only(lax.scan) + trajectory // 2


@pytest.mark.slow
def test_the_fit_writes_a_map_that_the_rule_can_read(tmp_path, monkeypatch):
    class Quiet:
        def print(self, *args, **kwargs):
            pass

    output = tmp_path / "choice.json"
    grid = {"para_gru": [[16, 1, 4]], "stacked_para_gru": [[16, 1, 4]], "dense": [[16, 1, 4]]}
    fit(grid, {"implicit": jp.sequential()}, 3, 0.2, output, Quiet())
    record = json.loads(output.read_text())
    assert [p["block"] for p in record["points"]] == [1, 1, 4]
    assert [p["inputs"] for p in record["points"]] == [1, 3, 1]
    assert all(p["speedup"]["implicit"] > 0 for p in record["points"])
    monkeypatch.setattr(rule, "_map", lambda platform: record)
    _, reason = rule.pick("cpu", steps=16, elements=4, block=4)
    assert "block 4" in reason
