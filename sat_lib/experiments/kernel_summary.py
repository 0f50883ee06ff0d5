"""The kernels' times beside their floors and their peers, as the command line prints them; see `kernels`."""

import pandas as pd

from .row_files import More, table

SHAPE = ["batch", "heads", "length", "head_size", "dtype", "tf32"]  # what dense attention depends on
PLACE = [*SHAPE, "block", "density"]
MEASURED = ["forward_ms", "forward_backward_ms", "floor_bytes_forward", "floor_bytes_backward"]
TYPES = {"method": str, **dict.fromkeys(MEASURED, float)}
TYPES |= dict.fromkeys(["batch", "heads", "length", "head_size", "block"], "Int64")


def show(rows: pd.DataFrame, more: More) -> str:
    """`kernel_summary`, the floors from the measured copy."""
    copy = more(only={"sweep": "copy"}).iloc[0]
    bandwidth = copy["bandwidth_tb_s"]
    lines = kernel_summary(rows, bandwidth).dropna(axis=1, how="all")
    shown = f"{lines.to_string(index=False, na_rep='-', float_format='%.3g')}\n" if len(lines) else ""
    return (
        f"{shown}copy on {copy['device']}: {bandwidth:.3g} TB/s, read and written; floors are bytes at that bandwidth\n"
        "sdpa, flex: how many times as long they take as this line, forward + backward; flex at its best block size"
    )


def show_attention(rows: pd.DataFrame, more: More) -> str:
    """The rows, and where both are there how many times as long dense attention takes."""
    told, times = table(rows), rows.set_index("method")["forward_backward_ms"]
    if {"dense", "sat"} <= set(times.index):
        ratio = times["dense"] / times["sat"]
        told += f"\ndense (SDPA) / block-sparse, forward + backward, medians of one run: {ratio:.2f}x"
    return told


def kernel_summary(rows: pd.DataFrame, bandwidth_tb_s: float) -> pd.DataFrame:
    """One line per method, and per operation: times in ms, and how many times its byte floor it takes.

    Args:
        rows: of the experiment `kernels`, any sweeps. bandwidth_tb_s: of its copy, which turns bytes into time.

    "sdpa" and "flex" are their forward and backward time over the line's, at the same shape (flex: and layout, at its
    fastest block side). A time that wasn't or couldn't be measured is NaN, with the reason under "note".
    """
    operations = rows[rows["sweep"] == "operations"]
    names = [name.removesuffix("_floor_bytes") for name in rows.columns if name.endswith("_floor_bytes")]
    each = [
        operations.assign(
            method=name, forward_ms=operations[f"{name}_ms"], floor_bytes_forward=operations[f"{name}_floor_bytes"]
        )
        for name in names
    ]
    lines = pd.concat([rows[~rows["sweep"].isin(["copy", "operations"])], *each], ignore_index=True)
    lines = lines.reindex(columns=["sweep", "method", *PLACE, *MEASURED, "error"]).astype(TYPES)
    forward, both, floor, floor_backward = (lines[name] for name in MEASURED)
    per_ms = bandwidth_tb_s * 1e9  # bytes
    return lines[["sweep", "method", *PLACE]].assign(
        **{
            "forward ms": forward,
            "forward x floor": forward * per_ms / floor,
            "forward + backward ms": both,
            "forward + backward x floor": both * per_ms / (floor + floor_backward),
            "sdpa": _best(lines, lines["method"] == "sdpa", SHAPE) / both,
            "flex": _best(lines, lines["method"].str.startswith("flex"), PLACE) / both,
            "note": lines["error"],
        }
    )


def _best(rows: pd.DataFrame, peers: pd.Series, keys: list[str]) -> pd.Series:
    """For each row the shortest forward and backward time (ms) among those peers that share its keys; NaN without any.

    Peers of the row's own sweep come first, then those of any sweep.
    """
    times = rows["forward_backward_ms"].where(peers)
    shortest = lambda names: times.groupby([rows[name] for name in names], dropna=False).transform("min")
    return shortest([*keys, "sweep"]).fillna(shortest(keys))
