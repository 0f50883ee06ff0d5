"""The command line: python -m sat_lib demo | data | train | sweep | pretrain | bench | reproduce."""

import argparse
import ast
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .common import files
from .common.errors import InputError, require


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status: 0, 1 (a stage failed), 2 (input to mend), 3 (training stopped)."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: threads that spin for long take a busy CPU's cores
    try:
        return options.run(options)
    except (InputError, OSError) as error:
        print(f"sat_lib: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m sat_lib", description="SAT, the sparsity-aware Transformer.")
    names = "demo | data | train | sweep | pretrain | bench | reproduce"
    commands = parser.add_subparsers(required=True, metavar=names)
    commands.add_parser("demo", help="see SAT work in a minute: no GPU, no download").set_defaults(run=_demo)
    _data_options(commands.add_parser("data", help="list the tasks, prepare a task's token cache"))
    _train_options(commands.add_parser("train", help="train one model, or go on where an earlier run stopped"))
    _sweep_options(commands.add_parser("sweep", help="measure an experiment in jobs: SLURM, or many at a time here"))
    _pretrain_options(commands.add_parser("pretrain", help="train the small ViT that data/pretrained ships"))
    _bench_options(commands.add_parser("bench", help="measure an experiment's rows and print them"))
    _reproduce_options(commands.add_parser("reproduce", help="run the notebooks; draw the figures"))
    return parser


# ---- demo ------------------------------------------------------------------------------------------------------------


def _demo(options) -> int:
    print("SAT in about a minute, on the CPU. Loading PyTorch and making the data ...", flush=True)
    try:
        from . import datasets
        from .experiments.demo import demo, demo_config

        config = demo_config()
        demo(config, datasets.load(config.recipe.task), files.ROOT / "runs" / "demo")
    except KeyboardInterrupt:
        print("\nstopped; the demo begins anew each time", file=sys.stderr)
        return 130
    return 0


# ---- data ------------------------------------------------------------------------------------------------------------


def _data_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="list | prepare")
    listing = actions.add_parser("list", help="tasks, their sizes, and which are ready")
    listing.set_defaults(run=_data_list)
    prepare = actions.add_parser("prepare", help="download (or take from --source) and cache a task's tokens")
    prepare.add_argument("task")
    prepare.add_argument("--source", type=Path, help="folder with the official files, instead of downloading them")
    prepare.set_defaults(run=_data_prepare)


def _data_list(options) -> int:
    from . import datasets
    from .datasets import pairs

    for row in [*datasets.describe(), pairs.describe()]:
        splits = ", ".join(f"{name} {count:,}" for name, count in (row["splits"] or {}).items())
        length = f"L {row['length']:5}" if "length" in row else ""  # pairs are cut by the tokenizer
        print(f"{row['name']:12} {row['kind']:8} {length:7} {row['classes']:3} classes  {row['state']:12} {splits}")
    return 0


def _data_prepare(options) -> int:
    from . import datasets
    from .datasets import pairs

    name, source = options.task, options.source
    folder = pairs.prepare_mrpc(source) if name == "mrpc" else datasets.prepare(name, source=source)
    print(f"{name} is ready in {folder}")
    return 0


# ---- train -----------------------------------------------------------------------------------------------------------


def _train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", help="see: python -m sat_lib data list")
    parser.add_argument("--attention", default="sat", help="dense, longformer, bigbird, lsg or sat (default)")
    parser.add_argument(
        "--preset",
        default="released",
        help="released (default), continued: the schedule goes on, or best: what the ablations led to",
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="recipe fields: steps=500 seed=1")
    parser.add_argument("--model", nargs="*", default=[], metavar="NAME=VALUE", help="model fields: block=64 layers=1")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1")
    parser.add_argument("--step", default="auto", help="auto (default: fast on a GPU that it is made for), fast, plain")
    parser.add_argument("--folder", type=Path, help="the run's folder (default: runs/train/<name of the run>)")
    parser.set_defaults(run=_train)


def _train(options) -> int:
    from . import datasets
    from .common import distributed
    from .common.device import device_name, pick_device
    from .training.fit import NonFiniteLoss, fit
    from .training.recipe import run_config

    config = run_config(
        options.task, options.attention, options.preset, model=_settings(options.model), **_settings(options.set)
    )
    folder = options.folder or files.ROOT / "runs" / "train" / config.name
    with distributed.joined(pick_device(options.device)) as device:
        first = distributed.rank() == 0
        data = distributed.first_alone(lambda: datasets.load(options.task, protocol=config.recipe.protocol))
        if first:
            where = f"{distributed.size()} x {device_name(device)}"
            print(f"{config.name} on {where}: {len(data.train):,} training examples, in {folder}")
        try:
            result = fit(config, data, folder, device, step=options.step)
        except NonFiniteLoss as error:
            print(f"sat_lib: {error}", file=sys.stderr)
            return 3
        return _tell(result) if first else 0


def _tell(result: dict) -> int:
    because = f" ({result['why_plain']})" if result["why_plain"] else ""
    print(f"{result['step']} steps{because}")
    switched = result["transition_step"]
    print(f"transition: {'none' if switched is None else f'step {switched}'}; judged in the {result['phase']} phase")
    for phase, best in result["best"].items():
        reached = f"dev {best['dev_accuracy']:.4f}, test {best['test_accuracy']:.4f} of {best['test_examples']:,}"
        print(f"best of the {phase} phase: step {best['step']}, {reached}")
    return 0


