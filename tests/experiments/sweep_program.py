"""A program whose jobs take no time: what a sweep does around them is what it does around runs."""

import errno
import os
import signal
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from experiments.run import folders
from experiments.shell.commandline import guarded
from experiments.sweep.sweeps import once, start


def job(cfg):
    folder = Path(HydraConfig.get().runtime.output_dir)
    begun = (folder / folders.CONFIG).exists()
    if begun and folders.status(folder) == "finished":
        return
    if not begun:
        OmegaConf.save(cfg, folder / folders.CONFIG, resolve=True)
    with (folder / "visits").open("a") as file:
        file.write("goes on\n" if cfg.resume else "begins\n")
    mended = (Path.cwd() / "mended").exists()
    if cfg.act == "fail" and not mended:
        raise folders.RunError("act=fail: give act=finish")
    if cfg.act == "bug" and not mended:
        raise ZeroDivisionError("a bug")
    if cfg.act == "pipe":
        raise BrokenPipeError(errno.EPIPE, "a logger's")
    if cfg.act == "stop" and not mended:
        raise SystemExit(130)
    if cfg.act == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.act == "sleep":
        time.sleep(1000)
    summary = {"status": "finished", "judged_by": ["loss", "min"], "loss": (cfg.x - 3) ** 2}
    folders.write_json(folder / folders.SUMMARY, summary)


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent), config_name="sweep_program")
def compose(cfg):
    return guarded(lambda: once(cfg, job), cfg)


if __name__ == "__main__":
    start(compose)
