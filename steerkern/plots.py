"""Plots as data: panels of lines, drawn as PNG files by matplotlib where that is installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import SteerkernError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE = ("#0b5fa5", "#c8501e", "#3c8d40", "#7a5195", "#6b6b6b")
"""Line colours of plots, told apart by the colour-blind too."""


@dataclass(frozen=True)
class Line:
    """A curve of a plot."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]


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


@dataclass(frozen=True)
class Plot:
    """A picture of panels side by side, stored as ``NAME.png``; its numbers are in the report's JSON."""

    name: str
    title: str
    panels: tuple[Panel, ...]
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
            _draw(axes, panel)
        path = folder / f"{self.name}.png"
        figure.savefig(path)
        return path


def require_plots(otherwise: str = "") -> None:
    """Raise SteerkernError with the command that installs matplotlib (or what to do ``otherwise``) if it is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        command = "pip install 'steerkern[plots]'" + (f" ({otherwise})" if otherwise else "")
        raise SteerkernError(f"plots need matplotlib, which is not installed: {command}") from None


def _draw(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for i, line in enumerate(panel.lines):
        colour, marker = PALETTE[i % len(PALETTE)], "os^Dv"[i % 5]
        axes.plot(line.x, line.y, color=colour, marker=marker, markersize=4.5, linewidth=1.8, label=line.label)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.x_label, fontsize=9)
    axes.set_ylabel(panel.y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.share:
        axes.set_ylim(-0.04, 1.04)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    else:
        axes.set_ylim(bottom=min(0.0, *(v for line in panel.lines for v in line.y)))
    if panel.whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.mark is not None:
        at, label = panel.mark
        axes.axvline(at, color="#999999", linewidth=1.2, linestyle=(0, (4, 3)), zorder=0, label=label)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0.0, -0.16))
