"""What every setting may be: its type, its range and its unit, in one table.

A command's config is checked against the table before anything is built, so that a mistake costs
a second and not a compilation. Objects that `_target_` names check what only they know.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig, ListConfig, OmegaConf

from experiments.runs import RunError

LARGEST = 2**31 - 1  # of whole numbers: XLA's sizes and a run's steps have 32 bits
# The table speaks for objects of these packages; a user's own may give the names other meanings.
OURS = ("jaxpara.", "experiments.", "builtins.tuple", "hydra.utils.get_")


class Rule(NamedTuple):
    """What a setting may be.

    Attributes:
      kind: "whole", "number", "switch", "text" or "any".
      low: the least value.
      high: the largest value.
      unit: what is counted, for the message.
      inside: whether the bounds themselves are excluded.
      null: whether null is a value.
      many: whether it is a list, at any depth, of such values; never an empty one.
      choices: of a text, if not all are.
    """

    kind: str
    low: float = -math.inf
    high: float = math.inf
    unit: str = ""
    inside: bool = False
    null: bool = False
    many: bool = False
    choices: tuple[str, ...] = ()


def whole(low: int, unit: str, **more: Any) -> Rule:
    """A whole number from `low` on."""
    return Rule("whole", low, more.pop("high", LARGEST), unit, **more)


def number(low: float, high: float, unit: str, **more: Any) -> Rule:
    """A finite number from `low` to `high`; infinite only where `high` is and `low` is not less."""
    return Rule("number", low, high, unit, **more)


SEED = whole(0, "a seed", high=2**32 - 1)
SWITCH, TEXT, ANY = Rule("switch"), Rule("text"), Rule("any", null=True)
OPTIONAL_TEXT = Rule("text", null=True)
FINITE = 3.4e38  # float32's largest
POSITIVE = {"low": 0.0, "high": FINITE, "inside": True}

# A key's rule is that of its whole path, with the command's name before it or without, of its last
# two names, or of its last name.
RULES: dict[str, Rule] = {
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
    "learning_rate": Rule("number", unit="a step size", **POSITIVE),
    "warmup": number(0, 1, "a share of the steps"),
    "floor": number(0, 1, "a share of the peak rate"),
    "b1": number(0, 1, "a decay a step"),
    "b2": number(0, 1, "a decay a step"),
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
    "hidden": whole(1, "units", null=True),
    "heads": whole(1, "heads"),
    "prefix": whole(1, "positions"),
    "conv_taps": whole(1, "positions"),
    "tied": SWITCH,
    "compute_dtype": Rule("text", choices=("float32", "bfloat16", "float16", "float64")),
    "mixer.scale": Rule("number", unit="the bound of the first weights", **POSITIVE),
    "mixer.clip": Rule("number", unit="the bound of the weights", **POSITIVE),
    "decays": number(-1, 1, "decays", many=True),
    "time_constants": Rule("number", unit="steps", many=True, **POSITIVE),
    "chunks": whole(1, "chunks"),
    "max_iters": whole(1, "iterations", null=True),
    # transforms
    "where": ANY,
    "bits": whole(1, "bits", high=32),
    "rank": whole(1, "rank"),
    "alpha": Rule("number", unit="a scale", null=True, **POSITIVE),
    "group": whole(1, "inputs", null=True),
    "problem.group": TEXT,
    "letters": Rule("text", choices=("all", "generators")),
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
    "prompt": OPTIONAL_TEXT,
    "prompts": OPTIONAL_TEXT,
    "generate.field": TEXT,
    "temperature": number(0, FINITE, "a temperature"),
    "top_k": whole(1, "candidates", null=True),
    "top_p": Rule("number", 0, 1, "a share of the probability", null=True),
    "samples": whole(1, "continuations of each prompt"),
    "generate.block": whole(1, "tokens"),
    # tables and figures
    "run": ANY,
    "runs": ANY,
    "from": OPTIONAL_TEXT,
    "output": OPTIONAL_TEXT,
    "title": OPTIONAL_TEXT,
    "metric": OPTIONAL_TEXT,
    "better": Rule("text", null=True, choices=("min", "max")),
    "sort": OPTIONAL_TEXT,
    "x": TEXT,
    "y": OPTIONAL_TEXT,
    "log_x": SWITCH,
    "log_y": SWITCH,
    # measurements
    "mixers.prompt": whole(1, "tokens"),
    "rounds": whole(3, "samples of each, for a spread"),
    "mixers.rounds": whole(1, "counts"),
    "budget_s": Rule("number", unit="seconds", **POSITIVE),
    "fresh": SWITCH,
    "suite.scale": Rule("number", unit="the bound of the weights", **POSITIVE),
    "shapes": whole(1, "steps, sequences or units", many=True),
    "lengths": whole(1, "steps", many=True),
    "batches": whole(1, "sequences", many=True),
    "widths": whole(1, "units", many=True),
    "grid": ANY,
    "values_tol": Rule("number", unit="an error", **POSITIVE),
    "gradients_tol": Rule("number", unit="an error", **POSITIVE),
    "budgets": whole(1, "evaluations", many=True),
    "tols": Rule("number", unit="relative residuals", many=True, **POSITIVE),
    "unlimited": whole(1, "evaluations"),
    "size": whole(1, "bytes", high=2**62),
}


def rule_for(key: str, command: str = "") -> Rule | None:
    """The rule of a setting.

    Args:
      key: its path, `optim.learning_rate`.
      command: whose setting it is, `train`.

    Returns:
      The rule; None where the table has none, and what reads the setting judges it.
    """
    names = key.split(".")
    for path in (f"{command}.{key}", key, ".".join(names[-2:]), names[-1]):
        if path in RULES:
            return RULES[path]
    return None


def fits(value: Any, rule: Rule) -> bool:
    """Whether a value is what a rule asks for.

    Args:
      value: plain.
      rule: from the table.

    Returns:
      True if it is.
    """
    if value is None:
        return rule.null
    if rule.many:
        single = rule._replace(many=False)
        each = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
        return each and all(fits(v, rule if isinstance(v, Sequence) else single) for v in value)
    if rule.kind == "any":
        return True
    if rule.kind == "switch":
        return isinstance(value, bool)
    if rule.kind == "text":
        # A folder may be called 2024: what Hydra reads as a number is text here.
        text = isinstance(value, str | int | float) and not isinstance(value, bool)
        return text and (not rule.choices or value in rule.choices)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return False
    if rule.kind == "whole" and not isinstance(value, int):
        return False
    if rule.inside and value == math.inf == rule.high:
        return True
    if rule.inside:
        return rule.low < value < rule.high
    return rule.low <= value <= rule.high


def _bounds(rule: Rule) -> str:
    if rule.inside:
        high = "" if rule.high >= FINITE else f" and below {rule.high:g}"
        return f" above {rule.low:g}{high}"
    if rule.high in (FINITE, LARGEST, math.inf):
        return f", at least {rule.low:g}"
    return f" from {rule.low:.10g} to {rule.high:.10g}"


def expected(rule: Rule) -> str:
    """What a rule asks for, in words.

    Args:
      rule: from the table.

    Returns:
      One line.
    """
    unit = f" ({rule.unit})" if rule.unit else ""
    if rule.kind == "switch":
        text = "true or false"
    elif rule.kind == "text":
        text = f"one of {', '.join(rule.choices)}" if rule.choices else "text"
    else:
        many = {"whole": "whole numbers", "number": "numbers"}
        one = {"whole": "a whole number", "number": "a number"}
        text = f"a list of {many[rule.kind]}" if rule.many else one[rule.kind]
        text += _bounds(rule) + unit
    return f"{text}, or null" if rule.null else text


def instead(value: Any, rule: Rule) -> str:
    """A value that fits, near the one that was given.

    Args:
      value: that does not fit.
      rule: that it breaks.

    Returns:
      As it is typed.
    """
    if rule.many:
        given = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        single = rule._replace(many=False)
        if any(isinstance(v, Sequence) and not isinstance(v, str) for v in given):
            return "[[128,1,32]]" if rule is RULES["shapes"] else instead([], rule)
        near = [str(v) if fits(v, single) else instead(v, single) for v in given or [None]]
        return f"[{','.join(near)}]"
    if rule.kind == "switch":
        return "true" if str(value).lower() in ("1", "yes", "on", "ture") else "false"
    if rule.kind == "text":
        near = difflib.get_close_matches(str(value), rule.choices, n=1, cutoff=0.0)
        return near[0] if near else "TEXT"
    usable = isinstance(value, int | float) and math.isfinite(value) and not isinstance(value, bool)
    if rule.kind == "whole":
        near = min(max(math.ceil(value) if usable else 0, int(rule.low)), int(rule.high))
        return str(near)
    if usable and rule.low < -value < rule.high:
        return f"{-value:g}"  # a minus sign too many
    top = rule.high if rule.high < FINITE else max(2 * rule.low, rule.low + 1)
    if rule.inside:
        return f"{(rule.low + top) / 2:g}"
    return f"{top if usable and value > 0 else rule.low:g}"


def settings_of(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a config that a person can override: what is no reference to another one.

    Args:
      node: composed.
      prefix: the path to it.

    Yields:
      Path and plain value; objects and groups are entered.
    """
    ours = str(node.get("_target_", OURS[0])).startswith(OURS)
    for key in node:
        path = f"{prefix}{key}"
        if key == "hydra" or str(key) in ("_target_", "_convert_", "_recursive_"):
            continue
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        value = node[key]
        if isinstance(value, DictConfig):
            yield from settings_of(value, f"{path}.")
        elif isinstance(value, ListConfig):
            inner = dict(_objects_in(value, path))
            for place, item in inner.items():
                yield from settings_of(item, f"{place}.")
            if ours and not inner:
                yield path, OmegaConf.to_container(value, resolve=True)
        elif ours:
            yield path, value


def _objects_in(node: ListConfig, path: str) -> Iterator[tuple[str, DictConfig]]:
    """The mappings of a list, at any depth, by their paths."""
    for i in range(len(node)):
        if OmegaConf.is_interpolation(node, i):
            continue
        if isinstance(node[i], DictConfig):
            yield f"{path}.{i}", node[i]
        elif isinstance(node[i], ListConfig):
            yield from _objects_in(node[i], f"{path}.{i}")


def check_settings(cfg: DictConfig, command: str = "") -> None:
    """Refuses a config whose settings are not what the table asks for.

    Args:
      cfg: composed.
      command: whose it is, `train`.

    Raises:
      RunError: what was given, what was expected, what to type.
    """
    for key, value in settings_of(cfg):
        rule = rule_for(key, command)
        if rule is None or fits(value, rule):
            continue
        shown = {True: "true", False: "false", None: "null"}.get(value) if _plain(value) else None
        shown = shown or (f"{value!r}" if isinstance(value, str) else str(value))
        raise RunError(
            f"{key}={shown}: expected {expected(rule)};\n"
            f"type for example {key}={instead(value, rule)}"
        )


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)
