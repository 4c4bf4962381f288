"""The run directory: every file name in it is declared here, and nowhere else.

    <run>/config.toml           the resolved configuration; config.superseded-<n>.toml: that of an
                                earlier start
          origins.json          where each of its values comes from
          metrics.jsonl         one row per logged step; metrics.superseded-<n>.jsonl: rows of a
                                future that a resumed run left
          samples/              step_000001.jsonl: the samples that step trained on
          eval/                 <set>_000001.jsonl: the samples of an evaluation
          mismatch/             step_000001.jsonl: the tokens that trainer and engine disagree on
                                most
          trace/                step_000001.json, eval_000001.json: what happened when, for
                                ui.perfetto.dev (--trace)
          checkpoints/          step_000001/
          engines/              engine_0.log: what an engine printed that the run started
          logs/                 trainer_rank_0.log: what a process of the cluster printed
          tensorboard/, wandb/  what those trackers write
          reward.png            the reward curve
          result.json           how the run ended
          evaluation.json       what an evaluation alone found, by set
          log.txt               what happened, with times

Whatever shows a run reads only this directory.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dovetail.types.errors import ConfigError

OUTPUTS = Path("outputs")
"""Default parent of run directories."""
_CONFIG, _ORIGINS, _RESULT = "config.toml", "origins.json", "result.json"
_EVALUATION = "evaluation.json"
_METRICS, _LOG, _REWARD_PNG = "metrics.jsonl", "log.txt", "reward.png"
_SAMPLES, _EVAL, _CHECKPOINTS = "samples", "eval", "checkpoints"
_TENSORBOARD, _WANDB, _TRACE, _MISMATCH = "tensorboard", "wandb", "trace", "mismatch"
_ENGINES, _LOGS = "engines", "logs"
_SUPERSEDED = "superseded"
_STEP_FILE = re.compile(r".+_(\d+)\.jsonl?")
_UNSAFE = re.compile(r"[^\w.\-]")


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths below one run directory. The directory itself exists; folders are made when written."""

    path: Path

    @classmethod
    def create(
        cls,
        run_name: str,
        run_dir: Path | str | None = None,
        resuming: bool = False,
        replace: bool = False,
    ) -> RunDir:
        """The directory for a run: `run_dir`, or else the first free `outputs/<run_name>[-n]`.

        With `resuming` an existing run is continued. With `replace` the files of an earlier run are
        removed (only those declared here); without either, a directory that holds a run is refused.

        Raises:
            ConfigError: it holds another run, is a file, or can't be made.
        """
        if run_dir is None:
            return cls(_first_free(OUTPUTS, run_name))
        path = Path(run_dir)
        own = cls(path)
        if own.holds_run() and replace and not resuming:
            own.clear()
        elif own.holds_run() and not resuming:
            raise ConfigError(
                f"{path} holds a run already. Choose another --run-dir (TOML: observe.run_dir), or "
                "continue "
                f"that run with --load {own.checkpoints} (TOML: checkpoint.load)"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the run directory {path} can't be made: {error.strerror}. "
                "Choose another --run-dir (TOML: observe.run_dir)"
            ) from error
        return own

    @classmethod
    def around(cls, path: Path | str) -> RunDir | None:
        """The run directory that `path` (e.g. one of its checkpoints) lies in, if there is one."""
        for parent in (Path(path), *Path(path).parents):
            if cls(parent).holds_run():
                return cls(parent)
        return None

    def holds_run(self) -> bool:
        """Whether a run was written here."""
        return self.config.is_file() or self.metrics.is_file()

    def clear(self) -> None:
        """Remove every file that a run writes; what else is in the directory stays."""
        for path in self._declared():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    @property
    def config(self) -> Path:
        """The resolved configuration, as TOML."""
        return self.path / _CONFIG

    @property
    def origins(self) -> Path:
        """Origin of each configuration value, as JSON."""
        return self.path / _ORIGINS

    @property
    def metrics(self) -> Path:
        """One JSON row per logged step."""
        return self.path / _METRICS

    @property
    def log(self) -> Path:
        """What happened, with times."""
        return self.path / _LOG

    @property
    def reward_png(self) -> Path:
        """The reward curve."""
        return self.path / _REWARD_PNG

    @property
    def result(self) -> Path:
        """How the run ended, as JSON."""
        return self.path / _RESULT

    @property
    def evaluation(self) -> Path:
        """What an evaluation alone found, as JSON."""
        return self.path / _EVALUATION

    @property
    def checkpoints(self) -> Path:
        """Default directory of checkpoints."""
        return self.path / _CHECKPOINTS

    @property
    def engines(self) -> Path:
        """What engines in other processes printed."""
        return self.path / _ENGINES

    @property
    def logs(self) -> Path:
        """What processes on a cluster printed."""
        return self.path / _LOGS

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.path / _TENSORBOARD

    @property
    def wandb(self) -> Path:
        """Weights & Biases files."""
        return self.path / _WANDB

    def samples(self, step: int) -> Path:
        """Samples that the step trained on."""
        return self.path / _SAMPLES / f"step_{step:06d}.jsonl"

    def eval_samples(self, name: str, step: int) -> Path:
        """Samples of the evaluation set `name`, evaluated when `step` steps were done."""
        return self.path / _EVAL / f"{_UNSAFE.sub('_', name)}_{step:06d}.jsonl"

    def trace(self, step: int) -> Path:
        """What happened when in the step."""
        return self.path / _TRACE / f"step_{step:06d}.json"

    def mismatch(self, step: int) -> Path:
        """The tokens of the step that trainer and engine disagree on most."""
        return self.path / _MISMATCH / f"step_{step:06d}.jsonl"

    def eval_trace(self, step: int) -> Path:
        """What happened when in the evaluation after `step` steps."""
        return self.path / _TRACE / f"eval_{step:06d}.json"

    def free_superseded_metrics(self) -> Path:
        """The first unused `metrics.superseded-<n>.jsonl`."""
        return self._free_superseded(self.metrics)

    def supersede_config(self, now: bytes) -> None:
        """Keep the configuration of an earlier start under another name, unless it is `now`."""
        if self.config.is_file() and self.config.read_bytes() != now:
            self.config.rename(self._free_superseded(self.config))

    def _free_superseded(self, path: Path) -> Path:
        number = 1
        while (
            aside := path.with_name(f"{path.stem}.{_SUPERSEDED}-{number}{path.suffix}")
        ).exists():
            number += 1
        return aside

    def supersede_samples(self, step: int) -> list[Path]:
        """Move samples and traces of `step` and later into a folder `superseded-<n>` beside them.

        Returns:
            The folders that files were moved to.
        """
        moved = []
        for folder in (self.path / name for name in (_SAMPLES, _EVAL, _TRACE, _MISMATCH)):
            later = [
                path
                for path in (sorted(folder.glob("*.json*")) if folder.is_dir() else [])
                if (match := _STEP_FILE.fullmatch(path.name)) and int(match[1]) >= step
            ]
            if not later:
                continue
            target = _first_free(folder, f"{_SUPERSEDED}-1", pattern=f"{_SUPERSEDED}-{{}}")
            for path in later:
                path.rename(target / path.name)
            moved.append(target)
        return moved

    def _declared(self) -> Iterator[Path]:
        names = (_CONFIG, _ORIGINS, _METRICS, _LOG, _REWARD_PNG, _RESULT, _EVALUATION)
        kept = (_SAMPLES, _EVAL, _CHECKPOINTS, _TRACE, _MISMATCH, _ENGINES, _LOGS)
        folders = (*kept, _TENSORBOARD, _WANDB)
        yield from (path for name in (*names, *folders) if (path := self.path / name).exists())
        yield from self.path.glob(f"*.{_SUPERSEDED}-*")


def checkpoints_at(path: Path | str) -> Path:
    """`path` itself, or where its checkpoints are when it is a run directory."""
    run_dir = RunDir(Path(path))
    return run_dir.checkpoints if run_dir.holds_run() else run_dir.path


def _first_free(parent: Path, name: str, pattern: str | None = None) -> Path:
    """Make and give the first of `name`, `name-2`, `name-3`, ... that does not exist.

    Raises:
        ConfigError: `parent` can't be written.
    """
    number = 1
    while True:
        path = parent / name
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
        except OSError as error:
            raise ConfigError(
                f"the directory {path} can't be made: {error.strerror}. "
                "Choose a place with --run-dir (TOML: observe.run_dir)"
            ) from error
        name = (
            pattern.format(number) if pattern else f"{name.removesuffix(f'-{number - 1}')}-{number}"
        )
