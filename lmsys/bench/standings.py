"""Where our attention kernels stand against the peers: ratios of the rows of one attention sweep.

A ratio is the peer's median time over ours at one point, both measured in the same run: 1.10 means that ours is 10%
faster. Ratios are summed up by their geometric mean, least and most. Works on the DataFrame of
attention_sweep_results.csv; no torch here.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

GROUPS = ("throughput", "grouped_query", "few_blocks", "tiers")  # all but the last stand in the column tier as they are
CASE = ["tier", "batch", "heads", "kv_heads", "q_len", "k_len", "head_dim", "dtype", "causal"]


def of_group(frame, group: str):
    """The rows of one group of shapes."""
    named = frame.tier.isin(GROUPS[:-1])
    return frame[~named] if group == "tiers" else frame[frame.tier == group]


def with_series(frame):
    """A copy with the column `series`: the kernel's name, '(portable)' behind it where that is not its default path."""
    portable = frame.path == "portable" if "path" in frame else frame.kernel == ""
    key = [frame[name] for name in (*CASE, "pass", "kernel")]
    others = (~portable).groupby(key).transform("any")
    return frame.assign(series=frame.kernel.where(~(portable & others), frame.kernel + " (portable)"))


def case_name(row: Any) -> str:
    """One point in words: 4,096 tokens, head_dim 64, causal."""
    lengths = f"{row.q_len:,} tokens" if row.q_len == row.k_len else f"{row.q_len:,} queries of {row.k_len:,} keys"
    name = f"{lengths}, head_dim {row.head_dim}"
    if row.heads != row.kv_heads:
        name += f", {row.heads // row.kv_heads} query heads a key head"
    return name + (", causal" if row.causal else ", not causal")


def ratios(frame, ours: str, peer: str, which: str):
    """The points where both have a row: the case, `ratio` (NaN where one has no time), `lost` where only ours has none.

    Args:
        ours, peer: a series. which: a pass.
    """
    frame = with_series(frame[frame["pass"] == which])
    mine = frame[frame.series == ours]
    kernel = ours.removesuffix(" (portable)")
    if kernel != ours and "path" in frame:  # which stands under the kernel's own name where it is the default
        mine = frame[(frame.kernel == kernel) & (frame.path == "portable")]
    both = mine.merge(frame[frame.series == peer], on=CASE, suffixes=("", "_peer"))
    timed = (both.status == "ok") & (both.status_peer == "ok")
    both["ratio"] = (both.median_ms_peer / both.median_ms).where(timed)
    both["lost"] = (both.status != "ok") & (both.status_peer == "ok")
    # Half of the wider of both ranges from the 20th to the 80th percentile, as a share of our time.
    ranges = (both.p80_ms - both.p20_ms).combine(both.p80_ms_peer - both.p20_ms_peer, max)
    both["noise"] = ranges / 2 / both.median_ms
    return both


def standings(frame, ours: list[str], peers: list[str], groups=("throughput", "grouped_query"), from_len: int = 1):
    """A row for each of ours, each peer and each pass: the peer's time over ours over the points of these groups.

    Returns:
        a DataFrame: ours, peer, pass, points, lost, geomean, least, least_at, most, most_at, verdict (ahead, behind or
        within noise, of the geometric mean beside the points' median noise).
    """
    import pandas as pd

    rows = []
    for mine, peer, which in itertools.product(ours, peers, frame["pass"].unique()):
        points = ratios(frame, mine, peer, which)
        points = points[points.tier.isin(groups) | (("tiers" in groups) & ~points.tier.isin(GROUPS))]
        points = points[(points.q_len >= from_len) & (points.ratio.notna() | points.lost)]
        timed = points[points.ratio.notna()]
        if timed.empty:
            continue
        geomean = math.exp(sum(map(math.log, timed.ratio)) / len(timed))
        row = {"ours": mine, "peer": peer, "pass": which, "points": len(timed), "lost": int(points.lost.sum())}
        row["geomean"] = geomean
        for name, index in (("least", timed.ratio.idxmin()), ("most", timed.ratio.idxmax())):
            row |= {name: timed.ratio[index], f"{name}_at": case_name(timed.loc[index])}
        within = abs(geomean - 1) < timed.noise.median()
        rows.append(row | {"verdict": "within noise" if within else "ahead" if geomean > 1 else "behind"})
    return pd.DataFrame(rows)
