"""Numbers printed in the papers, one CSV each under `published/`, every row with its source.

Only cells that a source we have gives. The cells of QDyLoRA's own Tables 1 and 2 are not among them.
"""

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent / "published"


def qlora_table5() -> pd.DataFrame:
    """MMLU 5-shot test accuracy in percent: source, metric, num_fewshot, model, data, method, rank, value.

    The rows of method `untrained` (the model as released) have no data set and no rank.
    """
    return pd.read_csv(FOLDER / "qlora_table5.csv").astype({"rank": "Int64"})


def qdylora_table3() -> pd.DataFrame:
    """Exact match in percent: source, metric, task, model, method, rank, status (`done` or `oom`), value."""
    return pd.read_csv(FOLDER / "qdylora_table3.csv")


def hyper_parameters() -> pd.DataFrame:
    """Settings (dotted names of our configuration) as text: label, the paper's value, QLoRA's, source.

    Alternatives are separated by |; `recipe:` names a column of QLoRA's Table 9, which depends on the model's size.
    """
    return pd.read_csv(FOLDER / "hyper_parameters.csv", dtype=str)


def qlora_elo() -> pd.DataFrame:
    """QLoRA's Elo ratings: source (Table 1 or 7), benchmark, judge, system, elo, rank, interval (Table 1's +-1)."""
    return pd.read_csv(FOLDER / "qlora_elo.csv").astype({"rank": "Int64"})


def qlora_table6() -> pd.DataFrame:
    """Percent of ChatGPT's score: source, metric, system, reference_first (ChatGPT's answer shown first),
    system_first, mean, interval (half the 95% interval of the mean)."""
    return pd.read_csv(FOLDER / "qlora_table6.csv")


def qlora_agreement() -> pd.DataFrame:
    """GPT-4 against humans: source, level (`system` or `example`), statistic, value."""
    return pd.read_csv(FOLDER / "qlora_agreement.csv")
