"""The drawings: each function draws one figure from plain data and returns it."""

from collections.abc import Callable, Sequence
from itertools import cycle
from math import nan
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from analysis.curves import Curve, Panel, Updates
from analysis.style import (
    BLUE,
    GREEN,
    GRID,
    INK,
    LEVEL,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    YELLOW,
    Look,
    label_ends,
    looks,
    panel,
    styled,
)

MIB, GIB = 2**20, 2**30
MOST_LINES = 7  # in one axes
COLUMNS = 4  # of axes, where each line has one
GPUS = {"16 GB": 16, "24 GB": 24, "32 GB (V100)": 32, "48 GB": 48, "80 GB": 80}  # GiB of memory
RANK_LOOKS = tuple(
    Look(colour, marker, "-")
    for colour, marker in zip((INK, PURPLE, VERMILLION, ORANGE, GREEN, SKY, BLUE), "osD^vP*", strict=True)
)
PARTS = {"base_4bit": "base, 4 bits", "base_constants": "base, constants", "base_rest": "base, not in 4 bits"}
PART_COLOURS = (BLUE, SKY, GREEN, YELLOW, ORANGE, VERMILLION, PURPLE, "#999999", "#ffffff")
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "||", "oo")


@styled
def quality_against_rank(shown: Panel) -> Figure:
    """A line and a 95% band for each method over log2 rank; the large marker is the method's own or best rank."""
    ranks = sorted({rank for curve in shown.curves for rank in curve.ranks})

    def ticks(axes: Axes) -> None:
        axes.set_xticks(ranks, [str(rank) for rank in ranks])

    return _against("rank", ticks, lambda curve: list(curve.ranks), shown)


@styled
def quality_against_size(shown: Panel) -> Figure:
    """The same over the bytes of the adapter at each rank, for the methods whose record has them."""

    def ticks(axes: Axes) -> None:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))

    return _against("adapter, MiB", ticks, lambda c: [c.adapter_bytes[rank] / MIB for rank in c.ranks], shown)


def _against(what: str, ticks: Callable[[Axes], None], place: Callable[[Curve], list[float]], shown: Panel) -> Figure:
    """All curves in one axes, or each in one of its own if they are many. `place` gives horizontal positions."""

    def along(axes: Axes) -> None:
        axes.set_xscale("log", base=2)
        ticks(axes)
        axes.xaxis.set_minor_locator(NullLocator())

    if len(_lines(shown)) > MOST_LINES:
        figure = _each_by_itself(shown, place, along)
        figure.supxlabel(what, fontsize=9)
        return figure
    figure, axes = panel()
    _draw_curves(axes, shown, place)
    axes.set_xlabel(what)
    along(axes)
    _finish_curves(axes, shown)
    return figure


def _lines(shown: Panel) -> list[Curve]:
    return [curve for curve in shown.curves if len(curve.ranks) > 1]


