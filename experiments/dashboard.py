"""Create or renew the W&B dashboard of all runs of the project:  python -m experiments.dashboard

It is a saved view of W&B's workspace: the panels below, runs grouped by table and cell. A view's layout is no
documented format; this one follows W&B's own package wandb-workspaces. What is posted has been checked against a
stand-in for the server and against the series of real runs, but never on a W&B server.
"""

from __future__ import annotations

import json

from eval.benchmarks import BENCHMARKS
from experiments.cli import command
from experiments.mistakes import ConfigError
from experiments.schema import Config

NAME = "nw-qdylora-v"  # how W&B names saved views; the middle is what their address shows
TITLE = "QDyLoRA: training and scores by rank"
BY_RANK = "Scores by rank"
FIND = """query View($entity: String, $project: String, $name: String) {
  project(name: $project, entityName: $entity) {
    allViews(viewType: "project-view", viewName: $name) { edges { node { id } } }
  }
}"""
SAVE = """mutation SaveView($id: ID, $entity: String, $project: String, $name: String, $title: String, $spec: String) {
  upsertView(input: {id: $id, entityName: $entity, projectName: $project, type: "project-view", name: $name,
    displayName: $title, spec: $spec}) { view { id } }
}"""


def sections(ranks: list[int]) -> dict[str, dict[str, list[str]]]:
    """Section -> panel -> the series in it; see `tracker.series` and `tracker.scores`."""
    return {
        "Training": {
            "training loss": ["train/loss"],
            "rank drawn": ["train/rank"],
            "held-out loss at each rank": [f"heldout_loss/rank_{b}" for b in ranks],
            "tokens per second": ["train/tokens_per_second"],
            "peak memory, GiB": ["train/peak_memory_gib"],
        },
        BY_RANK: {
            "held-out loss": ["score/heldout_loss"],
            **{
                f"{name}, {split}": [f"score/{name}_{split}"] for name in BENCHMARKS for split in ("test", "validation")
            },
        },
    }


def spec(ranks: list[int]) -> dict:
    """The view as W&B stores it, with every key that wandb-workspaces sends for a view of this kind."""
    shown = [_section(name, panels) for name, panels in sections(ranks).items()]
    bank = {"state": 1, "settings": {"autoOrganizePrefix": 2, "sortAlphabetically": False}, "sections": shown}
    return {
        "section": {
            "name": "",
            "panelBankConfig": bank,
            "panelBankSectionConfig": _section("Report Panels", {}) | {"type": "grid", "pinned": False},
            "customRunColors": {},
            "runSets": [_runs()],
            "settings": {"xAxis": "_step", "smoothingType": "none", "smoothingWeight": 0},
            "openRunSet": 0,
            "openViz": True,
        },
        "vizExpanded": False,
        "libraryExpanded": True,
    }


def _runs() -> dict:
    """The list of runs, grouped by table and cell."""
    return {
        "id": "qdylora",
        "name": "Run set",
        "enabled": True,
        "grouping": [{"section": "run", "name": name} for name in ("group", "jobType")],
        "filters": {"op": "OR", "filters": [{"op": "AND", "filters": []}]},
        "sort": {"keys": [{"key": {"section": "run", "name": "createdAt"}, "ascending": False}]},
        "search": {"query": ""},
        "selections": {"root": 1, "bounds": [], "tree": []},
        "runFeed": {"version": 2, "columnVisible": {}, "columnPinned": {}, "columnWidths": {}, "columnOrder": []},
        "expandedRowAddresses": [],
    }


def _section(name: str, panels: dict[str, list[str]]) -> dict:
    return {
        "name": name,
        "isOpen": True,
        "type": "flow",
        "sorted": 0,
        "flowConfig": {"snapToColumns": True, "columnsPerPage": 3, "rowsPerPage": 2},
        "localPanelSettings": {"xAxis": "_step", "smoothingType": "none", "smoothingWeight": 0},
        "panels": [_panel(name, title, metrics) for title, metrics in panels.items()],
    }


def _panel(section: str, title: str, metrics: list[str]) -> dict:
    axis = {"xAxis": "_step", "xAxisTitle": "optimizer step"}
    if section == BY_RANK:
        axis = {"xAxis": "score/rank", "xAxisTitle": "rank", "xLogScale": True}
    return {
        "__id__": f"{section} {title}".replace(" ", "-"),
        "viewType": "Run History Line Plot",
        "config": {"chartTitle": title, "metrics": metrics} | axis,
        "layout": {"x": 0, "y": 0, "w": 8, "h": 6},
    }


def main(config: Config) -> int:
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        api = wandb.Api()
        where = {"entity": api.default_entity, "project": config.tracker.project, "name": NAME}
        ask = api._service_api.execute_graphql  # as wandb-workspaces does: there is no public way
        found = (ask(FIND, where)["project"] or {"allViews": {"edges": []}})["allViews"]["edges"]
        known = {"id": found[0]["node"]["id"]} if found else {}
        ask(SAVE, where | known | {"title": TITLE, "spec": json.dumps(spec(config.ranks.eval))})
    except (wandb.errors.Error, WandbApiFailedError) as error:
        raise ConfigError(f"W&B: {error}") from error
    print(f"{api._service_api.app_url.rstrip('/')}/{where['entity']}/{where['project']}?nw=qdylora")
    return 0


if __name__ == "__main__":
    command(main)
