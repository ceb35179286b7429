"""Plots as data: panels of lines, points or cells, drawn as PNG files by matplotlib where that is installed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from .errors import SteerkernError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE = ("#0b5fa5", "#c8501e", "#3c8d40", "#7a5195", "#6b6b6b")
"""Line colours of plots, told apart by the colour-blind too."""
CROWDED = 40
"""Curves of more points have no markers."""


@dataclass(frozen=True)
class Line:
    """A curve of a plot; a ``guide`` is dashed and has no markers."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    guide: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes; ``share`` means that y is a share between 0 and 1, ``mark`` an x that is pointed out."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    share: bool = False
    whole: bool = False
    """x counts something: only whole numbers get a tick."""
    mark: tuple[float, str] | None = None
    log: bool = False
    """Both axes are logarithmic."""


@dataclass(frozen=True)
class Scatter:
    """Points by group on one pair of axes, with lines through zero: which side of it a point is on is what counts."""

    title: str
    x_label: str
    y_label: str
    groups: tuple[Line, ...]


@dataclass(frozen=True)
class HeatMap:
    """Cells ``values[row][column]``, row 0 at the bottom; None is an empty cell.

    ``diverging`` colours by sign, with white at zero; ``boxed`` are (row, column) cells that are pointed out.
    """

    title: str
    x_label: str
    y_label: str
    values: tuple[tuple[float | None, ...], ...]
    x_ticks: tuple[str, ...]
    y_ticks: tuple[str, ...]
    bar_label: str = ""
    diverging: bool = False
    boxed: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Bars:
    """A value per name as a lying bar, the first name on top; ``before`` marks a value to compare with.

    Values are shares unless ``form`` says otherwise; ``spans`` are the ends of a whisker for each.
    """

    title: str
    x_label: str
    names: tuple[str, ...]
    values: tuple[float, ...]
    before: tuple[float, str] | None = None
    form: str = ".0%"
    spans: tuple[tuple[float, float], ...] = ()


Axis = Union[Panel, Scatter, HeatMap, Bars]


@dataclass(frozen=True)
class Plot:
    """A picture of panels side by side, stored as ``NAME.png``; its numbers are in the report's JSON."""

    name: str
    title: str
    panels: tuple[Axis, ...]
    caption: str = ""

    def save(self, folder: Path) -> Path:
        """Draw ``NAME.png`` into ``folder``.

        Raises:
            SteerkernError: matplotlib is missing.
        """
        require_plots()
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.6 * len(self.panels), 4.2), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(self.title, fontsize=12, fontweight="bold")
        if self.caption:
            figure.supxlabel(self.caption, fontsize=8, color="#555555")
        for axes, panel in zip(figure.subplots(1, len(self.panels), squeeze=False)[0], self.panels, strict=True):
            _DRAW[type(panel)](axes, panel)
        path = folder / f"{self.name}.png"
        figure.savefig(path, metadata={"Source": self.digest()})
        return path

    def digest(self) -> str:
        """SHA-256 of what is drawn, which the PNG file carries as its ``Source``."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


def require_plots(otherwise: str = "") -> None:
    """Raise SteerkernError with the command that installs matplotlib (or what to do ``otherwise``) if it is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        command = "pip install 'steerkern[plots]'" + (f" ({otherwise})" if otherwise else "")
        raise SteerkernError(f"plots need matplotlib, which is not installed: {command}") from None


def _lines(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

    for i, line in enumerate(panel.lines):
        if line.guide:
            axes.plot(line.x, line.y, color="#222222", linewidth=1.2, linestyle=(0, (2, 2)), zorder=3, label=line.label)
            continue
        colour, marker = PALETTE[i % len(PALETTE)], "os^Dv"[i % 5] if len(line.x) <= CROWDED else None
        axes.plot(line.x, line.y, color=colour, marker=marker, markersize=4.5, linewidth=1.8, label=line.label)
    _frame(axes, panel)
    if panel.share:
        axes.set_ylim(-0.04, 1.04)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif panel.log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=min(0.0, *(v for line in panel.lines for v in line.y)))
    if panel.whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.mark is not None:
        at, label = panel.mark
        axes.axvline(at, color="#999999", linewidth=1.2, linestyle=(0, (4, 3)), zorder=0, label=label)
    _legend(axes)


def _points(axes: Axes, panel: Scatter) -> None:
    for i, group in enumerate(panel.groups):
        colour, marker = PALETTE[i % len(PALETTE)], "os^Dv"[i % 5]
        axes.scatter(group.x, group.y, s=16, color=colour, marker=marker, alpha=0.65, linewidths=0, label=group.label)
    _frame(axes, panel)
    axes.axhline(0, color="#999999", linewidth=1.0, zorder=0)
    axes.axvline(0, color="#999999", linewidth=1.0, zorder=0)
    _legend(axes)


def _cells(axes: Axes, panel: HeatMap) -> None:
    from matplotlib.patches import Rectangle

    cells = [[float("nan") if value is None else value for value in row] for row in panel.values]
    known = [abs(value) for row in panel.values for value in row if value is not None]
    most = max(known, default=1.0) or 1.0
    limits = {"vmin": -most, "vmax": most, "cmap": "RdBu_r"} if panel.diverging else {"cmap": "viridis"}
    image = axes.imshow(cells, origin="lower", aspect="auto", interpolation="nearest", **limits)
    _frame(axes, panel)
    axes.grid(False)
    crowded = sum(map(len, panel.x_ticks)) > 30
    axes.set_xticks(range(len(panel.x_ticks)), panel.x_ticks, rotation=60 if crowded else 0)
    axes.set_yticks(range(len(panel.y_ticks)), panel.y_ticks)
    if crowded:
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
            label.set_rotation_mode("anchor")
    for row, column in panel.boxed:
        box = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#111111", linewidth=1.8)
        axes.add_patch(box)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(panel.bar_label, fontsize=8)


def _bars(axes: Axes, panel: Bars) -> None:
    from matplotlib.ticker import PercentFormatter

    places, shares = range(len(panel.names)), panel.form.endswith("%")
    ends = [(v - low, high - v) for v, (low, high) in zip(panel.values, panel.spans, strict=False)]
    whiskers: dict[str, Any] = (
        {"xerr": list(zip(*ends, strict=True)), "capsize": 2, "ecolor": "#555555"} if ends else {}
    )
    bars = axes.barh(places, panel.values, color=PALETTE[0], height=0.6, **whiskers)
    axes.bar_label(bars, [f"{value:{panel.form}}" for value in panel.values], padding=3, fontsize=8)
    axes.set_yticks(places, panel.names)
    axes.invert_yaxis()
    _frame(axes, panel)
    if shares:
        axes.set_xlim(0, 1.12)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    else:
        axes.margins(x=0.18)
        axes.axvline(0, color="#999999", linewidth=1.0)
    axes.grid(False, axis="y")
    if panel.before is not None:
        at, label = panel.before
        axes.axvline(at, color=PALETTE[1], linewidth=1.6, linestyle=(0, (4, 3)), label=label)
        _legend(axes)


def _frame(axes: Axes, panel: Axis) -> None:
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.x_label, fontsize=9)
    axes.set_ylabel(getattr(panel, "y_label", ""), fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0.0, -0.16))


_DRAW: dict[type, Callable[..., None]] = {Panel: _lines, Scatter: _points, HeatMap: _cells, Bars: _bars}
