"""The parts that training is made of: loop, watch, sampling, judging, figures, command line."""

import gc
import io
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from matplotlib.colors import to_hex
from omegaconf import OmegaConf
from rich.console import Console
from rich.text import Text

from experiments.run import figures, folders, metrics, progress
from experiments.run.loop import Diverged, Hooks, Pace, run_loop
from experiments.run.speed import Speedometer
from experiments.run.stopping import noting, pass_on, stop_signal
from experiments.shell.commandline import quote_text
from experiments.text.judging import bits_per_byte
from jaxpara.nn import decoder, mixers
from jaxpara.recurrence import cells
from jaxpara.types import TrainState


@pytest.fixture(scope="module")
def tiny():
    model = decoder(256, 16, 1, mixer=mixers.recurrent(cells.para_gru))
    return model, jax.jit(model.init)(jax.random.key(0))


def loop(losses, *, log_every=2, eval_every=3, stop_after=None, saves=None, norm=1.0, **options):
    """Runs the loop on a step that counts, with the losses given; returns all that it did."""
    rows, looks, statuses = [], [], []
    saves = [] if saves is None else saves
    begin = options.get("begin", 0)

    def step(state, batch):
        assert batch == int(state.step), "batch number and step number must go together"
        loss = jnp.float32(losses[int(state.step)])
        metrics = {"loss": loss, "grad_norm": jnp.float32(norm), "balance": 2 * loss}
        metrics["loads"] = jnp.ones(3)  # no scalar: no column
        return state._replace(step=state.step + 1, params=state.params + 1), metrics

    def look_up(number, params):
        looks.append((number, float(params)))
        return {"params": float(params)}

    pace = Pace(
        steps=len(losses),
        tokens_per_step=10,
        log_every=log_every,
        eval_every=eval_every,
        save_every=options.pop("save_every", 100),
        bytes_per_token=1.0,
    )
    hooks = Hooks(
        write_row=rows.append,
        look_up=look_up,
        save=lambda state, memory, figures: saves.append((int(state.step), memory, figures)),
        seconds=lambda: 0.0,
        progress=progress.Progress(statuses.append, lambda text: None),
        stopped=lambda: stop_after is not None and begin + len(statuses) >= stop_after - 1,
        solved=options.pop("solved", None),
    )
    state = TrainState(jnp.float32(begin), None, jnp.int32(begin), None)
    batches = iter(range(begin, options.pop("there", len(losses))))
    ending = run_loop(state, step, batches, pace, hooks, **options)
    return ending, rows, looks, statuses


def test_loop_writes_means_of_what_came_since_the_last_row():
    _, rows, _, statuses = loop([1.0, 3.0, 5.0, 9.0, 2.0])
    assert [(row.step, row.loss) for row in rows] == [(2, 2.0), (4, 7.0), (5, 2.0)]
    assert [row.others for row in rows] == [{"balance": 2 * row.loss} for row in rows]
    assert [status.loss for status in statuses] == [1, 3, 5, 9, 2]
    assert statuses[1].bits_per_byte == pytest.approx(3 / math.log(2))


def test_loop_says_where_a_position_past_the_end_of_the_data_leaves_it():
    with pytest.raises(folders.RunError, match="there is no batch for step 3: the position in the"):
        loop([1.0] * 5, there=2)


def test_loop_evaluates_before_the_first_step_at_intervals_and_after_the_last():
    _, _, looks, _ = loop([1.0] * 7, eval_every=3)
    assert looks == [(0, 0.0), (3, 3.0), (6, 6.0), (7, 7.0)]


