"""Where our attention kernels stand against the peers: ratios of the rows of one attention sweep, and the bars they are held to.

A ratio is the peer's median time over ours at one point, both measured in the same run: 1.10 means that ours is 10% faster.
Ratios are summed up by their geometric mean, least and most. Works on the DataFrame of attention_sweep_results.csv; no torch here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lmsys import records

GROUPS = ("throughput", "grouped_query", "few_blocks", "tiers")  # all but the last stand in the column tier as they are
CASE = ["batch", "heads", "kv_heads", "q_len", "k_len", "head_dim", "dtype", "causal"]
TRITON = "flash_attention_triton"
PORTABLE = f"{TRITON} (portable)"
_SUMMED = ("throughput", "grouped_query")  # what geometric means are taken over


@dataclass(frozen=True)
class Bar:
    """ours is to reach this much of the peer's speed.

    Attributes:
        geomean: wanted of the geometric mean. least: wanted of every point; None asks for nothing there.
        groups: of points that count. from_len: the least q_len that counts.
    """

    ours: str
    peer: str
    which: str
    geomean: float
    least: float | None = None
    groups: tuple[str, ...] = _SUMMED
    from_len: int = 1


_EVERYWHERE = ("throughput", "grouped_query", "few_blocks")
BARS = (
    *(Bar(TRITON, "torch_flex", which, 1.0, 1.0, _EVERYWHERE) for which in ("forward", "backward")),
    *(Bar(TRITON, "torch_sdpa_cudnn", which, 1.05, 0.95, from_len=1024) for which in ("forward", "backward")),
    Bar(TRITON, "flash_attention_4", "forward", 1.03, 0.93),
    Bar(TRITON, "flash_attention_4", "backward", 1.0, 0.93),
    *(Bar(PORTABLE, "torch_flex", which, 1.0) for which in ("forward", "backward")),
    Bar("flash_attention_cuda", "torch_sdpa_flash", "forward", 1.0),
    Bar("flash_attention_cuda", "torch_sdpa_flash", "backward", 0.8),
)
_PEERS = ("torch_flex", "torch_sdpa_flash", "torch_sdpa_cudnn", "flash_attention_4")


def of_group(frame, group: str):
    """The rows of one group of points."""
    named = frame.tier.isin(GROUPS[:-1])
    return frame[~named] if group == "tiers" else frame[frame.tier == group]


def with_series(frame):
    """A copy with the column `series`: the kernel's name, with '(portable)' where another path of it is the default there."""
    frame = frame.copy()
    portable = frame.path == "portable" if "path" in frame else frame.kernel == ""
    key = [frame[name] for name in (*CASE, "pass", "kernel")]
    others = (~portable).groupby(key).transform("any")
    frame["series"] = frame.kernel.where(~(portable & others), frame.kernel + " (portable)")
    return frame


def case_name(row: Any, head_dim: bool = True) -> str:
    """One point in words: 4,096 tokens, head_dim 64, causal."""
    lengths = f"{row.q_len:,} tokens" if row.q_len == row.k_len else f"{row.q_len:,} queries of {row.k_len:,} keys"
    name = f"{lengths}, head_dim {row.head_dim}" if head_dim else lengths
    if row.heads != row.kv_heads:
        name += f", {row.heads // row.kv_heads} query heads a key head"
    return name + (", causal" if row.causal else ", not causal")


def ratios(frame, ours: str, peer: str, which: str):
    """The points where both have a row, as a DataFrame: the case, `ratio` (NaN where one has no time) and `lost`, where only ours has none.

    ours, peer: a series. The portable path stands under its own series, or, where it is the default, under the kernel's.
    """
    frame = with_series(frame[frame["pass"] == which])
    mine = frame[frame.series == ours]
    if ours == PORTABLE:
        mine = frame[(frame.kernel == TRITON) & (frame.path == "portable")] if "path" in frame else frame[:0]
    theirs = frame[frame.series == peer]
    both = mine.merge(theirs, on=[*CASE, "tier"], suffixes=("", "_peer"))
    timed = (both.status == "ok") & (both.status_peer == "ok")
    both["ratio"] = (both.median_ms_peer / both.median_ms).where(timed)
    both["lost"] = (both.status != "ok") & (both.status_peer == "ok")
    return both


def standings(frame) -> list[dict[str, Any]]:
    """A row for each bar that the sweep can judge, then for each other pair of ours and a peer, by group of points."""
    return [*_judged(frame), *_unjudged(frame)]


