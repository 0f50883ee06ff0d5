"""A training run and its folder: fit to the end or resume, checkpoints, metrics, the result.

    config.json      the configuration          metrics.jsonl   a line per step or evaluation
    last.pt          to resume from             best-dense.pt, best-sparse.pt   highest dev accuracy of each phase
    step-000050.pt   a snapshot: the model before step 50, where `fit` was asked for it; best-*.pt hold the same, or
                     with `average` in the recipe the averaged weights
    result.json      written last: the run is finished

Runs that are forced to switch, and are alike until then, may share their dense phase: see `fit`, `shared`.
"""

import contextlib
import hashlib
import io
import json
import math
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from ..attention.layout import BlockLayout
from ..common import distributed, files
from ..common.device import stamp
from ..common.errors import InputError, require
from ..datasets.batches import batch_indices
from ..datasets.cache import Splits
from ..model.encoder import Encoder
from ..model.fused import fuse
from .recipe import RunConfig, check_same_config, config_from_dict, dense_phase
from .trainer import Trainer

CHECKPOINT_SECONDS = 30
LOOK_EVERY = 20  # steps between looks at the losses where nothing else needs them: each look waits for the GPU


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; nonfinite.json in the run's folder has the step and the batch's indices."""


def fit(
    config: RunConfig,
    data: Splits,
    folder: Path,
    device: torch.device,
    *,
    progress: bool = True,
    stop_at: int | None = None,
    snapshots: tuple[int, ...] = (),
    step: str = "auto",
    shared: Path | None = None,
) -> dict | None:
    """Train to the end, or go on where an earlier process stopped; a finished run is read, not repeated.

    Processes that were joined (see `distributed`) all call this, with a folder that all of them can read; process 0
    writes. Another number of processes may go on with a run.

    Args:
        folder: the run's own folder, made if need be. stop_at: save and return None at this step. snapshots: keep the
            model as it is after so many steps (0: before the first) in files of their own, see `snapshot_path`.
        step: "auto", "fast" or "plain", see `trainer.Trainer`.
        shared: a folder of dense phases. A run of SAT that is forced to switch (`switch_at`) begins where another with
            the same dense phase, kind of step and of device was before the step of its transition, and the first such
            run leaves that there. It ends as it would by itself, random numbers included; its seconds count the shared
            steps too. For one process, without `stop_at` and `snapshots`.

    Returns:
        The content of result.json.

    Raises:
        InputError: the folder holds another configuration, another process trains in it, or a snapshot is wanted of a
            step that the run doesn't have or went past without it.
        NonFiniteLoss: see there; the last checkpoint is from before.
        OSError: a checkpoint could not be written; the one before is whole.
    """
    folder = Path(folder)
    alone = shared is None or (stop_at is None and not snapshots and distributed.size() == 1)
    require(alone, "shared: wanted a whole run of one process, without stop_at and snapshots. Leave it out")
    beyond = [step for step in snapshots if not 0 <= step <= config.recipe.steps]
    require(not beyond, f"snapshots: wanted steps from 0 to {config.recipe.steps}; got {beyond}")
    with contextlib.ExitStack() as stack:
        if distributed.rank() == 0:
            stack.enter_context(files.lock(folder / "lock", f"training in {folder}"))
            if (folder / "config.json").exists():
                check_same_config(json.loads((folder / "config.json").read_text()), config)
            else:
                files.write_json(folder / "config.json", config.as_dict())
        finished = folder / "result.json"
        result = distributed.from_first(json.loads(finished.read_text()) if finished.exists() else None)
        if result is not None:
            _check_snapshots(folder, snapshots)
            return result
        sat, at = config.model.attention == "sat", config.recipe.switch_at
        forced = sat and at is not None and at < config.recipe.steps
        if shared is not None and forced and not (folder / "last.pt").exists():
            _begin_with_shared(config, data, folder, device, step, shared)
        run = _Run(config, data, folder, device, step)
        _check_snapshots(folder, [step for step in snapshots if step < run.trainer.step])
        bar = stack.enter_context(tqdm(**run.bar_settings(progress and distributed.rank() == 0)))
        while run.trainer.step < config.recipe.steps:
            if run.trainer.step in snapshots:
                run.save_model(snapshot_path(folder, run.trainer.step), run.trainer.model)
            if run.trainer.step == stop_at:
                run.save(bar)
                return None
            run.advance(bar)
        if config.recipe.steps in snapshots:
            run.save_model(snapshot_path(folder, config.recipe.steps), run.trainer.model)
        return run.finish()


def _begin_with_shared(
    config: RunConfig, data: Splits, folder: Path, device: torch.device, step: str, shared: Path
) -> None:
    """Put the checkpoint before the transition into a run's folder, with the metrics and best model until then."""
    dense = dense_phase(config)
    phases, at = Path(shared) / f"{dense.name}-{device.type}-{step}", config.recipe.switch_at
    source = phases / f"before-{at:06}"
    with files.lock(phases / "lock", f"training in {phases}", wait=True, quiet=True):
        if not source.exists():
            work, earlier = phases / "work", [path for path in phases.glob("before-*") if path.name < source.name]
            shutil.rmtree(work, ignore_errors=True)
            if earlier:
                shutil.copytree(max(earlier), work)
            fit(dense, data, work, device, progress=False, stop_at=at, step=step)
            work.rename(source)
    if (source / "best-dense.pt").exists():
        best = load_checkpoint(source / "best-dense.pt", torch.device("cpu"))
        save_checkpoint(folder / "best-dense.pt", best | {"config": config.as_dict()})
    shutil.copyfile(source / "metrics.jsonl", folder / "metrics.jsonl")
    state = load_checkpoint(source / "last.pt", torch.device("cpu"))
    state["trainer"]["config"] = config.as_dict()
    save_checkpoint(folder / "last.pt", state)  # last: it says that the others are there


