"""The type, range and unit of every setting, in one table.

`experiments.run.checks` compares a command's config with it.
"""

import math
from typing import Any, NamedTuple

LARGEST = 2**31 - 1  # of whole numbers: XLA's sizes and a run's steps have 32 bits
BIGGEST = 2**63  # of whole numbers anywhere: much larger ones are no float either


class Rule(NamedTuple):
    """The values that a setting may have.

    Attributes:
      kind: "whole", "number", "switch", "text", "words" (a text or a list of texts), "section"
        (a group of keys), "object" (with its `_target_`) or "any".
      low: the smallest value.
      high: the largest value.
      unit: of the value, for the message.
      inside: whether the bounds themselves are excluded.
      below: whether only the largest value itself is excluded.
      empty: whether a text may be empty. Most name something, and an empty path is where we are.
      null: whether null is allowed.
      many: whether it is a list, at any depth, of such values; it must not be empty.
      choices: the allowed texts, if not all are.
      example: a usual number; None: the nearest one that is allowed is as good.
    """

    kind: str
    low: float = -math.inf
    high: float = math.inf
    unit: str = ""
    inside: bool = False
    below: bool = False
    empty: bool = False
    null: bool = False
    many: bool = False
    choices: tuple[str, ...] = ()
    example: float | None = None


def shortened(text: str) -> str:
    """A value as a message shows it: at most its first 60 characters."""
    return text if len(text) <= 60 else f"{text[:60]}..."


def whole(low: int, unit: str, **more: Any) -> Rule:
    """A whole number of at least `low`."""
    return Rule("whole", low, more.pop("high", LARGEST), unit, **more)


def number(low: float, high: float, unit: str, **more: Any) -> Rule:
    """A number from `low` to `high`; finite unless `high` is infinite."""
    return Rule("number", low, high, unit, **more)


SEED = whole(0, "a seed", high=2**32 - 1)
SWITCH, TEXT, ANY = Rule("switch"), Rule("text"), Rule("any", null=True)
OPTIONAL_TEXT = Rule("text", null=True)
TEXTS, WORDS, SECTION = Rule("text", many=True), Rule("words"), Rule("section")
OBJECT = Rule("object")
FINITE = 3.4e38  # float32's largest
POSITIVE = {"low": 0.0, "high": FINITE, "inside": True}

