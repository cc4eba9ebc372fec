"""Each shape of figure draws what the frame says; saving writes both files and the alternative text."""

import base64
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell

from lmsys import figures

SPEEDS = pd.DataFrame(
    {
        "length": [512, 1024, 2048] * 2,
        "rate": [100.0, 200.0, 300.0, 50.0, np.nan, 150.0],
        "low": [90.0, 190.0, 290.0, 40.0, np.nan, 140.0],
        "high": [110.0, 210.0, 310.0, 60.0, np.nan, 160.0],
        "kernel": ["ours"] * 3 + ["peer"] * 3,
        "causal": [True, True, False] * 2,
        "status": ["", "", "", "", "oom", ""],
    }
)
EMPTY = SPEEDS.iloc[:0]


def texts(figure):
    """All that is written, as drawn."""
    figure.canvas.draw()
    axes = [text.get_text() for axis in figure.axes for text in axis.texts]
    legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return [text for text in axes + legends + [text.get_text() for text in figure.texts] if text]


def test_lines_have_gaps_bands_styles_and_names_at_their_ends():
    styles = {"peer": ("the peer", "#123456", True)}
    figure = figures.lines(
        SPEEDS,
        "length",
        "rate",
        "kernel",
        low="low",
        high="high",
        log="xlog2",
        styles=styles,
        xlabel="tokens",
        zero=True,
    )
    (axis,) = figure.axes
    ours, peer = axis.lines
    assert ours.get_xdata().tolist() == [512, 1024, 2048] and np.isnan(peer.get_ydata()[1])
    assert (peer.get_color(), peer.get_linestyle(), ours.get_linestyle()) == ("#123456", "--", "-")
    assert len(axis.collections) == 2 and axis.get_xscale() == "log" and axis.get_ylim()[0] == 0
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["512", "1,024", "2,048"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("tokens", "rate")
    assert texts(figure) == ["the peer", "ours"] and not figure.legends


def test_names_at_the_ends_keep_apart():
    frame = pd.DataFrame({"x": [0, 1] * 4, "y": [0.0, 1.0, 0.0, 1.001, 0.0, 1.002, 0.0, 5.0], "name": list("aabbccdd")})
    figure = figures.lines(frame, "x", "y", "name")
    heights = [text.xy[1] for text in figure.axes[0].texts]
    assert np.diff(heights).min() > 0.03 and max(heights) <= 1


def test_panels_share_a_legend_and_series_keep_their_colours():
    figure = figures.lines(SPEEDS, "length", "rate", "kernel", panel="causal", reference={"peak": 400}, title="speeds")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["causal", "not causal"]
    assert [line.get_color() for line in figure.axes[0].lines[:2]] == [
        line.get_color() for line in figure.axes[1].lines[:2]
    ]
    assert texts(figure) == ["ours", "peer", "peak", "speeds"]
    grid = figures.lines(SPEEDS.assign(head_dim=64), "length", "rate", "kernel", panel=["causal", "head_dim"])
    assert [axis.get_title(loc="left") for axis in grid.axes] == ["causal, head dim 64", "not causal, head dim 64"]
    assert grid.axes[0].get_subplotspec().get_gridspec().get_geometry() == (2, 1)


def test_a_second_column_of_series_gives_the_line_style():
    frame = SPEEDS.assign(dtype=["bf16", "fp32", "bf16"] * 2)
    figure = figures.lines(frame, "length", "rate", ["kernel", "dtype"])
    styles = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines]
    assert len(set(styles)) == 4 and len({colour for colour, _ in styles}) == 2
    assert texts(figure) == ["ours", "peer", "bf16", "fp32"]


def test_series_of_one_point_are_named_there():
    frame = pd.DataFrame({"memory": [10, 20], "time": [5.0, 3.0], "name": ["a", "b"]})
    (axis,) = figures.lines(frame, "memory", "time", "name").axes
    assert [text.xy for text in axis.texts] == [(20, 3.0), (10, 5.0)]


def test_an_axis_with_a_zero_can_be_logarithmic():
    assert (
        figures.lines(SPEEDS.assign(length=[0, 1, 25] * 2), "length", "rate", "kernel", log="x").axes[0].get_xscale()
        == "symlog"
    )


@pytest.mark.parametrize("count", [12, 40])
def test_no_two_series_share_a_colour(count):
    frame = pd.DataFrame({"x": range(count), "y": 1.0, "name": [f"series {i}" for i in range(count)]})
    styles = {"series 3": ("given", figures.PALETTE[0]), "series 5": ("given twice", figures.PALETTE[0])}
    (axis,) = figures.lines(frame, "x", "y", "name", styles=styles).axes
    assert len({line.get_color() for line in axis.lines}) == count