def snapshot_path(folder: Path, step: int) -> Path:
    """Where the snapshot of a step lies in a run's folder."""
    return Path(folder) / f"step-{step:06}.pt"


def _check_snapshots(folder: Path, steps: Iterable[int]) -> None:
    missing = [step for step in steps if not snapshot_path(folder, step).exists()]
    require(
        not missing,
        f"snapshots: the run in {folder} went past the steps {missing} without keeping them. Leave them out, or delete "
        "that folder to train again",
    )


class _Run:
    """A trainer with its folder. Of several processes, process 0 writes."""

    def __init__(self, config: RunConfig, data: Splits, folder: Path, device: torch.device, step: str):
        self.config, self.data, self.folder, self.device = config, data, folder, device
        self.writes = distributed.rank() == 0
        self.trainer = Trainer(config, data, device, step)
        self.best: dict[str, dict] = {}
        self.seconds = {"dense": 0.0, "sparse": 0.0}
        if distributed.from_first((folder / "last.pt").exists()):
            state = load_checkpoint(folder / "last.pt", device)
            self.trainer.load_state_dict(state["trainer"])
            self.best, self.seconds = state["best"], state["seconds"]
            steps = distributed.gathered(self.trainer.step)
            require(len(set(steps)) == 1, f"checkpoint: the processes found several in {folder}, of the steps {steps}")
        self.metrics = folder / "metrics.jsonl"
        if self.writes:
            self._forget_metrics_after(self.trainer.step)
        self.pending: list[dict] = []
        self.saved_at = time.monotonic()

    def bar_settings(self, progress: bool) -> dict:
        return {
            "total": self.config.recipe.steps,
            "initial": self.trainer.step,
            "desc": self.config.name,
            "unit": "step",
            "disable": not progress,
            "mininterval": 0.2 if sys.stderr.isatty() else 2.0,
            "dynamic_ncols": True,
        }

    def advance(self, bar: tqdm) -> None:
        """One step with its metrics; evaluation and checkpoint when they are due."""
        recipe, start, phase = self.config.recipe, time.perf_counter(), self.trainer.phase
        self.pending.append(self.trainer.train_step())
        due = self.trainer.step % recipe.eval_every == 0 or self.trainer.step == recipe.steps
        switched = self.trainer.transition_step == self.trainer.step - 1
        looks = due or switched or len(self.pending) >= LOOK_EVERY
        if looks:
            self.flush(bar)
        self.seconds[phase] += time.perf_counter() - start
        bar.update()
        if due:
            self.evaluate()
        if due or switched or ((looks or distributed.size() == 1) and self._late()):
            self.save(bar)

    def _late(self) -> bool:
        """Whether a checkpoint is due by the clock, process 0's."""
        return distributed.from_first(time.monotonic() - self.saved_at > CHECKPOINT_SECONDS)

    def flush(self, bar: tqdm) -> None:
        """Look at the pending losses, stop at one that isn't finite, write the lines."""
        for record in self.pending:
            for name in ("loss", "sparsity_loss"):
                if name in record:
                    record[name] = float(record[name])
            if not math.isfinite(record["loss"] + record.get("sparsity_loss", 0.0)):
                self._stop_at_non_finite(record)
        self._write_metrics(self.pending)
        if self.pending:
            bar.set_postfix(_bar_text(self.pending[-1]), refresh=False)
        self.pending = []

    def _write_metrics(self, records: list[dict]) -> None:
        if self.writes:
            with self.metrics.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def _stop_at_non_finite(self, record: dict) -> None:
        recipe, step = self.config.recipe, record["step"]
        indices = batch_indices(len(self.data.train), recipe.batch, step, recipe.seed).tolist()
        report = {"step": step, "phase": record["phase"], "loss": str(record["loss"]), "batch_indices": indices}
        if self.writes:
            files.write_json(self.folder / "nonfinite.json", report)
        raise NonFiniteLoss(
            f"the loss became {record['loss']} at step {step} ({record['phase']} phase). The batch's indices are in "
            f"{self.folder / 'nonfinite.json'}; the last checkpoint is from before. Lower the rate or look at the batch"
        )

    def evaluate(self) -> None:
        """Dev accuracy; the best of each phase is kept with the layouts it was reached under."""
        score, trainer = self.trainer.evaluate(self.data.dev), self.trainer
        trainer.note_dev_loss(score.loss)
        record = {"step": trainer.step, "phase": trainer.phase, "dev_accuracy": score.accuracy, "dev_loss": score.loss}
        self._write_metrics([record])
        if score.accuracy > self.best.get(trainer.phase, {"dev_accuracy": -1})["dev_accuracy"]:
            self.best[trainer.phase] = {"step": trainer.step, "dev_accuracy": score.accuracy}
            self.save_model(self.folder / f"best-{trainer.phase}.pt", trainer.evaluated)

    def save_model(self, path: Path, model: Encoder) -> None:
        """What `load_model` needs, and the step."""
        state = self.trainer.state_dict() | {"model": model.state_dict()}
        self._save(path, {name: state[name] for name in ("config", "step", "model", "grids")})

    def save(self, bar: tqdm) -> None:
        self.flush(bar)
        state = {"trainer": self.trainer.state_dict(), "best": self.best, "seconds": self.seconds}
        self._save(self.folder / "last.pt", state)
        self.saved_at = time.monotonic()

    def _save(self, path: Path, state: dict) -> None:
        """All processes wait until the file is there."""
        if self.writes:
            save_checkpoint(path, state)
        distributed.barrier()

    def _forget_metrics_after(self, step: int) -> None:
        """Drop lines of steps that the checkpoint doesn't know: they will be run again."""
        rows = files.read_rows(self.metrics)
        kept = [row for row in rows if row["step"] < step or (row["step"] == step and "dev_accuracy" in row)]
        files.write(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))

    def finish(self) -> dict:
        """Test the best checkpoint of each phase in that phase, and write result.json."""
        by_process = distributed.gathered(self._outcome())
        self.trainer.average = None  # where there was one, the best checkpoints hold it
        for phase, best in self.best.items():
            self.trainer.model = load_model(self.folder / f"best-{phase}.pt", self.device)
            if self.trainer.fast:  # the dev split, which chose it, was scored that way
                fuse(self.trainer.model, compiled=False)
            score = self.trainer.evaluate(self.data.test)
            best |= {"test_accuracy": score.accuracy, "test_loss": score.loss, "test_examples": score.examples}
        trainer, phase = self.trainer, "sparse" if "sparse" in self.best else "dense"
        result = {
            "config": self.config.as_dict(),
            "phase": phase,
            "test_accuracy": self.best[phase]["test_accuracy"],
            "best": self.best,
            "transition_step": trainer.transition_step,
            "parameters": trainer.model.parameter_count(),
            "maps": {name: value.tolist() for name, value in trainer.maps.items()},
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "step": "fast" if trainer.fast else "plain",
            "why_plain": trainer.why_plain,
            "processes": distributed.size(),
            "by_process": by_process,
            "stamp": stamp(self.device),
        }
        if self.writes:
            files.write_json(self.folder / "result.json", result)
        return distributed.from_first(result)

    def _outcome(self) -> dict:
        """What this process has come to: the same in all, or they weren't training one model."""
        layouts = self.trainer.model.layouts
        return {
            "transition_step": self.trainer.transition_step,
            "layouts": None if layouts is None else _digest(layout.grid for layout in layouts),
            "weights": _digest(self.trainer.model.state_dict().values()),
            "evaluated": _digest(self.trainer.evaluated.state_dict().values()),
        }


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    """Of all their bits."""
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return content.hexdigest()[:16]


