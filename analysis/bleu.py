"""Corpus BLEU as a mean over items, so that it is resampled, paired and averaged like any other score.

BLEU of a corpus is a function of summed n-gram counts, not a mean of the items' own BLEU. Its jackknife
pseudo-values (Tukey 1958; Efron and Tibshirani 1993, section 11.5) are: their spread is the item's influence
on the corpus' score. They may lie outside 0..1.
"""

import numpy as np
from sacrebleu.metrics import BLEU


def corpus_bleu(counts: np.ndarray) -> float:
    """BLEU in 0..1 from summed counts (10,): length, reference length, 4 n-gram matches, 4 n-gram totals."""
    length, reference, *grams = (int(count) for count in counts)
    return BLEU.compute_bleu(grams[:4], grams[4:], length, reference, smooth_method="exp").score / 100


def pseudo_values(counts: np.ndarray) -> np.ndarray:
    """Each item's pseudo-value, shape (items,), shifted so that their mean is the corpus' BLEU (without the
    jackknife's correction of bias), from the items' counts, shape (items, 10)."""
    whole = counts.sum(axis=0)
    without = np.array([corpus_bleu(whole - item) for item in counts]) if len(counts) > 1 else np.zeros(1)
    return corpus_bleu(whole) + (len(counts) - 1) * (without.mean() - without)
