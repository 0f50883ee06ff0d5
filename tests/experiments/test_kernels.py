"""The benchmarks of kernels and of whole steps: what is timed is what is meant, and rows can be drawn and tabled."""

from dataclasses import replace

import pytest
import torch

from sat_lib import experiments, figures
from sat_lib.__main__ import main
from sat_lib.attention import reference
from sat_lib.attention.layout import BlockLayout
from sat_lib.common import files
from sat_lib.experiments import kernels, row_files, step_time
from sat_lib.experiments.kernel_summary import kernel_summary
from sat_lib.figures import speed
from sat_lib.training.recipe import run_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]
CPU = torch.device("cpu")
SHAPE = {"batch": 2, "heads": 2, "length": 256, "head_size": 16, "block": 32, "density": 0.2, "dtype": "float32"}
SHAPE["tf32"] = None
MAIN = {"sweep": "main", **SHAPE}


def coarse_layout() -> BlockLayout:
    """8 x 8 blocks of 32 in groups of 2 x 2 that are all kept or all pruned; the last two block rows keep none."""
    coarse = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    return BlockLayout(coarse.repeat_interleave(2, 0).repeat_interleave(2, 1), 32)


@pytest.mark.parametrize("name", ["flex 32", "flex 64", "cusparse"])
def test_block_sparse_peers_are_attention_over_the_kept_keys(name):
    layout, tensors = coarse_layout(), kernels.qkv(MAIN, CPU, grad=False)
    attend = kernels.attention_of(name, layout, 4, 256)
    torch.testing.assert_close(attend(*tensors), reference.block_sparse_attention(*tensors, layout, pruned="drop"))


@pytest.mark.parametrize("name", ["fused", "three operations"])
def test_our_implementations_are_the_reference(name):
    layout, tensors = coarse_layout(), kernels.qkv(MAIN, CPU, grad=True)
    attend = kernels.attention_of(name, layout, 4, 256)
    expected = reference.block_sparse_attention(*tensors, layout)
    torch.testing.assert_close(attend(*tensors), expected)
    grads = [torch.autograd.grad(out, tensors, tensors[0].detach()) for out in (attend(*tensors), expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["materialised", "sdpa"])
def test_dense_peers_are_the_reference_of_a_full_layout(name):
    layout, tensors = BlockLayout.full(8, 8, 32), kernels.qkv(MAIN, CPU, grad=False)
    attend = kernels.attention_of(name, layout, 4, 256)
    torch.testing.assert_close(attend(*tensors), reference.block_sparse_attention(*tensors, layout))


def test_a_coarse_layout_keeps_every_kept_block():
    layout = kernels.block_layout(MAIN, CPU)
    coarse = kernels.coarsened(layout, 64)
    assert (coarse.block, coarse.rows) == (64, 4)
    assert bool((coarse.entries(256) >= layout.entries(256)).all()) and coarse.kept_blocks <= layout.kept_blocks
    assert kernels.coarsened(coarse_layout(), 64).kept_blocks == 6


@pytest.mark.parametrize("profile", row_files.PROFILES)
def test_cases_are_unique_and_name_an_implementation(profile):
    cases = kernels.kernel_cases(profile)
    digests = [files.digest(case) for case in cases]
    assert len(set(digests)) == len(digests)
    assert cases[0]["sweep"] == "copy"
    for case in cases:
        assert {"task", "bytes", "method"} & case.keys()
        assert (case.get("tf32") is not None) == (profile == "paper" and case.get("dtype") == "float32")


@pytest.mark.parametrize(
    "case",
    [
        {**MAIN, "method": "fused"},
        {**MAIN, "method": "sdpa"},
        {**MAIN, "method": "cusparse"},
        {**SHAPE, "sweep": "operations", "task": "cifar10"},
        {**SHAPE, "sweep": "statistics", "method": "kernel"},
        {**SHAPE, "sweep": "statistics", "method": "reference"},
        {"sweep": "copy", "bytes": 1024},
    ],
    ids=lambda case: f"{case['sweep']}-{case.get('method', '')}",
)
def test_every_kind_of_case_gives_positive_numbers(case):
    result = kernels.kernel_time(case, CPU)
    assert result.get("error") is None
    values = {name: value for name, value in result.items() if value is not None}
    assert all(value > 0 for value in values.values()), values
    assert ("forward_backward_ms" in values) == (case.get("method") in ("fused", "sdpa"))


def test_floors_count_each_tensor_once():
    result = kernels.kernel_time({**MAIN, "method": "sdpa"}, CPU)
    one = 2 * 2 * 256 * 16 * 4
    assert (result["floor_bytes_forward"], result["floor_bytes_backward"]) == (4 * one, 8 * one)


def test_operations_of_sat_are_those_of_its_kept_entries():
    case = {"batch": 2, "heads": 3, "length": 96, "head_size": 8, "block": 32, "density": 0.5}
    layout = kernels.block_layout(case, CPU)
    assert kernels.attention_operations(case, layout) == 2 * 3 * layout.kept_blocks * 32 * 32 * 33
    assert kernels.attention_operations(case, None) == 2 * 3 * 96 * 96 * 33


def failing(*_, **__):
    raise torch.OutOfMemoryError("too much\nsecond line")


def test_a_failing_peer_gets_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(kernels, "materialised_attention", failing)
    result = kernels.kernel_time({**MAIN, "method": "materialised"}, CPU)
    assert result["error"] == "OutOfMemoryError: too much" and result["forward_ms"] is None


class ForwardOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q):
        return q.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no valid configuration")


