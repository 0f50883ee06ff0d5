"""A training run and its folder: fit to the end or resume, checkpoints, metrics, the result.

config.json      the configuration          metrics.jsonl   a line per step or evaluation
last.pt          to resume from             best-dense.pt, best-sparse.pt   highest dev accuracy of each phase
step-000050.pt   a snapshot: the model before step 50, where `fit` was asked for it; best-*.pt hold the same, or
                 with `average` in the recipe the averaged weights
result.json      written last: the run is finished
"""

import contextlib
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from ..common import distributed, files
from ..common.device import stamp
from ..common.errors import require
from ..datasets.batches import batch_indices
from ..datasets.cache import Splits
from ..model.encoder import Encoder
from ..model.fused import fuse
from .checkpoint import check_parts, check_same_config, load_checkpoint, load_model, save_checkpoint
from .recipe import RunConfig
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
) -> dict | None:
    """Train to the end, or go on where an earlier process stopped; a finished run is read, not repeated.

    Processes that were joined (see `distributed`) all call this, with a folder that all of them can read; process 0
    writes. Another number of processes may go on with a run.

    Args:
        folder: the run's own folder, made if need be. stop_at: save and return None at this step. snapshots: keep the
            model as it is after so many steps (0: before the first) in files of their own, see `snapshot_path`.
        step: "auto", "fast" or "plain", see `trainer.Trainer`.

    Returns:
        The content of result.json.

    Raises:
        InputError: the folder holds another configuration, another process trains in it, or a snapshot is wanted of a
            step that the run doesn't have or went past without it.
        NonFiniteLoss: see there; the last checkpoint is from before.
        OSError: a checkpoint could not be written; the one before is whole.
    """
    folder = Path(folder)
    beyond = [step for step in snapshots if not 0 <= step <= config.recipe.steps]
    require(not beyond, f"snapshots: wanted steps from 0 to {config.recipe.steps}; got {beyond}")
    with contextlib.ExitStack() as stack:
        if distributed.rank() == 0:
            stack.enter_context(own_folder(folder, config))
        finished = folder / "result.json"
        result = distributed.from_first(json.loads(finished.read_text()) if finished.exists() else None)
        if result is not None:
            _check_snapshots(folder, snapshots)
            return result
        run = _Run(config, data, folder, device, step)
        _check_snapshots(folder, [step for step in snapshots if step < run.trainer.step])
        bar = tqdm(
            total=config.recipe.steps,
            initial=run.trainer.step,
            desc=config.name,
            unit="step",
            disable=not (progress and run.writes),
            mininterval=0.2 if sys.stderr.isatty() else 2.0,
            dynamic_ncols=True,
        )
        stack.enter_context(bar)
        while True:
            done = run.trainer.step
            if done in snapshots:
                run.save_model(snapshot_path(folder, done), run.trainer.model)  # as trained, whatever is evaluated
            if done == config.recipe.steps:
                return run.finish()
            if done == stop_at:
                run.save(bar)
                return None
            run.advance(bar)


@contextlib.contextmanager
def own_folder(folder: Path, config: RunConfig) -> Iterator[None]:
    """Hold a run's folder, made if need be: no other process trains in it.

    Raises:
        InputError: another process holds it, or it holds another configuration.
    """
    with files.lock(folder / "lock", f"training in {folder}"):
        if (folder / "config.json").exists():
            check_same_config(json.loads((folder / "config.json").read_text()), config)
        else:
            files.write_json(folder / "config.json", config.as_dict())
        yield


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
            check_parts(state, ("trainer", "best", "seconds"))
            self.trainer.load_state_dict(state["trainer"])
            self.best, self.seconds = state["best"], state["seconds"]
            steps = distributed.gathered(self.trainer.step)
            require(len(set(steps)) == 1, f"checkpoint: the processes found several in {folder}, of the steps {steps}")
        self.metrics = folder / "metrics.jsonl"
        if self.writes:
            self._forget_metrics_after(self.trainer.step)
        self.pending: list[dict] = []
        self.saved_at = time.monotonic()

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
        late = time.monotonic() - self.saved_at > CHECKPOINT_SECONDS  # by process 0's clock
        if due or switched or ((looks or distributed.size() == 1) and distributed.from_first(late)):
            self.save(bar)

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