def _each_by_itself(shown: Panel, place: Callable[[Curve], list[float]], along: Callable[[Axes], None]) -> Figure:
    """Axes for each line, with the others in grey behind it; methods of a single rank are points in all of them."""
    lines = _lines(shown)
    points = [(curve, one) for curve, one in _looks(shown) if curve not in lines]
    rows = -(-len(lines) // COLUMNS)
    figure = Figure(figsize=(7.2, 0.7 + 1.4 * rows), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
    for axes, line in zip(grid.flat, lines, strict=False):
        for other in lines:
            axes.plot(place(other), other.values, color=GRID, linewidth=1)
        colour = VERMILLION if line.own else BLUE  # trained at one rank, or for all
        hollow = "none" if line.own else colour
        axes.fill_between(place(line), line.lows, line.highs, color=colour, alpha=0.15, linewidth=0)
        axes.plot(place(line), line.values, "o-", color=colour, markerfacecolor=hollow, markersize=4)
        handles = [
            axes.plot(place(p), p.values, look.marker, color=INK, markersize=5, label=p.label)[0] for p, look in points
        ]
        if shown.level:
            value, name = shown.level
            handles.append(axes.axhline(value, color=LEVEL.colour, linestyle=LEVEL.dash, linewidth=1, label=name))
        axes.set_title(fill(line.label, 24), fontsize=8, loc="left")
        along(axes)
    for axes in grid.flat[len(lines) :]:
        axes.set_visible(False)
    for axes in grid.flat[max(0, len(lines) - COLUMNS) : len(lines)]:  # the lowest of each column
        axes.xaxis.set_tick_params(labelbottom=True)
    figure.supylabel(shown.quantity, fontsize=9)
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8, frameon=False)
    return figure


def _draw_curves(axes: Axes, shown: Panel, place: Callable[[Curve], list[float]]) -> None:
    for curve, one in _looks(shown):
        x = place(curve)
        hollow = "none" if curve.own else one.colour  # a hollow marker is a rank that was not trained
        axes.fill_between(x, curve.lows, curve.highs, color=one.colour, alpha=0.15, linewidth=0)
        axes.plot(
            x, curve.values, one.dash, color=one.colour, marker=one.marker, markerfacecolor=hollow, label=curve.label
        )
        at = curve.marked
        axes.plot(x[at], curve.values[at], one.marker, color=one.colour, markersize=9, zorder=3)


def _finish_curves(axes: Axes, shown: Panel) -> None:
    axes.set_ylabel(shown.quantity)
    ends = {curve.label: curve.values[-1] for curve in shown.curves}
    look = {curve.label: one for curve, one in _looks(shown)}
    if shown.level:
        value, name = shown.level
        axes.axhline(value, color=LEVEL.colour, linestyle=LEVEL.dash, linewidth=1, label=name)
        ends[name], look[name] = value, LEVEL
    label_ends(axes, ends, look)


def _looks(shown: Panel) -> list[tuple[Curve, Look]]:
    found = looks(curve.name for curve in shown.curves)
    return [(curve, found[curve.name]) for curve in shown.curves]


@styled
def quality_against_memory(shown: Panel) -> Figure:
    """Each method's quality at its own or best rank, with its interval, over the peak memory of its training."""
    figure, axes = panel()
    ends, look, most = {}, {}, 0.0
    for curve, one in _looks(shown):
        if curve.trained and curve.memory_bytes:
            x, at = curve.memory_bytes / GIB, curve.marked
            y, low, high = curve.values[at], curve.lows[at], curve.highs[at]
            name = f"{curve.label}, rank {curve.ranks[at]}"
            axes.errorbar(x, y, [[y - low], [high - y]], fmt=one.marker, color=one.colour, markersize=8, label=name)
            ends[name], look[name], most = y, one, max(most, x)
    axes.set_xlabel("peak memory of training, GiB")
    axes.set_ylabel(shown.quantity)
    axes.set_xlim(0, 1.1 * most)
    label_ends(axes, ends, look)
    return figure


@styled
def updates_of_rows(counts: Sequence[Updates]) -> Figure:
    """Training examples that each row of the adapter learned from: counted (line), expected from p_B (dots)."""
    figure, axes = panel()
    look = {one.label: found for one, found in zip(counts, looks(one.method for one in counts).values(), strict=True)}
    for one in counts:
        rows, style = range(1, len(one.counted) + 1), look[one.label]
        axes.plot(rows, one.counted, "-", color=style.colour, drawstyle="steps-mid", label=one.label)
        if one.expected:
            axes.plot(rows, one.expected, ":", color=style.colour, label=f"{one.label}, expected")
    axes.set_xlabel("row of the adapter")
    axes.set_ylabel("updates, training examples")
    axes.set_ylim(bottom=0)
    _rows_axis(axes, max(len(one.counted) for one in counts))
    axes.set_title("line: counted; dots: expected from p_B", loc="left", fontsize=8)
    label_ends(axes, {one.label: one.counted[-1] for one in counts}, look)
    return figure


def _rows_axis(axes: Axes, r_max: int) -> None:
    axes.set_xticks([1, *(r_max * i // 4 for i in range(1, 5))] if r_max >= 8 else range(1, r_max + 1))


@styled
def training(lines: Sequence[dict]) -> Figure:
    """A cell's training loss, and below it the ranks drawn, over optimizer steps."""
    figure = Figure(figsize=(4.4, 3.4), layout="constrained")
    loss, rank = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    steps = [line["step"] for line in lines]
    loss.plot(steps, [line["loss"] for line in lines], "-", color=BLUE, label="training loss")
    loss.set_ylabel("training loss")
    drawn = sorted({(line["step"], b) for line in lines for b in line["ranks"]})
    rank.plot(*zip(*drawn, strict=True), ".", color=VERMILLION, markersize=6, label="rank drawn")
    rank.set_ylabel("rank drawn")
    rank.set_ylim(bottom=0)
    rank.set_xlabel("optimizer step")
    rank.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    return figure


@styled
def resources(lines: Sequence[dict]) -> Figure:
    """A cell's speed of training, and below it the most memory used so far, over optimizer steps."""
    figure = Figure(figsize=(4.4, 3.4), layout="constrained")
    speed, memory = figure.subplots(2, sharex=True)
    steps = [line["step"] for line in lines]
    speed.plot(steps, [line["tokens_per_second"] for line in lines], "-", color=BLUE, label="tokens a second")
    speed.set_ylabel("tokens a second")
    # Logs written before memory was logged have none.
    so_far = [line.get("peak_memory_bytes", nan) / GIB for line in lines]
    memory.plot(steps, so_far, "-", color=VERMILLION, drawstyle="steps-post", label="peak memory")
    memory.set_ylabel("peak memory, GiB")
    memory.set_xlabel("optimizer step")
    memory.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (speed, memory):
        axes.set_ylim(bottom=0)
    figure.align_ylabels()
    return figure


@styled
def heldout_over_steps(seen: Sequence[dict]) -> Figure:
    """Held-out loss at each rank over optimizer steps; `seen` are the lines of a log that have it."""
    figure, axes = panel()
    ranks = sorted(map(int, seen[0]["heldout"]))
    look = {f"rank {rank}": one for rank, one in zip(ranks, cycle(RANK_LOOKS), strict=False)}
    for rank, (name, one) in zip(ranks, look.items(), strict=True):
        losses = [line["heldout"][str(rank)] for line in seen]
        axes.plot([line["step"] for line in seen], losses, color=one.colour, marker=one.marker, label=name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("held-out loss, nats a token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_ends(axes, {name: seen[-1]["heldout"][name.split()[1]] for name in look}, look)
    return figure


@styled
def memory_by_part(forecasts: dict[str, dict[str, int]]) -> Figure:
    """Peak training memory: a bar for each label, stacked by part (bytes), against the sizes of GPUs."""
    figure, axes = panel(width=6.4, height=1.6 + 0.45 * len(forecasts))
    parts = list(dict.fromkeys(part for sizes in forecasts.values() for part in sizes))
    left = dict.fromkeys(forecasts, 0.0)
    for place, part in enumerate(parts):
        widths = [forecasts[label].get(part, 0) / GIB for label in forecasts]
        colour, hatch = PART_COLOURS[place % len(PART_COLOURS)], HATCHES[place % len(HATCHES)]
        axes.barh(
            list(forecasts), widths, left=[*left.values()], color=colour, hatch=hatch, edgecolor=INK, linewidth=0.4,
            height=0.6, label=PARTS.get(part, part),
        )  # fmt: skip
        left = {label: left[label] + width for label, width in zip(forecasts, widths, strict=True)}
    _gpu_lines(axes, max(left.values()))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("peak memory of training, GiB")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _gpu_lines(axes: Axes, most: float) -> None:
    """A line for each GPU size up to the first that is large enough for all."""
    shown = [size for size in GPUS.values() if size < most]
    shown += [size for size in GPUS.values() if size >= most][:1]
    for name, size in GPUS.items():
        if size in shown:
            axes.axvline(size, color=INK, linewidth=1)
            axes.text(size, 1.01, name, transform=axes.get_xaxis_transform(), ha="center", fontsize=7)
