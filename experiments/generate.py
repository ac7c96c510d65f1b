"""Continues prompts: `python -m experiments.generate run=FOLDER prompt="def "`."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from experiments.run import folders, outputs, trust
from experiments.run.folder_arguments import quote_folders
from experiments.run.plain_files import for_terminal
from experiments.shell.commandline import command, guarded, quote_text
from experiments.shell.foreign import content_of
from experiments.text.prompts import read_prompts, stop_strings
from experiments.text.sampling import Request, Rule, Sampler, complete, encode, follow, sampler
from experiments.text.trained import open_model
from jaxpara.types import Params

DEFAULT_PROMPT = "def "
FREE_TEXT = ("prompt", "prompts", "stop", "output")
FOLDERS = ("run", trust.TRUST)


def read_requests(cfg: DictConfig) -> list[Request]:
    """Collects the requests, with each prompt repeated for its samples.

    Args:
      cfg: see conf/generate.yaml.

    Returns:
      The requests.

    Raises:
      RunError: both prompt and prompts are given, or a file cannot be used.
    """
    if cfg.prompt is not None and cfg.prompts is not None:
        raise folders.RunError(
            f"prompt={cfg.prompt!r} and prompts={cfg.prompts!r}: give only one of them"
        )
    if cfg.samples < 1:
        raise folders.RunError(f"samples={cfg.samples} for each prompt: give at least 1")
    if cfg.prompts is not None:
        prompts = read_prompts(str(cfg.prompts), field=cfg.field)
    else:
        prompts = [DEFAULT_PROMPT if cfg.prompt is None else str(cfg.prompt)]
    return [Request(encode(prompt), i) for prompt in prompts for i in range(cfg.samples)]


def write_lines(sampler: Sampler, params: Params, requests: list[Request], cfg: DictConfig) -> None:
    """Writes a JSON line for every request, as soon as its batch is done.

    Args:
      sampler: from `sampling.sampler`.
      params: of its model.
      requests: the requests.
      cfg: `output` is the file; null: stdout.
    """
    drawn = complete(sampler, params, requests, seed=cfg.seed, batch_size=cfg.batch_size)
    with ExitStack() as held:
        lines = sys.stdout if cfg.output is None else None
        for request, continuation in zip(requests, drawn, strict=True):
            if lines is None:  # not before the first is there: a refused command leaves no file
                Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)
                lines = held.enter_context(open(cfg.output, "x", encoding="utf-8"))
            record: dict[str, Any] = {
                "prompt": request.prompt.decode(errors="replace"),
                "sample": request.sample,
                **continuation._asdict(),
            }
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            lines.flush()


def job(cfg: DictConfig) -> None:
    """Prints the continuation of one prompt while it is drawn; writes JSON Lines for several.

    Args:
      cfg: composed by Hydra, see conf/generate.yaml.

    Raises:
      RunError: no such run, or a setting cannot be used.
    """
    folder = folders.find_run(cfg.run)
    requests = read_requests(cfg)
    if cfg.output is not None:
        outputs.new(cfg.output)
    rule = Rule(cfg.length, cfg.temperature, cfg.top_k, cfg.top_p, stop_strings(cfg.stop))
    with content_of(folder):
        model, params, tokenizer = open_model(folder)
        try:
            writer = sampler(model, rule, tokenizer=tokenizer, block=cfg.block)
            if len(requests) > 1 or cfg.output is not None:
                write_lines(writer, params, requests, cfg)
            else:
                for [piece] in follow(writer, params, requests, seed=cfg.seed)[1]:
                    sys.stdout.write(for_terminal(piece) if sys.stdout.isatty() else piece)
                    sys.stdout.flush()
                sys.stdout.write("\n")
        except ValueError as error:
            raise folders.RunError(str(error)) from error
    print(writer.decode.watch.report(), file=sys.stderr)


@command
@hydra.main(version_base="1.3", config_path="conf", config_name="generate")
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""
    guarded(lambda: job(cfg), cfg)


if __name__ == "__main__":
    sys.argv[1:] = quote_text(quote_folders(sys.argv[1:], keys=FOLDERS), keys=FREE_TEXT)
    main()
