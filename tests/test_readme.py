"""README and REPRODUCE: code runs, commands can be given, links lead to files, numbers are those of the tables."""

import json
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest

from sat_lib import experiments
from sat_lib.__main__ import _parser
from sat_lib.common import files
from sat_lib.reproduce import documents

PAPER = files.ROOT / "figures/paper"
README = (files.ROOT / "README.md").read_text()
NOTEBOOKS = sorted(f"notebooks/{path.name}" for path in files.ROOT.glob("notebooks/*.ipynb"))
TEXTS = {name: (files.ROOT / name).read_text() for name in documents.DOCUMENTS}
COMMAND = re.compile(r"python -m sat_lib ([^`\n]+)|torchrun .* -m sat_lib ([^`\n]+)")
LINK = re.compile(r"\]\(([^)#\s]+)\)")


def commands(text: str) -> list[list[str]]:
    """The arguments of every `python -m sat_lib ...`, without the comment behind it."""
    found = ["".join(match.groups("")) for match in COMMAND.finditer(text)]
    return [shlex.split(line, comments=True) for line in found]


def written(path: Path) -> str:
    """The words of a document, or of a notebook's Markdown cells."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def span(values: pd.Series) -> str:
    return f"{values.min():.2f} to {values.max():.2f}"


# ---- code ------------------------------------------------------------------------------------------------------------


def test_the_code_of_the_readme_runs_from_top_to_bottom(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 3
    assert capsys.readouterr().out.splitlines() == [
        "3.1% of the map; out (2, 4, 1024, 64), gradient (2, 4, 1024, 64)",
        "sparse after step 2: 32 of 64 blocks in each layer",
    ]
    assert names["out"].shape == (2, 4, 1024, 64) and names["layout"].grid[:, 0].all()


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_can_be_given(name):
    given = commands(TEXTS[name])
    assert len(given) >= 5
    for arguments in given:
        try:
            options = vars(_parser().parse_args(arguments))
        except SystemExit as end:
            assert end.code == 0, f"{name}: python -m sat_lib {shlex.join(arguments)} is refused"
        else:
            assert options.get("experiment", "step") in experiments.EXPERIMENTS, arguments


@pytest.mark.parametrize("name", TEXTS)
def test_every_make_target_exists(name):
    targets = set(re.search(r"^\.PHONY: (.*)", (files.ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", TEXTS[name], re.MULTILINE))
    assert named and named <= targets


# ---- links, tables, numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*TEXTS, "data/README.md", *NOTEBOOKS])
def test_links_lead_to_files(path):
    links = [link for link in LINK.findall(written(files.ROOT / path)) if not link.startswith("http")]
    absent = [link for link in links if not (files.ROOT / path).parent.joinpath(link).exists()]
    assert not absent


def test_no_table_is_quoted_twice():
    quoted = [match[1] for text in TEXTS.values() for match in documents.QUOTED.findall(text)]
    assert len(quoted) == len(set(quoted)) >= 5


def test_the_readme_can_be_read_in_one_go():
    assert 120 <= len(README.splitlines()) <= 160


def test_numbers_in_sentences_are_those_of_the_tables():
    verdicts, steps = pd.read_csv(PAPER / "verdicts.csv"), pd.read_csv(PAPER / "09_finetuning_steps.csv")
    counts = verdicts["verdict"].value_counts()
    words = " ".join(README.split())
    bigbird = verdicts[verdicts["claim"].str.contains("a training step of BigBird")]
    alone = bigbird["ours"].str.extract(r"through SAT's kernel ([\d.]+)")[0].astype(float)
    published = bigbird["published"].str.extract(r"([\d.]+) times")[0].astype(float)
    sparse = steps[steps["attention"] == "sat, sparse phase"].set_index(["architecture", "length"])["time / sdpa"]
    dense = steps.loc[steps["attention"] == "sat, dense phase", "time / sdpa"]
    whole = pd.read_csv(PAPER / "04_step_time_table.csv").set_index("step of")["CIFAR-10 time / SAT's"]
    minutes = pd.read_csv(PAPER / "smoke.csv")["seconds"].sum() / 60
    for sentence in (
        f"Of {len(verdicts)} claims {counts['reproduced']} are reproduced (",
        f"), {counts['reproduced in direction']} in direction (",
        f"), {counts['not reproduced']} not (",
        f") and {counts['not run']} not run (",
        f"BigBird's step takes {span(alone)} times as long as SAT's; the published {span(published)} times",
        f"a step of the dense phase takes {span(dense)} times",
        f"BERT base takes {span(sparse['bert-base', 512])} times as long with 512 tokens",
        f"and {span(sparse['bert-base', 128])} times with 128",
        f"ViT base's with 197 takes {span(sparse['vit-base', 197])} times",
        f"a whole dense step takes {whole['dense']:.2f} times",
        f"figures/smoke: {minutes:.0f} minutes on 2 free cores",
    ):
        assert sentence in words
