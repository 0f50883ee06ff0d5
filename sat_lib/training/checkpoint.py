"""Files of a training run: written whole or not at all, read with an error that says what to do."""

import io
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..attention.layout import BlockLayout
from ..common import distributed, files
from ..common.errors import InputError, require
from ..model.encoder import Encoder, ModelConfig
from .recipe import Recipe, RunConfig


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
    """The model of a best-*.pt or step-*.pt, in the phase it was saved in: dense, or sparse under its own layouts.

    Raises:
        InputError: see `load_checkpoint`; or it is another file than one of these, or of another version.
    """
    state = load_checkpoint(path, device)
    check_parts(state, ("config", "step", "model", "grids"))
    config = config_from_dict(state["config"]).model
    model = Encoder(config).to(device)
    if state["grids"] is not None:
        model.enter_sparse_phase([BlockLayout(grid, config.block) for grid in state["grids"]])
    model.load_state_dict(state["model"])
    return model.eval()


def generator_states(device: torch.device) -> list[list[Tensor]]:
    """Of each process the states of its random generators: the CPU's, and the GPU's where the device is one."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return distributed.gathered([torch.get_rng_state(), *cuda])


def restore_generators(states: list[list[Tensor]], device: torch.device, seed: int) -> None:
    """Go on with `generator_states`; another number of processes goes on with draws of its own, by the seed."""
    if len(states) != distributed.size():
        torch.manual_seed(seed + 1_000_003 * (distributed.rank() + 1))
        return
    cpu, *cuda = states[distributed.rank()]
    torch.set_rng_state(cpu.cpu())
    if device.type == "cuda" and cuda:
        torch.cuda.set_rng_state(cuda[0].cpu(), device)


def check_parts(state: dict, wanted: Iterable[str]) -> None:
    """Raise InputError unless what a checkpoint held is a dictionary of exactly these parts."""
    got, wanted = sorted(state) if isinstance(state, dict) else type(state).__name__, sorted(wanted)
    require(
        got == wanted,
        f"checkpoint: wanted one of this version of sat_lib, with {wanted}; got {got}. "
        "Take another file, or delete it to train this run again",
    )


def config_from_dict(values: dict) -> RunConfig:
    """Rebuild a configuration from `RunConfig.as_dict`.

    Raises:
        InputError: other fields than this version's.
    """
    kinds = {"model": ModelConfig, "recipe": Recipe}
    for part, kind in kinds.items():
        differing = sorted(set(values.get(part, ())) ^ set(kind.__dataclass_fields__))
        require(
            not differing,
            f"configuration: wanted a {part} with the fields of this version of sat_lib; it differs in {differing}. "
            "Delete what was saved to train this run again",
        )
    return RunConfig(**{part: kind(**values[part]) for part, kind in kinds.items()})


def check_same_config(saved: dict, config: RunConfig) -> None:
    """Raise InputError, naming every field that differs, unless `saved` is `config` as a dictionary."""
    wanted, saved = config.as_dict(), config_from_dict(saved).as_dict()
    differing = [
        f"{part}.{name}: saved {saved[part][name]!r}, wanted {value!r}"
        for part in wanted
        for name, value in wanted[part].items()
        if saved[part][name] != value
    ]
    require(
        not differing,
        "checkpoint: it belongs to another configuration (" + "; ".join(differing) + "). "
        "Use the same settings, or another folder for this run",
    )
