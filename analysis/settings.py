"""Table 4: the hyper-parameters of every experiment, from resolved configurations, and where each value is from."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import pandas as pd

from analysis.grid import DATA_NAMES, METHODS, key
from analysis.layout import Block, Cell, Row, Table
from analysis.published import hyper_parameters

NAMES = {"table1": "Table 1", "table2": "Table 2", "table3": "Table 3", "semi_sorted": "Semi-sorted"}
QLORA, OURS = "†", "‡"
ATTRIBUTES = ("model", "data", "method")  # of a cell; a value may depend on one or two of them


def table4(configs: Mapping[str, Sequence[dict]], known: pd.DataFrame | None = None) -> Table:
    """One row a setting, one column an experiment; where its cells differ, each value says for which.

    `configs` holds for each table the resolved configurations of its cells (plain dicts). ValueError for none, or
    configurations of more than one scale.
    """
    known = hyper_parameters() if known is None else known
    scales = {config["scale"] for some in configs.values() for config in some}
    if len(scales) != 1:
        raise ValueError(f"settings of one scale are needed, not of {sorted(scales)}")
    rows = []
    for row in known.itertuples():
        cells = tuple(Cell(text=_text(row, some)) for some in configs.values())
        rows.append(Row((row.label, _paper(row)), cells))
    header = ("setting", "the paper", *(NAMES.get(name, name) for name in configs))
    title = f"Table 4 (scale {scales.pop()}: hyper-parameters of every experiment)"
    return Table(title, header, (Block("Resolved from the configuration", tuple(rows)),), tuple(_notes(known)))


def _notes(known: pd.DataFrame) -> Iterator[str]:
    yield (
        "the paper: what its text states; its own table of hyper-parameters is in no source we have. It says that "
        "QLoRA's settings were used."
    )
    yield f"{QLORA}: QLoRA's value, assumed and not known to be the paper's. {OURS}: ours. Unmarked: the paper's."
    for source, rows in known[known.source.notna()].groupby("source", sort=False):
        yield f"{source}: {', '.join(rows.label)}."


def _paper(row) -> str:
    return "" if pd.isna(row.paper) else str(row.paper).replace("|", " or ")


def _text(row, configs: Sequence[dict]) -> str:
    """The setting's value in a table's cells, marked by its origin; several with the cells they hold for."""
    cells = [({name: _name(config, name) for name in ATTRIBUTES}, _marked(row, config)) for config in configs]
    values = list(dict.fromkeys(value for _, value in cells))
    if len(values) == 1:
        return values[0]
    by = _explaining(cells)
    if by is None:  # swept within the table
        return "; ".join(values)
    holds = {
        value: list(dict.fromkeys("/".join(cell[name] for name in by) for cell, found in cells if found == value))
        for value in values
    }
    if len(by) > 1:  # a long list for the commonest value says no more than this
        commonest = max(values, key=lambda value: len(holds[value]))
        holds = {value: holds[value] for value in values if value != commonest} | {commonest: ["otherwise"]}
    return "; ".join(f"{value} ({', '.join(where)})" for value, where in holds.items())


def _explaining(cells: Sequence[tuple[dict, str]]) -> tuple[str, ...] | None:
    """The fewest attributes of a cell that its value follows from, None if it follows from none."""
    for count in range(1, len(ATTRIBUTES) + 1):
        for by in combinations(ATTRIBUTES, count):
            found: dict[tuple, set] = {}
            for cell, value in cells:
                found.setdefault(tuple(cell[name] for name in by), set()).add(value)
            if all(len(values) == 1 for values in found.values()):
                return by
    return None


def _name(config: dict, attribute: str) -> str:
    name = config[attribute]["name"]
    return {"data": DATA_NAMES.get(key(name), name), "method": METHODS.get(name, name)}.get(attribute, name)


def _marked(row, config: dict) -> str:
    if config["method"]["bits"] != 4 and row.setting in ("method.quant_type", "method.double_quant"):
        return "none"
    value = _show(_at(config, row.setting), config)
    if not pd.isna(row.paper) and value in map(_plain, row.paper.split("|")):
        return value
    return f"{value} {QLORA if value == _qlora(row, config) else OURS}"


def _qlora(row, config: dict) -> str | None:
    """QLoRA's value: one for all, or that of its Table 9 for the model's size and the kind of data."""
    if pd.isna(row.qlora):
        return None
    if not str(row.qlora).startswith("recipe:"):
        return _plain(row.qlora)
    recipe, name = config["model"].get("recipe") or {}, row.qlora.removeprefix("recipe:")
    value = recipe.get(name, recipe.get(config["data"]["recipe"], {}).get(name))
    return None if value is None else _show(value, config)


def _at(config: dict, path: str):
    for name in path.split("."):
        config = config[name]
    return config


def _show(value, config: dict) -> str:
    if isinstance(value, dict):  # by benchmark: those the cell is scored on
        return ", ".join(str(value[name]) for name in config["tasks"]["benchmarks"])
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return _plain(str(value))


def _plain(text: str) -> str:
    """One spelling for a number."""
    try:
        return f"{float(text):g}"
    except ValueError:
        return text