@pytest.mark.parametrize("horizontal", [False, True])
def test_bars_have_heights_whiskers_values_and_room(horizontal):
    figure = figures.bars(
        SPEEDS,
        "length",
        "rate",
        "kernel",
        low="low",
        high="high",
        annotate="status",
        horizontal=horizontal,
        dashed=["peer"],
    )
    (axis,) = figure.axes
    sizes = [bar.get_width() if horizontal else bar.get_height() for bar in axis.patches]
    np.testing.assert_array_equal(sizes, SPEEDS.rate)
    limits = axis.get_xlim() if horizontal else axis.get_ylim()
    assert limits[0] == 0 and limits[1] > 310
    assert "oom" in texts(figure) and {"ours", "peer"} <= set(texts(figure))
    assert [bar.get_hatch() for bar in axis.patches] == [None] * 3 + ["//"] * 3
    labels = axis.get_yticklabels() if horizontal else axis.get_xticklabels()
    assert [label.get_text() for label in labels] == ["512", "1,024", "2,048"]


def test_bars_coloured_by_their_category_are_wide_and_show_what_was_predicted():
    frame = pd.DataFrame({"wrapper": ["flat", "overlap"], "ms": [83.0, 82.5], "model": [80.0, 81.0]}, index=[7, 7])
    figure = figures.bars(frame, "wrapper", "ms", "wrapper", predicted="model", log=True)
    (axis,) = figure.axes
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([0.79, 0.79], abs=0.01)
    assert texts(figure) == ["83.0", "82.5", "predicted"] and axis.get_yscale() == "log"
    assert [segment[0][1] for segment in axis.collections[0].get_segments()] == [80.0, 81.0]


def test_stacked_bars_end_at_the_sum():
    frame = pd.DataFrame(
        {"point": ["a", "a", "b", "b"], "share": [60.0, 40.0, 99.0, 1.0], "kind": ["x", "y", "x", "y"]}
    )
    figure = figures.stacked(frame, "point", "share", "kind")
    spans = [(bar.get_y(), bar.get_height()) for bar in figure.axes[0].patches]
    assert spans == [(0, 60), (0, 99), (60, 40), (99, 1)]
    assert texts(figure) == ["x", "y"]


def test_panels_share_the_scale_of_values_unless_told_not_to():
    for share, same in ((True, True), (False, False)):
        axes = figures.bars(SPEEDS, "length", "rate", panel="kernel", share=share, horizontal=True).axes
        assert (axes[0].get_xlim() == axes[1].get_xlim()) == same
        axes = figures.stacked(SPEEDS, "length", "rate", "causal", panel="kernel", share=share).axes
        assert (axes[0].get_ylim() == axes[1].get_ylim()) == same


def test_stacked_areas_name_their_phases():
    frame = pd.DataFrame(
        {
            "at": [0, 10, 20, 30] * 2,
            "gib": [1.0, 1.0, 1.0, 1.0, 0.0, 2.0, 1.0, 0.0],
            "kind": ["parameters"] * 4 + ["activations"] * 4,
            "phase": ["forward", "forward", "backward", "backward"] * 2,
        }
    )
    figure = figures.stacked(frame, "at", "gib", "kind", areas=True, phases="phase")
    (axis,) = figure.axes
    assert len(axis.collections) == 2 and axis.get_xlim() == (0, 30) and axis.get_ylim()[0] == 0
    assert axis.collections[1].get_datalim(axis.transData).y1 == pytest.approx(3.0)
    assert texts(figure) == ["forward", "backward", "parameters", "activations"]


