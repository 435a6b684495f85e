"""How figures look: Okabe and Ito's colours, a marker and a dash for each, and their SVG and PNG files."""

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy.optimize import isotonic_regression

INK, GRID = "#222222", "#cccccc"
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
ORANGE, SKY, YELLOW = "#e69f00", "#56b4e9", "#f0e442"
DPI = 150
PANEL = (4.4, 3.1)  # inches: a text column in print, a phone's width on a screen
RC = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a name is a dollar
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
}
styled = rc_context(RC)  # for functions that make figures


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str
    dash: str


LEVEL = Look(INK, "_", ":")
LOOKS = {
    "qdylora": Look(BLUE, "o", "-"),
    "qlora": Look(VERMILLION, "s", "--"),
    "dylora": Look(GREEN, "^", "-."),
    "lora": Look(PURPLE, "D", ":"),
}
OTHERS = (
    Look(ORANGE, "v", "-"),
    Look(SKY, "P", "--"),
    Look(INK, "X", "-."),
    Look(YELLOW, "*", "-"),
    Look(GREEN, "<", ":"),
    Look(PURPLE, ">", "-"),
    Look(VERMILLION, "d", ":"),
    Look(BLUE, "p", "-."),
    Look(ORANGE, "h", "--"),
    Look(SKY, "8", ":"),
)


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each name: a known method's own, the rest in order."""
    others = cycle(OTHERS)
    return {name: LOOKS.get(name) or next(others) for name in names}


def panel(width: float = PANEL[0], height: float = PANEL[1]) -> tuple[Figure, Axes]:
    """A figure of one axes, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def label_ends(axes: Axes, ends: dict[str, float], looks: dict[str, Look], gap: float = 0.075) -> None:
    """Name each line to the right of the axes, as near its last value as the others allow.

    looks: of the same names. `gap` is the least distance of two names, a share of the axes' height.
    """
    axes.figure.draw_without_rendering()  # settles the limits
    low, high = axes.get_ylim()
    names = sorted(ends, key=ends.get)
    steps = gap * np.arange(len(names))
    wanted = np.clip([(ends[name] - low) / (high - low) for name in names], 0, 1)
    # Least squares with a least distance: an isotonic regression of what is left without the distances.
    for name, place in zip(names, isotonic_regression(wanted - steps).x + steps, strict=True):
        look = looks[name]
        axes.plot(
            [1.04], [place], look.marker, color=look.colour, markersize=4, transform=axes.transAxes, clip_on=False,
            label="_",
        )  # fmt: skip
        axes.text(1.07, place, name, transform=axes.transAxes, va="center", fontsize=8)


def svg(figure: Figure, name: str) -> str:
    """The figure as SVG without a background; the same text for the same data. `name` keeps ids of figures apart."""
    with rc_context(RC | {"svg.hashsalt": name}):
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def save(figure: Figure, name: str, folder: Path) -> Path:
    """Write <name>.svg and, for looking at, <name>.png on white; returns the SVG's path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (re.sub(r"[^\w.-]+", "_", name) + ".svg")  # a name from a record is no path
    file.write_text(svg(figure, name), encoding="utf-8")
    pixels = io.BytesIO()
    with rc_context(RC):
        figure.savefig(pixels, format="png", dpi=DPI, facecolor="white")
    # With a palette, which looks the same, it takes a third of the bytes.
    Image.open(pixels).convert("RGB").quantize(256).save(file.with_suffix(".png"), optimize=True, dpi=(DPI, DPI))
    return file


def inline(text: str) -> str:
    """An SVG made here as a part of an HTML page: no header, no metadata, no id that nothing refers to (they would
    repeat from figure to figure), no fixed size, ink, grid and font of the page, and no digit or space nobody sees."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;]*; ?", "", text)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    head, body = text.split(">", 1)
    head = "<svg " + re.search(r'viewBox="[^"]*"', head)[0]
    return (head + ">" + body).replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