def _judged(frame) -> Iterator[dict[str, Any]]:
    for bar in BARS:
        points = ratios(frame, bar.ours, bar.peer, bar.which)
        points = points[points.tier.isin(bar.groups) & (points.q_len >= bar.from_len)]
        points = points[points.ratio.notna() | points.lost]
        if points.empty:
            continue
        row = _summary(bar.ours, bar.peer, bar.which, points, bar.groups, bar.from_len)
        row["bar"] = f"{bar.geomean:.2f}" + ("" if bar.least is None else f", none under {bar.least:.2f}")
        reached = not points.lost.any() and row["geomean"] >= bar.geomean
        row["met"] = bool(reached and (bar.least is None or row["least"] >= bar.least))
        row["under"] = 0 if bar.least is None else int((points.ratio < bar.least).sum())
        yield row


def _unjudged(frame) -> Iterator[dict[str, Any]]:
    judged = {(bar.ours, bar.peer) for bar in BARS}
    pairs = [(ours, peer) for ours in (TRITON, PORTABLE) for peer in _PEERS]
    summed = [(ours, peer, _SUMMED) for ours, peer in pairs if (ours, peer) not in judged]
    few = [(ours, peer, ("few_blocks",)) for ours, peer in pairs]
    for ours, peer, groups in summed + few:
        for which in ("forward", "backward"):
            points = ratios(frame, ours, peer, which)
            points = points[points.tier.isin(groups) & (points.ratio.notna() | points.lost)]
            if len(points):
                yield _summary(ours, peer, which, points, groups, 1) | {"bar": "", "met": None, "under": 0}


def _summary(ours: str, peer: str, which: str, points, groups: tuple[str, ...], from_len: int) -> dict[str, Any]:
    timed = points[points.ratio.notna()]
    row = {"ours": ours, "peer": peer, "pass": which, "groups": groups, "from_len": from_len}
    row |= {"points": len(timed), "lost": int(points.lost.sum())}
    if timed.empty:
        return row | {"geomean": math.nan, "least": math.nan, "most": math.nan, "least_at": "", "most_at": ""}
    least, most = timed.loc[timed.ratio.idxmin()], timed.loc[timed.ratio.idxmax()]
    return row | {
        "geomean": math.exp(sum(map(math.log, timed.ratio)) / len(timed)),
        "least": float(least.ratio),
        "most": float(most.ratio),
        "least_at": case_name(least),
        "most_at": case_name(most),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The standings as Markdown."""
    lines = []
    for row in rows:
        points = row["groups"] if row["groups"] != _EVERYWHERE else ("all",)
        where = " and ".join(points).replace("_", " ") + ("" if row["from_len"] == 1 else f", from {row['from_len']}")
        lines.append(
            {
                "ours": f"`{TRITON}`, portable path" if row["ours"] == PORTABLE else f"`{row['ours']}`",
                "peer": f"`{row['peer']}`",
                "pass": row["pass"],
                "where": where,
                "points": str(row["points"]) + (f" ({row['lost']} without a time of ours)" if row["lost"] else ""),
                "geomean": f"{row['geomean']:.3f}",
                "least": f"{row['least']:.2f} ({row['least_at']})",
                "most": f"{row['most']:.2f} ({row['most_at']})",
                "bar": row["bar"],
                "met": {True: "met", False: "**missed**", None: ""}[row["met"]],
            }
        )
    columns = {"ours": "ours", "peer": "against", "pass": "pass", "where": "shapes", "points": "points"}
    columns |= {"geomean": "geometric mean", "least": "least", "most": "most", "bar": "bar", "met": ""}
    return records.markdown_table(lines, columns)


def sentences(frame) -> list[str]:
    """Each bar in a sentence: what was reached, and whether that is enough."""
    said = []
    for row in _judged(frame):
        ours = f"{TRITON}'s portable path" if row["ours"] == PORTABLE else row["ours"]
        text = (
            f"{row['pass'].capitalize()}, {ours} runs at **{row['geomean']:.2f}** times the speed of {row['peer']} (geometric mean of "
            f"{row['points']} points; least {row['least']:.2f} at {row['least_at']}; most {row['most']:.2f} at {row['most_at']}). "
            f"The bar, {row['bar']}, is {'met' if row['met'] else '**missed**'}"
        )
        if row["under"]:
            text += f", {row['under']} point(s) being under it"
        if row["lost"]:
            text += f", {row['lost']} point(s) having no time of ours"
        said.append(text + ".")
    return said
