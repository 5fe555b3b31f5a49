"""Groups of items that are alike: spectral or agglomerative clusters, how many there are to be, how stable they are.

Knows similarities between 0 and 1. Refuses to know what the items are, and where similarities come from.

Source: Ng, Jordan and Weiss 2001; von Luxburg 2007, with scikit-learn's k-means; Rousseeuw 1987 (silhouette); Hubert
and Arabie 1985 (adjusted Rand); Hennig 2007 (Jaccard similarity of one cluster over bootstraps).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from jaxtyping import Float, Int

from tracer.choices import Clustering as Method

METHODS: tuple[str, ...] = get_args(Method)
ALONE = -1
"""The label of an item that is like no other."""
_STARTS = 10  # of k-means, the best kept
_INTERVAL = (0.025, 0.975)

Matrix = Float[np.ndarray, "item item"]
Labels = Int[np.ndarray, " item"]


@dataclass(frozen=True, eq=False)
class Clusters:
    """One clustering.

    Attributes:
        labels: of each item, from 0 by the first item of each; `ALONE` where it is like no other.
        scores: the mean silhouette by number of clusters, for each that was tried; None where it is not defined.
        silhouette: of each item, by distance 1 - similarity; NaN where it is not defined.
    """

    labels: Labels
    scores: dict[int, float | None]
    silhouette: np.ndarray

    @property
    def count(self) -> int:
        """Clusters."""
        return int(self.labels.max(initial=-1)) + 1


@dataclass(frozen=True)
class Stability:
    """How alike clusterings over bootstraps of the prompts are to that over all.

    Attributes:
        mean, low, high: their adjusted Rand index (1 the same, 0 as by chance): mean and 95 % of the bootstraps.
        bootstraps: how many.
        groups: of each cluster the mean Jaccard index with its best match.
    """

    mean: float
    low: float
    high: float
    bootstraps: int
    groups: tuple[float, ...]


def alone(similarity: Matrix) -> np.ndarray:
    """Which items are like no other: their similarity to all others is 0."""
    return (similarity - np.diag(np.diag(similarity))).max(axis=1, initial=0.0) <= 0


def best_of(similarity: Matrix, counts: Sequence[int], method: Method, seed: int) -> Clusters:
    """The clustering of the number of clusters that has the best mean silhouette; of two, the smaller number.

    Args:
        similarity: [item, item]: symmetric, 0 to 1.
        counts: numbers of clusters, each at most that of the items that are like another.
        seed: of k-means.
    """
    apart = alone(similarity)
    inner, labels = similarity[np.ix_(~apart, ~apart)], np.full(len(similarity), ALONE)
    cut = _cutter(inner, max(counts), method, seed)
    found = {count: cut(count) for count in sorted(set(counts))}
    scores = {count: _score(inner, own) for count, own in found.items()}
    best = max(found, key=lambda count: (-np.inf if (score := scores[count]) is None else score, -count))
    labels[~apart] = _numbered(found[best])
    silhouette = np.full(len(similarity), np.nan)
    silhouette[~apart] = _silhouette(inner, found[best])
    return Clusters(labels, scores, silhouette)


def stability(full: Clusters, similarities: Iterable[Matrix], method: Method, seed: int) -> Stability:
    """How the clustering holds when prompts are drawn again.

    Args:
        full: over all prompts; its items that are in clusters are compared, and one that is like no other in a
            bootstrap is a cluster of its own there.
        similarities: of the same items, one for each bootstrap of the prompts.
    """
    from sklearn.metrics import adjusted_rand_score

    kept = full.labels >= 0
    own, rand, jaccard = full.labels[kept], list[float](), list[list[float]]()
    for similarity in similarities:
        again = _again(similarity[np.ix_(kept, kept)], full.count, method, seed)
        rand.append(float(adjusted_rand_score(own, again)))
        jaccard.append([_best_jaccard(own == group, again) for group in range(full.count)])
    low, high = np.quantile(rand, _INTERVAL).tolist()
    groups = tuple(np.mean(jaccard, axis=0).tolist())
    return Stability(float(np.mean(rand)), low, high, len(rand), groups)


def _again(similarity: Matrix, count: int, method: Method, seed: int) -> Labels:
    """The clustering of a bootstrap, into as many clusters or as there can be."""
    apart = alone(similarity)
    labels = np.arange(len(similarity)) + count  # each of its own
    if (n_inner := int((~apart).sum())) > 0:
        labels[~apart] = best_of(similarity, [min(count, n_inner)], method, seed).labels[~apart]
    return labels


def _best_jaccard(members: np.ndarray, labels: Labels) -> float:
    return max(
        float((members & (labels == label)).sum() / (members | (labels == label)).sum())
        for label in np.unique(labels[members])
    )


def _numbered(labels: Labels) -> Labels:
    """Clusters numbered by their first items."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _cutter(similarity: Matrix, most: int, method: Method, seed: int) -> Callable[[int], Labels]:
    """What splits the items into a number of clusters, at most `most`."""
    if method == "agglomerative":
        return functools.partial(_agglomerated, similarity)
    return functools.partial(_by_k_means, _embedding(similarity, min(most, len(similarity))), seed=seed)


def _agglomerated(similarity: Matrix, count: int) -> Labels:
    from sklearn.cluster import AgglomerativeClustering

    if count >= len(similarity):
        return np.arange(len(similarity))
    model = AgglomerativeClustering(n_clusters=count, metric="precomputed", linkage="average")
    return model.fit_predict(1 - similarity)


def _embedding(similarity: Matrix, most: int) -> Float[np.ndarray, "item vector"]:
    """[item, vector]: the eigenvectors of the normalised Laplacian with the smallest eigenvalues, as in scikit-learn's
    spectral clustering, by a dense solver: items fall into parts without any link, and an iterative one misses
    eigenvalues that are there several times."""
    from scipy.linalg import eigh
    from scipy.sparse.csgraph import laplacian

    normalised, root = laplacian(similarity, normed=True, return_diag=True)
    _, vectors = eigh(normalised, subset_by_index=[0, most - 1])
    return vectors / root[:, None]


def _by_k_means(embedding: Float[np.ndarray, "item vector"], count: int, seed: int) -> Labels:
    from sklearn.cluster import KMeans

    if count >= len(embedding):
        return np.arange(len(embedding))
    if count == 1:
        return np.zeros(len(embedding), np.int64)
    model = KMeans(count, random_state=seed, n_init=_STARTS)  # type: ignore[arg-type]  # the best of so many starts
    return model.fit_predict(embedding[:, :count])


def _score(similarity: Matrix, labels: Labels) -> float | None:
    found = _silhouette(similarity, labels)
    return None if np.isnan(found).any() else float(found.mean())


def _silhouette(similarity: Matrix, labels: Labels) -> np.ndarray:
    """Of each item; NaN where all are in one cluster, or each in its own."""
    from sklearn.metrics import silhouette_samples

    if not 2 <= len(np.unique(labels)) <= len(labels) - 1:
        return np.full(len(labels), np.nan)
    return np.asarray(silhouette_samples(1 - similarity, labels, metric="precomputed"))