# A key's rule is the first that is found: by its whole path behind the command's name, behind a
# bare dot (the same in every command), by itself, by its last two names, or by its last name. Any
# run may be continued by `train`, so settings of other commands are found by the dot.
RULES: dict[str, Rule] = {
    **dict.fromkeys(("evaluation", "check", "sample", "checkpoint", "trace"), SECTION),
    **dict.fromkeys((".data", ".model", ".transform"), SECTION._replace(null=True)),
    ".rounding": SECTION,
    # objects
    **dict.fromkeys((".parallel", "models.parallel", "data.sampler", "mixer.cell"), OBJECT),
    "mixer.solver": OBJECT._replace(null=True),
    "trust": WORDS._replace(null=True),
    # what is trained, and for how long
    "name": TEXT,
    "seed": SEED,
    "seeds": SEED._replace(many=True),
    "steps": whole(1, "training steps"),
    "batch_size": whole(1, "sequences"),
    "evaluate.batch_size": whole(1, "windows", null=True),
    "accumulate": whole(1, "parts of a batch"),
    "window": whole(1, "tokens"),
    "length": whole(1, "tokens"),
    "evaluate.length": whole(1, "tokens", null=True),
    "windows": whole(1, "windows"),
    "evaluate.windows": whole(1, "windows", null=True),
    "log_every": whole(1, "steps"),
    "eval_every": whole(1, "steps"),
    "resume": SWITCH,
    "checkpoint.every": whole(1, "steps"),
    "keep_last": whole(1, "checkpoints"),
    "keep_best": whole(0, "checkpoints"),
    "profile": SWITCH,
    "trace.start": whole(1, "steps, of which the first compiles"),
    "trace.steps": whole(1, "steps"),
    "peak_flops": Rule("number", unit="FLOP/s", null=True, **POSITIVE),
    # optimisers and projections
    "learning_rate": Rule("number", unit="a step size", example=1e-3, **POSITIVE),
    "warmup": number(0, 1, "a share of the steps"),
    "floor": number(0, 1, "a share of the peak rate"),
    "b1": number(0, 1, "a decay a step", below=True),
    "b2": number(0, 1, "a decay a step", below=True),
    "weight_decay": number(0, FINITE, "a decay a step"),
    "optim.clip": number(0, math.inf, "the largest norm of a gradient", inside=True),
    "optimizer.clip": number(0, math.inf, "the largest norm of a gradient", inside=True),
    "factor": number(0, FINITE, "a factor of the learning rate"),
    "bound": number(0, math.inf, "the largest weight", inside=True),
    # models
    "vocab_size": whole(1, "tokens"),
    "train_tokenizer.vocab_size": whole(257, "tokens, of which 256 are bytes"),
    "width": whole(1, "features"),
    "layers": whole(1, "layers"),
    "mlp_hidden": whole(1, "features", null=True),
    "mlp_adapter": SECTION._replace(null=True),
    "hidden": whole(1, "units", null=True),
    "heads": whole(1, "heads"),
    "prefix": whole(1, "positions"),
    "conv_taps": whole(1, "positions", high=1024),
    "tied": SWITCH,
    "mlp_adapter.scale": Rule("number", unit="a scale", **POSITIVE),
    "reads": Rule("text", choices=("input", "output")),
    "biases": SWITCH,
    "compute_dtype": Rule("text", choices=("float32", "bfloat16", "float16", "float64")),
    "mixer.scale": Rule("number", unit="the bound of the first weights", **POSITIVE),
    "mixer.clip": Rule("number", unit="the bound of the weights", **POSITIVE),
    "decays": number(-1, 1, "decays", many=True),
    "time_constants": Rule("number", unit="steps", many=True, **POSITIVE),
    "chunks": whole(1, "chunks"),
    "max_iters": whole(1, "iterations", null=True),
    "limit": number(0, math.inf, "times the cost of lax.scan", inside=True, null=True),
    # transforms
    "where": ANY,
    "bits": whole(1, "bits", high=32),
    "rank": whole(1, "rank"),
    "alpha": Rule("number", unit="a scale", null=True, **POSITIVE),
    "dropout": number(0, 1, "a share of the inputs", below=True),
    "downcast": TEXT,
    "group": whole(1, "inputs", null=True),
    "problem.group": TEXT,
    "letters": Rule("text", choices=("all", "generators")),
    "rounding": TEXT,
    "fake_quant.rounding": Rule("text", choices=("nearest", "stochastic")),
    "easy_quant.by": Rule("text", choices=("column", "layer")),
    "lsq.full": SWITCH,
    "lr_qat.full": SWITCH,
    "scale_block": whole(1, "values", null=True),
    "budget": whole(1, "ranks"),
    "shards": whole(1, "shards"),
    "n": whole(1, "kept of m"),
    "m": whole(1, "values"),
    # data
    "data.path": TEXT,
    "data.name": OPTIONAL_TEXT,
    "data.field": TEXT,
    "encoding": TEXT,
    "piece_size": whole(1, "characters", null=True),
    "prefetch": whole(0, "batches"),
    "tokenizer": OPTIONAL_TEXT,
    "data.root": OPTIONAL_TEXT,
    "data.only": TEXTS,
    "data.without": TEXTS,
    "validation_bytes": whole(1, "bytes", high=2**62),
    "validation_fraction": number(0, 1, "the share held out", inside=True),
    "validation_split": OPTIONAL_TEXT,
    "data.block": whole(1, "steps"),
    # tasks
    "test_lengths": whole(1, "tokens", many=True),
    "test_sequences": whole(1, "sequences"),
    "grow_steps": whole(0, "steps"),
    "grow_from": whole(1, "positions"),
    "alphabet": whole(1, "letters"),
    "hops": whole(1, "hops"),
    "keys": whole(1, "keys"),
    "values": whole(1, "values"),
    "pairs": whole(1, "pairs"),
    "modulus": whole(2, "numbers"),
    # texts that are drawn
    "prompt": OPTIONAL_TEXT._replace(empty=True),  # the command says what a model needs
    "sample.prompt": TEXT._replace(empty=True),
    "prompts": OPTIONAL_TEXT,
    "generate.field": TEXT,
    "temperature": number(0, FINITE, "a temperature"),
    "top_k": whole(1, "candidates", null=True),
    "top_p": Rule("number", 0, 1, "a share of the probability", null=True),
    "samples": whole(1, "continuations of each prompt"),
    "generate.block": whole(1, "tokens"),
    # tables and figures
    "run": WORDS._replace(null=True),
    "runs": WORDS._replace(null=True),
    "group_by": WORDS,
    "columns": TEXTS._replace(null=True),
    "lines": TEXTS._replace(null=True),
    "from": OPTIONAL_TEXT,
    "output": OPTIONAL_TEXT,
    "title": OPTIONAL_TEXT._replace(empty=True),
    "metric": OPTIONAL_TEXT,
    "better": Rule("text", null=True, choices=("min", "max")),
    "sort": OPTIONAL_TEXT,
    "plot.x": TEXT,
    **dict.fromkeys(("plot.y", "mixers.y"), OPTIONAL_TEXT),
    "log_x": SWITCH,
    "log_y": SWITCH,
    # measurements
    "mixers.prompt": whole(1, "tokens"),
    "rounds": whole(3, "samples of each, for a spread"),
    "mixers.rounds": whole(1, "counts"),
    "budget_s": Rule("number", unit="seconds", **POSITIVE),
    "fresh": SWITCH,
    "suite.cell": TEXT,
    "suite.passes": TEXTS,
    "suite.rivals": TEXTS,
    "suite.scale": Rule("number", unit="the bound of the weights", **POSITIVE),
    "shapes": whole(1, "steps, sequences or units", many=True),
    "lengths": whole(1, "steps", many=True),
    "batches": whole(1, "sequences", many=True),
    "widths": whole(1, "units", many=True),
    "grid": ANY,
    "values_tol": Rule("number", unit="an error", **POSITIVE),
    "gradients_tol": Rule("number", unit="an error", **POSITIVE),
    "budgets": whole(1, "evaluations", many=True),
    "tols": Rule("number", unit="relative corrections", many=True, **POSITIVE),
    "unlimited": whole(1, "evaluations"),
    "size": whole(1, "bytes", high=2**62),
}


def rule_for(key: str, command: str = "") -> Rule | None:
    """Finds the rule of a setting.

    Args:
      key: its path, such as `optim.learning_rate`.
      command: the command that it belongs to, such as `train`.

    Returns:
      The rule; None if the table has none, and the code that reads the setting checks it.
    """
    names = key.split(".")
    for path in (f"{command}.{key}", f".{key}", key, ".".join(names[-2:]), names[-1]):
        if path in RULES:
            return RULES[path]
    return None
