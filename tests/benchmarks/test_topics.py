from collections import Counter

import numpy as np

from benchmarks.federated.topics import direction, topics, vectors

THEMES = [
    ("goal", "match", "striker", "league", "coach", "keeper", "penalty", "stadium"),
    ("galaxy", "orbit", "planet", "telescope", "comet", "nebula", "lunar", "eclipse"),
    ("violin", "opera", "sonata", "tenor", "chorus", "melody", "cello", "quartet"),
    ("tariff", "dividend", "shares", "bond", "inflation", "broker", "profit", "merger"),
]


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    themes = rng.permutation(np.arange(count) % 4)
    return [" ".join(rng.choice(THEMES[t], 5)) for t in themes], themes


def test_topics_find_themes_and_are_of_equal_size():
    found, themes = texts(80)
    named = topics(found, 2)
    assert set(Counter(named).values()) == {20}
    assert set(named) == {f"topic {i}" for i in range(4)}
    # At least 85 of 100 texts lie with the commonest theme of their topic; chance alone would give about 35.
    pairs = Counter(zip(named, themes, strict=True))
    top = {t: max(n for (name, _), n in pairs.items() if name == t) for t in set(named)}
    assert sum(top.values()) / 80 > 0.85
    assert named == topics(found, 2)


def test_sizes_differ_by_little_and_words_everywhere_weigh_nothing():
    found, _ = texts(83)
    assert max(Counter(topics(found, 3)).values()) - min(Counter(topics(found, 3)).values()) <= 2
    same = vectors(["common words"] * 30 + ["zebra"])
    assert not same[:30].any()
    assert np.linalg.norm(same[30]) > 0.999
    assert topics([], 2) == []
    assert topics(["", ""], 1) == ["topic 0", "topic 1"]


def test_the_direction_is_the_first_principal_axis():
    points = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    points[:, 2] *= 5
    centred = points - points.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    found = direction(points)
    cosine = found @ (u[:, 0] * s[0]) / np.linalg.norm(found) / s[0]
    assert abs(cosine) > 0.9999
