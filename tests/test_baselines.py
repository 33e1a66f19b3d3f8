"""Baselines against their definitions on small logs, and the figures on MovieLens 100K."""

from collections import Counter

import numpy as np
import pytest

from ds_recsys import baselines
from ds_recsys.baselines import item_knn, popularity
from ds_recsys.data import leave_one_out, read_interactions


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """60 users whose items are skewed, repeat, and follow one another."""
    generator = np.random.default_rng(0)
    lines = []
    for user in range(60):
        start = generator.zipf(1.4) % 30
        items = [(start + step * generator.integers(1, 3)) % 30 for step in range(generator.integers(2, 12))]
        lines.append(" ".join(map(str, [f"u{user}", *items])))
    path = tmp_path_factory.mktemp("log") / "log.txt"
    path.write_text("\n".join(lines) + "\n")
    interactions = read_interactions(path, "s3rec")
    return interactions, leave_one_out(interactions)


def expected(interactions, split, which, score, filter_seen, k=5):
    """The metrics of `score(history, item)`, one user and one item at a time."""
    hits, gains, reciprocal, shown = [], [], [], set()
    for user, position in zip(*split.targets(which), strict=True):
        history = interactions.sequence[split.offsets[user] : position].tolist()
        target = int(interactions.sequence[position])
        scores = {item: score(history, item) for item in range(1, interactions.num_items + 1)}
        order = sorted(scores, key=lambda item: (-scores[item], item))
        left_out = set(history) if filter_seen else set()
        rank = 1 + [item for item in order if item == target or item not in left_out].index(target)
        hits.append(rank <= k)
        gains.append(1 / np.log2(rank + 1) if rank <= k else 0)
        reciprocal.append(1 / rank)
        shown |= set([item for item in order if item not in left_out][:k])
    return {
        f"HR@{k}": np.mean(hits),
        f"NDCG@{k}": np.mean(gains),
        "MRR": np.mean(reciprocal),
        f"coverage@{k}": len(shown) / interactions.num_items,
    }


def training(interactions, split):
    return [
        interactions.sequence[first:stop].tolist()
        for first, stop in zip(split.offsets[:-1], split.train_stop, strict=True)
    ]


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("which", ["valid", "test"])
def test_popularity_by_definition(log, which, filter_seen):
    counts = Counter(item for history in training(*log) for item in history)
    result = popularity(*log, which, ks=[5], filter_seen=filter_seen)
    assert result == pytest.approx(expected(*log, which, lambda _, item: counts[item], filter_seen))


@pytest.mark.parametrize("neighbours, shrinkage, decay", [(30, 0.0, 1.0), (4, 2.0, 0.7)])
@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("which", ["valid", "test"])
def test_item_knn_by_definition(log, monkeypatch, which, filter_seen, neighbours, shrinkage, decay):
    users_of = {item: set() for item in range(1, log[0].num_items + 1)}
    for user, history in enumerate(training(*log)):
        for item in history:
            users_of[item].add(user)

    # float32, as the product computes: equal similarities must tie here and there.
    def similarity(i, j):
        norm = np.sqrt(np.float32(len(users_of[i]))) * np.sqrt(np.float32(len(users_of[j])))
        return np.float32(len(users_of[i] & users_of[j])) / (norm + np.float32(shrinkage))

    near = {}
    for i in users_of:
        others = sorted(
            (j for j in users_of if j != i and users_of[i] & users_of[j]), key=lambda j: (-similarity(i, j), j)
        )
        near[i] = {j: similarity(i, j) for j in others[:neighbours]}

    def score(history, item):
        # Rounded: the sum's order is not part of the definition.
        terms = (decay**age * float(near[i].get(item, 0)) for age, i in enumerate(reversed(history)))
        return round(sum(terms), 5)

    monkeypatch.setattr(baselines, "_BLOCK_SCORES", 250)  # many blocks of users and of items
    settings = {"neighbours": neighbours, "shrinkage": shrinkage, "decay": decay}
    result = item_knn(*log, which, ks=[5], filter_seen=filter_seen, **settings)
    assert result == pytest.approx(expected(*log, which, score, filter_seen), abs=1e-6)


def test_baselines_learn_nothing_from_held_out_items(tmp_path):
    """Items that occur only as targets have no count and no neighbour."""
    lines = [f"u{user} 1 2 3 held{user} out{user}" for user in range(12)]
    path = tmp_path / "log.txt"
    path.write_text("\n".join(lines) + "\n")
    interactions = read_interactions(path, "s3rec")
    split = leave_one_out(interactions)
    for baseline in (popularity, item_knn):
        ranks = baseline(interactions, split, "test", ks=[3], filter_seen=False)
        assert ranks["HR@3"] == 0 and ranks["coverage@3"] == 3 / interactions.num_items


def test_figures_on_ml100k(ml100k):
    interactions = ml100k
    split = leave_one_out(interactions)

    def figures(baseline, **settings):
        result = baseline(interactions, split, "test", **settings)
        return round(result["HR@10"], 4), round(result["NDCG@10"], 4)

    assert figures(popularity) == (0.0859, 0.0449)
    assert figures(item_knn) == (0.1898, 0.1052)
    assert figures(item_knn, neighbours=400, shrinkage=0.0, decay=0.8) == (0.1622, 0.0898)
    assert figures(popularity, filter_seen=False) == (0.0498, 0.0224)
    assert figures(item_knn, filter_seen=False) == (0.1124, 0.0604)