def _settings(pairs: list[str]) -> dict:
    """["steps=500", "precision=fp32"] -> {"steps": 500, "precision": "fp32"}."""
    settings = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        require(name and value, f"settings: wanted NAME=VALUE; got {pair!r}")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    return settings


# ---- sweep -----------------------------------------------------------------------------------------------------------


def _sweep_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="accuracy, ablations, training, finetuning, ...: as in bench")
    parser.add_argument("--profile", default="smoke", help="smoke (default) or paper; paper rows go to data/results")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME=VALUE", help="cases with these values alone")
    parser.add_argument("--cluster", default="slurm", help="slurm (default), local: this machine, debug: this process")
    parser.add_argument("--processes", type=int, default=1, help="that train one model together, one GPU each")
    parser.add_argument("--parallel", type=int, help="jobs at a time (local: one, or what the GPUs allow)")
    parser.add_argument("--device", default="auto", help="auto (default; under SLURM cuda), cpu, cuda")
    parser.add_argument("--slurm", nargs="*", default=[], metavar="NAME=VALUE", help="partition=gpu time=120 mem=64")
    parser.add_argument("--no-wait", action="store_true", help="leave the jobs to SLURM")
    parser.set_defaults(run=_sweep)


def _sweep(options) -> int:
    from .experiments.sweep import Launch, sweep

    slurm, only = _settings(options.slurm), _settings(options.only)
    launch = Launch(options.cluster, options.processes, options.parallel, slurm, wait=not options.no_wait)
    return sweep(options.experiment, options.profile, launch, device=options.device, only=only)


# ---- pretrain --------------------------------------------------------------------------------------------------------


def _pretrain_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of Pretraining: epochs=50")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1")
    parser.add_argument("--folder", type=Path, default=files.ROOT / "data/pretrained/cifar-vit", help="where it goes")
    parser.set_defaults(run=_pretrain)


def _pretrain(options) -> int:
    from .common.device import device_name, pick_device
    from .pretrained import cifar_vit

    settings, device = cifar_vit.Pretraining(**_settings(options.set)), pick_device(options.device)
    work = files.ROOT / "runs" / "pretrain" / options.folder.name
    print(f"{settings} on {device_name(device)}, in {work}")
    result = cifar_vit.pretrain(settings, options.folder, work, device)
    print(f"test accuracy {result['test_accuracy']:.2%}; written to {options.folder}")
    return 0


# ---- bench -----------------------------------------------------------------------------------------------------------


def _bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="attention, kernels, step, training, motivation, finetuning, ...")
    parser.add_argument("--profile", default="smoke", help="smoke (default) or paper; paper rows go to data/results")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME=VALUE", help="cases with these values alone")
    parser.add_argument("--again", action="store_true", help="measure cases that have a row too: the new row counts")
    parser.set_defaults(run=_bench)


def _bench(options) -> int:
    from . import experiments
    from .common import distributed
    from .common.device import pick_device

    with distributed.joined(pick_device(options.device)) as device:
        first = distributed.rank() == 0
        measured = partial(experiments.rows, options.experiment, options.profile, device=str(device), report=first)
        rows = measured(only=_settings(options.only), again=options.again)
        if first:
            print(experiments.EXPERIMENTS[options.experiment].show(rows, measured))
    return 0


# ---- reproduce -------------------------------------------------------------------------------------------------------


def _reproduce_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stages", nargs="*", help="names or beginnings of names, such as 03; default: all")
    parser.add_argument("--profile", help="smoke (default): on a laptop; paper: GPU and real data")
    parser.add_argument("--force", action="store_true", help="run stages that are up to date too")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and why")
    drawing = "measure nothing, draw the rows that are there (profile: paper, unless told)"
    parser.add_argument("--figures-only", action="store_true", help=drawing)
    parser.add_argument("--record", action="store_true", help="append the stages' times to data/results")
    parser.set_defaults(run=_reproduce)


def _reproduce(options) -> int:
    from .reproduce import run
    from .reproduce.documents import DOCUMENTS, quote

    nothing = options.dry_run or options.figures_only
    require(not (options.record and nothing), "record: wanted a run that measures. Leave --record or the other option")
    how = {"force": options.force, "dry_run": options.dry_run, "draw_only": options.figures_only}
    profile = options.profile or ("paper" if options.figures_only else "smoke")
    status = run(profile, tuple(options.stages), **how)
    if options.figures_only and not options.dry_run and status == 0:
        for name in DOCUMENTS:
            quote(files.ROOT / name, files.ROOT)
    if options.record and status == 0:
        summary = json.loads((files.ROOT / "figures" / profile / "summary.json").read_text())
        absent = [row["stage"] for row in summary["stages"] if row["written"].startswith("nothing")]
        way_out = "Run the same command without naming stages"
        require(not absent, f"record: wanted the times of all stages; got none of {', '.join(absent)}. {way_out}")
        files.append_row(files.ROOT / "data" / "results" / f"{profile}.jsonl", summary)
    return status


if __name__ == "__main__":
    sys.exit(main())