def test_a_peer_whose_backward_pass_fails_keeps_its_forward_time(monkeypatch):
    monkeypatch.setattr(kernels, "flex_on_blocks", lambda *_: lambda q, k, v: ForwardOnly.apply(q))
    result = kernels.kernel_time({**MAIN, "method": "flex 32"}, CPU)
    assert result["error"] == "RuntimeError: no valid configuration"
    assert result["forward_ms"] > 0 and result["forward_backward_ms"] is None


def test_our_own_errors_are_not_caught(monkeypatch):
    monkeypatch.setattr(kernels.ops, "block_sparse_attention", failing)
    with pytest.raises(torch.OutOfMemoryError):
        kernels.kernel_time({**MAIN, "method": "fused"}, CPU)


@pytest.mark.parametrize(("tf32", "wanted"), [(True, "tf32"), (False, "ieee"), (None, "ieee")])
def test_products_have_the_precision_of_the_case_which_is_put_back(monkeypatch, tf32, wanted):
    before, seen = torch.backends.cuda.matmul.fp32_precision, []

    def failing_copy(case, device):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(kernels, "copy_time", failing_copy)
    with pytest.raises(torch.OutOfMemoryError):
        kernels.kernel_time({"sweep": "copy", "bytes": 1024, "tf32": tf32}, CPU)
    assert (seen, torch.backends.cuda.matmul.fp32_precision) == ([wanted], before)


def small_cases(_profile):
    single = {**MAIN, "tf32": True}
    cases = [{"sweep": "copy", "bytes": 1024}, {**MAIN, "tf32": False, "method": "fused"}]
    cases += [{**single, "method": name} for name in ("fused", "sdpa", "flex 64", "cusparse")]
    return [*cases, {**SHAPE, "sweep": "operations", "task": "cifar10"}, {**cases[1], "sweep": "length"}]


def test_bench_prints_the_summary_and_the_table_says_what_is_faster(tmp_path, monkeypatch, capsys):
    made = replace(experiments.EXPERIMENTS["kernels"], cases=small_cases)
    monkeypatch.setitem(experiments.EXPERIMENTS, "kernels", made)
    monkeypatch.setattr(experiments.rows, "__kwdefaults__", experiments.rows.__kwdefaults__ | {"root": tmp_path})
    assert main(["bench", "kernels", "--profile", "paper", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "kernels 8/8" in printed and "sparse_softmax_backward" in printed and "TB/s" in printed
    names = ("main", "copy")
    rows = {name: experiments.rows("kernels", "paper", measure=False, only={"sweep": name}) for name in names}
    lines = kernel_summary(rows["main"], rows["copy"]["bandwidth_tb_s"][0])
    table = figures.to_markdown(speed.kernel_table(lines))
    assert "| fused | float32, TF32 |" in table and "| fused | float32 |" in table and "forward only" in table


def test_summary_compares_with_sdpa_and_the_best_flex_of_the_shape():
    times = {"fused": 2.0, "sdpa": 6.0, "flex 32": None, "flex 64": 5.0, "flex 128": 3.0}
    shape = {**MAIN, "forward_ms": 1.0, "floor_bytes_forward": 1e9, "floor_bytes_backward": 2e9, "error": None}
    rows = [{**shape, "method": name, "forward_backward_ms": time} for name, time in times.items()]
    rows += [{**rows[0], "sweep": "density", "density": 0.5}]
    lines = kernel_summary(figures.pd.DataFrame(rows), 2.0).set_index(["sweep", "method"])
    fused = lines.loc[("main", "fused")]
    assert (fused["forward x floor"], fused["forward + backward x floor"].round(3)) == (2.0, 1.333)
    assert (fused["sdpa"], fused["flex"]) == (3.0, 1.5)
    other = lines.loc[("density", "fused")]
    assert other["sdpa"] == 3.0 and figures.pd.isna(other["flex"])


# ---- whole steps -----------------------------------------------------------------------------------------------------


def test_a_step_of_the_preset_best_is_timed_in_the_sparse_phase_with_its_average(tmp_path, monkeypatch):
    timed, time_calls = [], step_time.timing.time_calls
    note = lambda step, *places, **settings: timed.append(step.func.__self__) or time_calls(step, *places, **settings)
    monkeypatch.setattr(step_time.timing, "time_calls", note)
    only = {"task": "cifar10", "preset": "best"}
    (row,) = experiments.rows("step", "smoke", device="cpu", only=only, root=tmp_path).itertuples()
    (trainer,) = timed
    best = run_config("cifar10", "sat", "best")
    assert trainer.config.model == best.model
    assert trainer.phase == "sparse"
    pairs = zip(trainer.evaluated.parameters(), trainer.model.parameters(), strict=True)
    apart = [not torch.equal(average, trained) for average, trained in pairs]
    assert sum(apart) > len(apart) / 2, "the average isn't taken in the step"  # it began with the same weights
    assert {layout.density for layout in trainer.model.layouts} == {row.density} == {best.recipe.density}
    assert 0 < row.low_ms <= row.median_ms