def _bar_text(record: dict) -> dict:
    shown = {"phase": record["phase"], "loss": f"{record['loss']:.3f}"}
    for name in ("skewness", "distance"):
        values = [value for value in record.get(name, []) if value is not None]
        if values:
            shown[name] = f"{min(values):.2f}" if name == "skewness" else f"{max(values):.3f}"
    return shown


def save_checkpoint(path: Path, state: dict) -> None:
    """Save whole or not at all (see files.atomic_path). A full disk is an OSError, and the file before stays."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files.write(path, buffer.getvalue())


def load_checkpoint(path: Path, device: torch.device) -> dict:
    """Read a checkpoint; its tensors come on `device`.

    Raises:
        InputError: it is absent, cut off or not a checkpoint.
    """
    require(Path(path).exists(), f"checkpoint: {path} doesn't exist. Train first: python -m sat_lib train --help")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise InputError(
            f"checkpoint: {path} can't be read ({type(error).__name__} {str(error).partition(chr(10))[0]}). "
            "Delete it to train this run again"
        ) from error


def load_model(path: Path, device: torch.device) -> Encoder:
    """The model of a best-*.pt or step-*.pt, in the phase it was saved in: dense, or sparse under its own layouts."""
    state = load_checkpoint(path, device)
    config = config_from_dict(state["config"]).model
    model = Encoder(config).to(device)
    if state["grids"] is not None:
        model.enter_sparse_phase([BlockLayout(grid, config.block) for grid in state["grids"]])
    model.load_state_dict(state["model"])
    return model.eval()
