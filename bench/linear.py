"""The classical baseline: TF-IDF and a linear support vector machine, one intent an utterance.

It names intents only; whole frames are beyond it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.metrics import Outcome
from bench.queries import Query


def fit(texts: Sequence[str], intents: Sequence[str]) -> Any:
    """Train on words and word pairs plus character triples to quintuples; returns a scikit-learn pipeline."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline, make_union
    from sklearn.svm import LinearSVC

    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), min_df=2, sublinear_tf=True),
    )
    return make_pipeline(features, LinearSVC(random_state=1)).fit(texts, intents)


def fit_skills(train: Iterable[Query]) -> dict[str, Any]:
    """One model a skill."""
    by_skill: dict[str, list[Query]] = {}
    for query in train:
        by_skill.setdefault(query.skill, []).append(query)
    return {skill: fit([q.text for q in found], [q.intent for q in found]) for skill, found in by_skill.items()}


def outcomes(models: Mapping[str, Any], queries: Iterable[Query]) -> list[Outcome]:
    """Ask the baseline, in this process: its latencies hold no network, no server and no router."""
    results = []
    for query in queries:
        begun = time.perf_counter()
        intent = str(models[query.skill].predict([query.text])[0])
        latency_ms = (time.perf_counter() - begun) * 1000
        right = intent == query.intent and not query.slots
        results.append(Outcome(query.intent, intent, right, local=True, latency_ms=latency_ms))
    return results