@pytest.mark.parametrize(
    "at, before",
    [(4, r"last finite loss was 2\.5000 at step 3"), (1, "no earlier step had a finite one")],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loop_stops_at_the_first_loss_that_is_not_finite(at, before, bad):
    losses = [2.5] * 6
    losses[at - 1] = bad
    with pytest.raises(Diverged, match=f"the loss is {bad} at step {at} of 6; .*{before}"):
        loop(losses)


def test_loop_stops_by_hand_with_every_step_booked_and_saved():
    saves = []
    ending, rows, looks, statuses = loop([1.0] * 9, stop_after=4, eval_every=100, saves=saves)
    assert ending.stopped and int(ending.state.step) == statuses[-1].step == 4
    assert rows[-1].step == 4 and looks == [(0, 0.0)]
    assert [(step, figures) for step, _, figures in saves] == [(4, None)]


def test_loop_saves_at_intervals_and_after_the_last_step_with_the_figures_of_that_step():
    saves = []
    loop([1.0] * 7, save_every=2, eval_every=4, saves=saves)
    expected = [(2, None), (4, {"params": 4.0}), (6, None), (7, {"params": 7.0})]
    assert [(step, figures) for step, _, figures in saves] == expected


@pytest.mark.parametrize("at", range(1, 9))
def test_loop_stopped_anywhere_and_begun_again_writes_the_rows_of_one_loop(at):
    losses, saves = [1.0, 3.0, 5.0, 9.0, 2.0, 4.0, 8.0, 7.0], []
    _, whole, looked, _ = loop(losses, log_every=3)
    _, first, looks, _ = loop(losses, log_every=3, stop_after=at, saves=saves)
    [*_, (step, memory, _)] = saves
    _, second, more, _ = loop(losses, log_every=3, begin=step, memory=memory)
    assert step == at and [*looks, *more] == looked
    seen = [[(r.step, r.loss, r.others) for r in rows] for rows in ((*first, *second), whole)]
    assert seen[0] == seen[1]


def test_loop_ends_when_the_task_is_solved_and_saves_that_it_is():
    saves = []
    ending, _, looks, _ = loop([1.0] * 9, solved=lambda f: f["params"] >= 6, saves=saves)
    assert not ending.stopped and int(ending.state.step) == 6 and looks[-1] == (6, 6.0)
    [(step, memory, _)] = saves
    assert step == 6 and memory.enough
    ending, *_ = loop([1.0] * 9, begin=6, memory=memory)
    assert int(ending.state.step) == 6, "no step is due after that"


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_loop_saves_no_state_whose_gradient_was_not_finite(norm):
    saves = []
    with pytest.raises(Diverged, match=f"gradient's norm is {norm} at step 2 of 9"):
        loop([1.0] * 9, save_every=2, norm=norm, saves=saves)
    assert saves == []


@pytest.fixture
def handlers():
    """Handlers that raise, as Ctrl-C does in a terminal: a shell's background jobs ignore it."""

    def ended(signum, frame):
        raise KeyboardInterrupt(signum)

    before = {s: signal.signal(s, ended) for s in (signal.SIGINT, signal.SIGTERM)}
    yield ended
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_a_flag_and_the_second_is_the_old_behaviour(handlers, which):
    with pytest.raises(KeyboardInterrupt), stop_signal() as stopped:
        assert stopped() is None
        os.kill(os.getpid(), which)
        assert stopped() == which
        os.kill(os.getpid(), which)
    assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is handlers


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ctrl_c_that_python_drops_stops_the_loop_that_follows():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    calls = []

    def collected(phase, info):
        if not calls:
            calls.append(phase)
            signal.raise_signal(signal.SIGINT)
            sum(range(10))  # the handler runs between two instructions

    try:
        with noting():
            gc.callbacks.append(collected)
            gc.collect()
            gc.callbacks.remove(collected)
            with stop_signal() as stopped:
                assert calls and stopped() == signal.SIGINT
            with stop_signal() as stopped:
                assert stopped() is None
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with noting(), stop_signal() as stopped:
            assert stopped() is None, "of another program"
    finally:
        signal.signal(signal.SIGINT, before)


def test_only_a_warning_with_a_handler_is_passed_on():
    got = []
    with stop_signal():
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    before = signal.signal(signal.SIGUSR2, lambda signum, frame: got.append(signum))
    try:
        with stop_signal() as stopped:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert stopped() == signal.SIGUSR2 and got == []
        pass_on(signal.SIGTERM)  # would end this process
        pass_on(stopped())
        assert got == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_watch_counts_neither_compilation_nor_evaluations():
    now = 0.0
    speed = Speedometer(100, clock=lambda: now)
    assert speed.overall() == 0 and speed.seconds_for(5) == math.inf
    for duration in (60.0, 2.0, 2.0):  # the first one compiles
        now += duration
        speed.tick()
    with speed.paused():
        now += 1000.0
    speed.mark()
    now += 4.0
    speed.tick()
    assert speed.overall() == pytest.approx(300 / 8)
    assert speed.since_mark() == pytest.approx(100 / 4)
    assert speed.seconds_for(3) == pytest.approx(8.0)
    assert speed.timed() == (3, pytest.approx(8.0))
    assert Speedometer(100, before=(3, 6.0)).overall() == pytest.approx(50)


def test_plain_lines_come_now_and_then_and_at_the_end():
    lines = []
    with progress.plain(every_seconds=1000.0, write=lines.append) as line:
        for step in range(1, 6):
            line.update(progress.Status(step, 5, 1.0, 1.4427, 12345.0, 61.0))
        line.say("hello")
        line.update(progress.Status(5, 5, 1.0, None, 12345.0, 0.0))
    assert lines.pop() == "step 5/5  loss 1.000  12,345 tokens/s  0:00 left", "no text, no bits"
    assert lines == [
        "step 1/5  loss 1.000  1.443 bits/byte  12,345 tokens/s  1:01 left",
        "step 5/5  loss 1.000  1.443 bits/byte  12,345 tokens/s  1:01 left",
        "hello",
    ]


def test_a_terminal_shows_one_line_with_a_bar_and_messages_above_it():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, _environ={})
    with progress.live(console, label="lm") as line:
        line.update(progress.Status(3, 5, 1.0, 1.4427, 12345.0, 61.0))
        line.say("step 3: validation [bold]")
    shown = Text.from_ansi(screen.getvalue()).plain
    assert "step 3: validation [bold]" in shown, "square brackets are no markup in messages"
    last = shown.strip().splitlines()[-1]
    assert "lm 3/5" in last and "1.443 bits/byte  12,345 tokens/s  1:01 left" in last


