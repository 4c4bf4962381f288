"""Okapi BM25 over a small corpus, in memory."""

import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

_WORD = re.compile(r"\w+")


class Bm25:
    """Finds documents by words.

    score(q, d) = sum over words w of q of
        idf(w) * f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|)),  f = how often w is in d
        idf(w) = ln(1 + (N - n(w) + 0.5) / (n(w) + 0.5)),           n(w) = documents with w

    Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009.
    """

    def __init__(self, documents: list[str], k1: float = 1.2, b: float = 0.75) -> None:
        self.documents, self.k1, self.b = documents, k1, b
        counts = [Counter(words(document)) for document in documents]
        self.lengths = [count.total() for count in counts]
        self.mean_length = sum(self.lengths) / max(1, len(self.lengths))
        self.postings: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for place, count in enumerate(counts):
            for word, frequency in count.items():
                self.postings[word].append((place, frequency))

    @classmethod
    def from_file(cls, path: Path) -> "Bm25":
        """Documents are the `text` of each line of a JSONL file."""
        lines = path.read_text(encoding="utf-8").splitlines()
        return cls([json.loads(line)["text"] for line in lines])

    def search(self, query: str, topk: int) -> list[str]:
        """The best documents, best first; none that shares no word with the query."""
        scores: dict[int, float] = defaultdict(float)
        for word in words(query):
            found = self.postings.get(word, [])
            idf = math.log(1 + (len(self.documents) - len(found) + 0.5) / (len(found) + 0.5))
            for place, frequency in found:
                norm = 1 - self.b + self.b * self.lengths[place] / self.mean_length
                scores[place] += idf * frequency * (self.k1 + 1) / (frequency + self.k1 * norm)
        best = sorted(scores, key=lambda place: (-scores[place], place))
        return [self.documents[place] for place in best[:topk]]


def words(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return _WORD.findall(text.lower())
