"""Configs that a hostile folder might hold: to run code, or to read foreign files.

`experiments.faults` and the tests open a run with each of them.
"""

import json
from collections.abc import Callable
from typing import Any

Node = Any

# Forbidden names of constructors.
NAMES: tuple[Any, ...] = (
    "os.system",
    "builtins.eval",
    "numpy.load",
    "pathlib.Path",
    "subprocess.Popen",
    "pickle.loads",
    "hydra.utils.instantiate",
    "hydra.utils.call",
    "hydra.utils.get_class",
    "hydra._internal.utils._locate",
    "functools.partial",
    "operator.methodcaller",
    "jax.numpy.load",
    "experiments.run.folders.write_json",
    "experiments.run.folders.subprocess.run",
    "experiments.data.files.read_text",
    "experiments.run.loggers.import_module",
    "experiments.run.names.importlib.import_module",
    "experiments.run.trust.os.system",
    "experiments.shell.build.instantiate",
    "experiments.shell.commandline.launch",
    "experiments.inject.fault_children.save",
    "experiments.sweep.sweeps.start",
    "experiments.run",
    "jaxpara",
    "jaxpara.cells",
    "jaxpara.compat.bind",
    "jaxpara.recurrence.cells.common.assemble",
    "jaxpara.recurrence.scan.newton_scan",
    "jaxpara.recurrence.solve.complete",
    "jaxpara.weights.method.computed",
    "jaxpara.testing.jax.numpy.load",
    "jaxpara.nn.mixers.newton_scan",
    "jaxpara._importlib.import_module",
    "jaxpara.recurrence.rule.json.loads",
    "jaxpara.recurrence.rule.importlib.import_module",
    "jaxpara.nn.mixers.jax.numpy.load",
    "jaxpara.lora.__globals__",
    "jaxpara.lora.__class__",
    "jaxpara.Model.__init__",
    "jaxpara.Model._replace",
    "optax._src.alias.adamw",
    "optax.contrib.jnp.load",
    "optax.functools.partial",
    "optax.jax.jit",
    "optax.adamw.__globals__.get",
    "optax. adamw",
    "optax.adamw\n",
    "Optax.adamw",
    "oрtax.adamw",  # with a Cyrillic letter
    "???",
    "",
    None,
    3,
    ["optax.adamw"],
    {"a": "optax.adamw"},
)

# Forms of such a name.
FORMS: dict[str, Callable[[Any], Node]] = {
    "called": lambda name: {"_target_": name},
    "partial": lambda name: {"_target_": name, "_partial_": True},
    "by get_method": lambda name: {"_target_": "hydra.utils.get_method", "path": name},
    "by get_object": lambda name: {"_target_": "hydra.utils.get_object", "path": name},
}

# Getters that do something other than look up one shipped or public name.
GETTERS: tuple[Node, ...] = (
    {"_target_": "hydra.utils.get_method", "_args_": ["os.system"]},
    {
        "_target_": "hydra.utils.get_method",
        "path": "jaxpara.cells.para_gru",
        "_args_": ["os.system"],
    },
    {"_target_": "hydra.utils.get_object", "path": "jaxpara.cells.para_gru", "_partial_": True},
    {"_target_": "hydra.utils.get_object", "_partial_": True},
)

# Places of a constructor in a model's config.
PLACES: dict[str, Callable[[dict[str, Any], Node], Node]] = {
    "at the top": lambda model, evil: evil,
    "as an argument": lambda model, evil: {**model, "mixer": evil},
    "in a list": lambda model, evil: {
        **model,
        "mixer": {"_target_": "builtins.tuple", "_args_": [[evil]]},
    },
    "deep in lists": lambda model, evil: {**model, "mixer": [[{"a": [evil]}]]},
    "as an argument that nothing takes": lambda model, evil: {**model, "unknown": evil},
    "not recursive": lambda model, evil: {
        "_target_": "experiments.shell.build.solve_in_ways",
        "_recursive_": False,
        "model": evil,
        "parallel": {"_target_": "jaxpara.shooting"},
    },
}

_LORA = {"_target_": "jaxpara.lora"}


def _weight(base: Any) -> Node:
    return {"_target_": "jaxpara.Weight", "_args_": [base, {}, _LORA]}


# A constructor that makes nested mappings of flat ones: the forbidden name appears only then.
_NODES = {
    "_target_": "jaxpara.weights.adapters",
    "_convert_": "all",
    "state": {
        "w": _weight(1.0),
        "evil/_target_": "builtins.tuple",
        "evil/_args_/_target_": "numpy.load",
        "evil/_args_/file": "x.npy",
        "evil/_args_/allow_pickle": True,
    },
    "trained": {
        "w": _weight(False),
        "evil/_target_": True,
        "evil/_args_/_target_": True,
        "evil/_args_/file": True,
        "evil/_args_/allow_pickle": True,
    },
}
_EACH = {"_target_": "experiments.shell.build.each_of", "members": _NODES}

# Configs whose constructors make a node that other constructors would build. Through JSON: a node
# that stands twice would be written as an alias, which is refused for itself.
MADE: dict[str, dict[str, Node]] = json.loads(
    json.dumps(
        {
            "by each_of": {"model": _EACH},
            "by chain_of": {"model": {**_EACH, "_target_": "experiments.shell.build.chain_of"}},
            "by solve_in_ways": {
                "model": {
                    "_target_": "experiments.shell.build.solve_in_ways",
                    "model": _NODES,
                    "parallel": {"_target_": "builtins.tuple", "_args_": [[]]},
                }
            },
            "as an OmegaConf node": {
                "model": {**_EACH, "members": {"_convert_": "none", "a": _NODES}},
            },
            "in the transform": {"transform": {"a": _EACH}, "where": None},
        }
    )
)

# Texts that OmegaConf would evaluate.
TEXTS = (
    "${oc.env:SECRET}",
    "${oc.env:HOME,x}",
    "a${oc.create:'{}'}",
    "${oc.decode:'[1]'}",
    "\\${x}",
    "\\\\${oc.env:SECRET}",
    "${hydra:runtime.cwd}",
    "${now:%Y}",
    "${job_folder:}",
    "${model}",
)

# Data outside the folder; {run} is the folder.
DATA: tuple[dict[str, Any], ...] = (
    {"_target_": "experiments.data.text.load", "path": "/etc/passwd"},
    {"_target_": "experiments.data.text.load", "path": "../../y"},
    {"_target_": "experiments.data.text.load", "path": "~/x"},
    {"_target_": "experiments.data.text.load", "path": "{run}/*/../../secret"},
    {"_target_": "experiments.data.text.load", "path": "{run}x/secret"},
    {"_target_": "experiments.data.text.load", "path": "a\0b"},
    {"_target_": "experiments.data.text.load", "path": b"/etc/passwd"},
    {"_target_": "experiments.data.jsonl.load", "path": "{run}/../secret"},
    {"_target_": "experiments.data.parquet.load", "path": "/"},
    {"_target_": "experiments.data.stdlib.load", "root": "/etc"},
    {"_target_": "experiments.data.stdlib.load", "tokenizer": "/etc/passwd"},
    {"_target_": "experiments.data.huggingface.load", "path": "somebody/texts"},
    {"_target_": "experiments.data.huggingface.load", "path": "text", "data_files": ["/etc/x"]},
    {"_target_": "experiments.data.huggingface.load", "path": "text"},
    {
        "_target_": "experiments.data.huggingface.load",
        "path": "json",
        "data_files": {"train": "https://example.org/x.json"},
    },
)