def test_durations_read_as_clocks():
    assert [progress.clock(s) for s in (0, 59.6, 3725, math.inf)] == [
        "0:00",
        "1:00",
        "1:02:05",
        "-:--",
    ]


def test_bits_per_byte_equal_a_slow_sum_in_float64(tiny):
    model, params = tiny
    cut = np.random.default_rng(0).integers(0, 256, (5, 9)).astype(np.uint8)
    logits = jax.jit(model.apply)(params, jnp.asarray(cut[:, :-1], jnp.int32))
    logits = np.asarray(logits, np.float64)
    nats = [
        np.log(np.exp(logits[i, t]).sum()) - logits[i, t, cut[i, t + 1]]
        for i in range(5)
        for t in range(8)
    ]
    expected = np.mean(nats) / np.log(2)
    # Two windows at a time leave one over: the last batch is smaller.
    score = bits_per_byte(model, {"tokens": cut}, batch_size=2)(params)
    assert score == pytest.approx(expected, rel=1e-5)
    score = bits_per_byte(model, {"tokens": cut}, batch_size=5, bytes_per_token=4.0)(params)
    assert score == pytest.approx(expected / 4, rel=1e-5)


def test_bits_per_byte_of_packed_windows_begin_anew_where_a_document_does(tiny):
    model, params = tiny
    cut = np.random.default_rng(1).integers(0, 256, (1, 9)).astype(np.int32)
    reset = np.arange(8)[None] == 4
    packed = bits_per_byte(model, {"tokens": cut, "reset": reset}, batch_size=1)(params)
    apart = [
        bits_per_byte(model, {"tokens": part}, batch_size=1)(params)
        for part in (cut[:, :5], cut[:, 4:])
    ]
    assert packed == pytest.approx(np.mean(apart), rel=1e-5)