def test_heatmap_colours_by_the_share_and_writes_the_value():
    figure = figures.heatmap(SPEEDS, "kernel", "length", "rate", annotate="{:.0f}", relative="column max")
    axis, bar = figure.axes
    np.testing.assert_allclose(axis.images[0].get_array().filled(np.nan), [[1, 1, 1], [0.5, np.nan, 0.5]])
    assert texts(figure) == ["100", "200", "300", "50", "150"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["ours", "peer"]
    assert bar.get_ylabel() == "share of column max"
    with pytest.raises(ValueError, match=r'relative is "max".*"column max" or None'):
        figures.heatmap(SPEEDS, "kernel", "length", "rate", relative="max")


def test_timeline_has_a_lane_each_and_names_wide_bars():
    frame = pd.DataFrame(
        {
            "lane": ["phase", "phase", "compute", "compute"],
            "start": [0.0, 6.0, 0.0, 7.0],
            "ms": [6.0, 4.0, 5.0, 0.01],
            "name": ["forward", "backward", "k", "k"],
            "step": "naive",
        }
    )
    figure = figures.timeline(
        frame, lane="lane", start="start", duration="ms", name="name", colour="name", panel="step"
    )
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["phase", "compute"] and axis.get_xlim() == (0, 10)
    spans = [path.get_extents().width for collection in axis.collections for path in collection.get_paths()]
    assert spans == pytest.approx([6.0, 4.0, 5.0, 0.01])
    assert texts(figure) == ["forward", "backward", "k", "forward", "backward", "k"]
    assert axis.get_title(loc="left") == "naive" and axis.get_xlabel() == "time, ms"


def test_roofline_bends_at_the_ceiling():
    frame = pd.DataFrame(
        {"intensity": [10.0, 1000.0], "rate": [30.0, 600.0], "step": ["naive", "flash"], "dram": [9.0, np.nan]}
    )
    options = {"intensity": "intensity", "rate": "rate", "by": "step", "counted": "dram"}
    figure = figures.roofline(frame, ceilings={"peak": 800.0}, bandwidths={"copy": 4.0}, **options)
    (axis,) = figure.axes
    copy = axis.lines[-2]
    np.testing.assert_allclose(copy.get_ydata(), np.minimum(4.0 * copy.get_xdata(), 800.0))
    assert axis.get_xscale() == axis.get_yscale() == "log" and set(axis.lines[-1].get_ydata()) == {800.0}
    assert list(axis.lines[1].get_xdata()) == [10.0, 9.0]
    assert texts(figure) == ["naive", "flash", "copy", "peak"]


@pytest.mark.parametrize(
    "frame", [EMPTY, pd.DataFrame(), SPEEDS.assign(rate=np.nan)], ids=["no rows", "nothing", "NaN"]
)
def test_without_data_a_figure_says_so(frame):
    every = (
        figures.lines(frame, "length", "rate", "kernel", panel="causal"),
        figures.bars(frame, "length", "rate", "kernel", low="low", high="high"),
        figures.stacked(frame, "length", "rate", "kernel"),
        figures.heatmap(frame, "kernel", "length", "rate"),
        figures.timeline(frame, lane="kernel", start="length", duration="rate"),
        figures.roofline(frame, intensity="length", rate="rate", by="kernel", ceilings={}, bandwidths={}),
    )
    for figure in every:
        assert texts(figure) == ["no data"]


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"no column \['speed'\]; the frame has length, rate"):
        figures.bars(SPEEDS, "length", "speed")
    with pytest.raises(ValueError, match='log is "z"'):
        figures.lines(SPEEDS, "length", "rate", "kernel", log="z")


def test_save_writes_both_files_and_shows_the_one_that_is_small_enough(tmp_path, monkeypatch):
    saved = figures.save(
        figures.bars(SPEEDS, "length", "rate", "kernel"), tmp_path / "sub" / "speeds.png", "Two kernels"
    )
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["speeds.png", "speeds.svg"]
    data, metadata = InteractiveShell.instance().display_formatter.format(saved)
    assert "<text" in data["image/svg+xml"] and "Two kernels" in data["image/svg+xml"]
    assert metadata == {"image/svg+xml": {"alt": "Two kernels"}}
    monkeypatch.setattr(figures, "LARGE", 100)
    saved = figures.save(figures.bars(SPEEDS, "length", "rate", "kernel"), tmp_path / "many", "Two kernels")
    data, metadata = InteractiveShell.instance().display_formatter.format(saved)
    assert base64.b64decode(data["image/png"]) == (tmp_path / "many.png").read_bytes()
    assert metadata == {"image/png": {"alt": "Two kernels"}}
    for path, alt, message in (("a.svg", "a", "suffix is .svg"), ("a.png", " ", "alt is empty")):
        with pytest.raises(ValueError, match=message):
            figures.save(figures.bars(SPEEDS, "length", "rate"), tmp_path / path, alt)


def test_the_same_figure_is_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        figures.save(
            figures.lines(SPEEDS, "length", "rate", "kernel", panel="causal"), tmp_path / folder / "x.png", "speeds"
        )
    assert (tmp_path / "a/x.svg").read_bytes() == (tmp_path / "b/x.svg").read_bytes()


def test_figures_import_neither_torch_nor_pyplot():
    code = "import lmsys.figures, sys; print([name for name in ('torch', 'matplotlib.pyplot') if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
