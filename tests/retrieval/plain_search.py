"""The index's search in plain Python, written apart from it: every row is compared and every word counted, one at a time."""

import math
from fractions import Fraction


def bm25(documents, terms, k1=1.2, b=0.75):
    """The score of every document (a list of words) that has one of the terms, by its place. Empty ones do not count."""
    count = sum(map(bool, documents))
    mean = sum(map(len, documents)) / max(count, 1)
    scores = {}
    for place, words in enumerate(documents):
        total = 0.0
        for term in terms:
            repeats, having = words.count(term), sum(term in other for other in documents)
            if repeats:
                idf = math.log(1 + (count - having + 0.5) / (having + 0.5))
                total += idf * repeats * (k1 + 1) / (repeats + k1 * (1 - b + b * len(words) / mean))
        if any(term in words for term in terms):
            scores[place] = total
    return scores


def ranked(scores, same=1e-6):
    """{id: rank}, equal scores sharing the better rank."""
    order = sorted(scores, key=lambda name: -scores[name])
    ranks = {}
    for place, name in enumerate(order, start=1):
        before = order[place - 2] if place > 1 else None
        ranks[name] = ranks[before] if before is not None and scores[before] - scores[name] <= same else place
    return ranks


def search(rows, documents, vectors, terms, phrases=(), keep=lambda row: True):
    """{id: (score, ranks, scores)} of every row that some evidence ranks. documents: each row's words."""
    allowed = [keep(row) and all(phrase.lower() in row.words.lower() for phrase in phrases) for row in rows]
    evidence = {}
    for space, query in vectors.items():
        having = [row for row, good in zip(rows, allowed, strict=True) if good and getattr(row, space) is not None]
        evidence[space] = {row.id: sum(float(a) * float(b) for a, b in zip(getattr(row, space), query, strict=True)) for row in having}
    if terms or phrases:
        scores = bm25(documents, terms)
        evidence["words"] = {row.id: scores.get(place, 0.0) for place, row in enumerate(rows) if allowed[place] and (phrases or place in scores)}
    hits = {}
    for name, scores in evidence.items():
        for row, rank in ranked(scores).items():
            hit = hits.setdefault(row, [Fraction(0), {}, {}])
            hit[0] += Fraction(1, 60 + rank)
            hit[1][name], hit[2][name] = rank, scores[row]
    return {row: (float(score), ranks, scores) for row, (score, ranks, scores) in hits.items()}