def test_tables_come_back_as_they_were_written(tmp_path):
    table = tmp_path / "metrics.csv"
    metrics.start(table, ("step", "loss"))
    metrics.append(table, {"step": 1, "loss": 0.1})
    metrics.append(table, {"step": 2})
    assert metrics.read(table) == {"step": [1.0, 2.0], "loss": [0.1, None]}
    metrics.append(table, {"step": 3, "balance": 0.5})
    found = {"step": [1.0, 2.0, 3.0], "loss": [0.1, None, None], "balance": [None, None, 0.5]}
    assert metrics.read(table) == found and [p.name for p in tmp_path.iterdir()] == [table.name]
    with pytest.raises(FileExistsError):
        metrics.start(table, ("step",))


def test_figures_show_the_numbers_of_the_tables():
    columns = {
        "tokens": [0.0, 10.0, 20.0],
        "train_bits_per_byte": [None, 3.0, 2.0],
        "validation_bits_per_byte": [8.0, None, 2.5],
    }
    axes = figures.draw_loss(columns, {"gzip -9": 1.9, "xz -9e": None}, title="t").axes[0]
    train, validation, ruler = axes.get_lines()
    assert train.get_xydata().tolist() == [[10, 3], [20, 2]]
    assert validation.get_xydata().tolist() == [[0, 8], [20, 2.5]]
    assert ruler.get_ydata() == [1.9, 1.9] and ruler.get_label() == "gzip -9 (1.90)"
    assert axes.get_ylabel() == "loss (bits per byte)"
    assert axes.get_xlabel() == "training tokens (bytes)"


def test_solver_figure_has_a_line_for_each_layer():
    columns = {
        "tokens": [0.0, 0.0, 10.0, 10.0],
        "layer": [0.0, 1.0, 0.0, 1.0],
        "iterations": [2.0, 3.0, 2.0, 4.0],
        "residual": [1e-6, 0.0, 1e-7, 1e-6],
    }
    above, below = figures.draw_solver(columns, title="t").axes
    assert [line.get_ydata().tolist() for line in above.get_lines()] == [[2, 2], [3, 4]]
    assert below.get_yscale() == "log" and (below.get_lines()[1].get_ydata() > 0).all()
    assert len({to_hex(line.get_color()) for line in above.get_lines()}) == 2


def test_a_folder_without_metrics_has_no_figures(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no metrics.csv"):
        figures.draw_run(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "def ",
        "def f(x, *, y={}):",
        "it's",
        "\\",
        "end\\",
        "it\\'s",
        "\\\\'",
        "\n\tx",
        "${oc.env:HOME}",
        "\\${x}",
        "a=b",
        '"half',
        '"""',
        "'''",
        '"Hello", she said, "Hi"',
        "",
    ],
)
def test_prompts_reach_the_program_as_typed(text):
    [argument] = quote_text([f"prompt={text}"], keys=("prompt",))
    config = OmegaConf.create({"prompt": None})
    value = OverridesParser.create().parse_override(argument).value()
    OmegaConf.update(config, "prompt", value)
    assert config.prompt == text


def test_only_free_text_is_quoted():
    arguments = ["run=runs/x", "prompt='as is'", "-m", "top_k=3"]
    assert quote_text(arguments, keys=("prompt",)) == arguments


def test_a_missing_run_is_answered_with_the_newest_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(folders.RunError, match="give run=FOLDER.*there is none here yet"):
        folders.find_run(None)
    for age, name in ((5, "new"), (50, "old")):
        folder = tmp_path / "runs" / "lm" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("steps: 1\n")
        os.utime(folder, (1e9 - age, 1e9 - age))
    with pytest.raises(folders.RunError, match="'gone': no such folder.*run=runs/lm/new"):
        folders.find_run("gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(folders.RunError, match="'empty' holds no config.yaml"):
        folders.find_run("empty")
    with pytest.raises(folders.RunError, match="is a file: give .* folder, run=runs/lm/old$"):
        folders.find_run("runs/lm/old/config.yaml")
    assert folders.load_config(folders.find_run("runs/lm/old")).steps == 1
