"""The user's LoRAs as a library: read, measured and indexed (`medley index`), and asked which of them a prompt calls for.

The catalogue knows files, the index knows LoRAs: what weights its encoder has read, what behaviour was measured, and the words of all files of a
LoRA. Both lie in the user's folder and are derived data.
"""

import io
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from app import engines, settings
from app.lora_base import Base
from composition import Refused, atomic, bundled
from composition.bundled import BUNDLES
from composition.profiles.store import ProfileStore
from retrieval import behaviour, null, written
from retrieval import suggest as selection
from retrieval.cards import Card
from retrieval.catalogue import Catalogue, OnFile, Reading, Scan
from retrieval.index import ANY, Index
from retrieval.judge import Judge
from retrieval.linear import LinearEncoder
from retrieval.phrases import in_words_of, split
from retrieval.ridge import Lora
from retrieval.rows import SPACES, Filter, Hit, Row, Space
from retrieval.sketch import Sketch, packed, unpacked
from retrieval.suggest import CHANCE, MOST, Candidate, Queries, Suggestion
from retrieval.words import parse

if TYPE_CHECKING:
    from composition.loras.kinds.lora import Factors
    from composition.loras.safetensors import SafeFile

NEAREST = 50  # rows that a search fetches for each phrase
BATCH = 1000  # rows written at a time


class Indexed(NamedTuple):
    """What is in the index. loras: of whatever base; fitting: those for this base; with_behaviour, with_weights: of those, with these vectors."""

    loras: int
    fitting: int
    with_behaviour: int
    with_weights: int


class Example(NamedTuple):
    """One LoRA to learn from: its factors or its sketch. texts: what is written of it. direction: that of its behaviour, None where it was not measured."""

    id: str
    lora: Lora
    texts: tuple[str, ...]
    direction: Float[np.ndarray, " D"] | None


class Library:
    """The LoRAs in some folders, and those bundled with a model, as that model can use them.

    judge: whose texts and pictures behaviours and prompts are compared in. encoder: of weights, None where there is none for this base.
    """

    def __init__(self, model: str, folders: Sequence[Path] = (), *, judge: str = "pocket", encoder: Path | None = None) -> None:
        self.model, self.folders = model, tuple(folders)
        self._judge, self._encoder = judge, encoder
        self.place = settings.home() / "library"
        self.catalogue: Catalogue = engines.catalogue()
        self.profiles = ProfileStore(settings.home() / "profiles")

    @cached_property
    def base(self) -> Base:
        return Base.of(self.model)

    @cached_property
    def judge(self) -> Judge:
        return Judge.open(self._judge)

    @cached_property
    def encoder(self) -> LinearEncoder | None:
        """That of this base, when it reads the judge's texts: the user's own (`medley train retriever`) before the bundled one."""
        for folder in (self._encoder,) if self._encoder else (self.trained, bundled.path("pocket128/encoder")):
            if folder.is_dir():
                encoder = LinearEncoder.open(folder)
                if (encoder.settings.base, encoder.settings.judge) == (self.base.name, self.judge.name):
                    return encoder
        return None

    @property
    def trained(self) -> Path:
        """The folder of the user's own encoder for this base. It may not exist."""
        return self.place / f"encoder-{_safe(self.base.name)}"

    @cached_property
    def index(self) -> Index:
        """Vectors of other encoders than ours are dropped from it: they could not be compared."""
        names: dict[Space, str] = {"behaviour": f"{self.base.model} {self.judge.name}", "text": self.judge.name}
        if self.encoder:
            names["weight"] = self.encoder.name
        index = Index(self.place / f"index-{_safe(self.base.name)}", encoders=names)
        for space, name in index.held_encoders().items():
            if space in names and name not in ("", names[space]):
                index.forget(space)
        return index

    # making it -----------------------------------------------------------------------------------------------------

    def scan(self, *, on_file: OnFile | None = None, cancel: threading.Event | None = None) -> Scan:
        """Bring the catalogue's cards up to date, from headers alone."""
        return self.catalogue.scan(self.folders, self.model, on_file=on_file, cancel=cancel)

    def read(self, *, on_file: OnFile | None = None, cancel: threading.Event | None = None) -> Reading:
        """Read whole what no pass has read: hashes, singular values, sketches. It may stop anywhere and go on later."""
        return self.catalogue.read(on_file=on_file, on_read=self._keep, cancel=cancel)

    def write(self, *, measure: Callable[[Sequence[Card]], None] | None = None) -> Indexed:
        """Bring the index up to date with the catalogue. measure: what measures and keeps behaviours of the LoRAs it is given: one file of each that
        is for the base and lacks one."""
        groups = self._groups(self.catalogue.cards())
        fitting = {tensors for tensors, cards in groups.items() if self._fits(cards)}
        if measure is not None and (lacking := [groups[tensors][0] for tensors in groups if tensors in fitting and self._behaviour(tensors) is None]):
            measure(lacking)
        rows = self._described(self._encoded([self._row(tensors, cards, tensors in fitting) for tensors, cards in groups.items()]), groups)
        self.index.delete(set(self.index.ids()) - groups.keys())
        for first in range(0, len(rows), BATCH):
            self.index.upsert(rows[first : first + BATCH])
        self.index.optimise()
        own = [row for row in rows if row.family == self.base.name]
        return Indexed(len(rows), len(own), sum(row.behaviour is not None for row in own), sum(row.weight is not None for row in own))

    def refresh(self) -> None:
        """All of that where a folder changed or nothing was indexed; else it costs a look at the folders."""
        scan = self.scan()
        if scan.added or scan.changed or scan.removed or not self.index.count(Filter(family=self.base.name)):
            self.read()
            self.write()

    def _groups(self, cards: Iterable[Card]) -> dict[str, list[Card]]:
        """The files of each LoRA by the hash of its tensors, those that can be used."""
        groups: dict[str, list[Card]] = {}
        for card in cards:
            if card.usable and card.tensor_sha256:
                groups.setdefault(card.tensor_sha256, []).append(card)
        return groups

    def _keep(self, card: Card, raw: "SafeFile", factors: "Mapping[str, Factors]") -> None:
        """The sketch of a file that was just read, or that it is for another base."""
        read = self.base.sketched(card.path, raw)
        atomic.write(self._file(card.tensor_sha256), packed(read) if read else b"")

    def _sketch(self, cards: Sequence[Card]) -> Sketch | None:
        file = self._file(cards[0].tensor_sha256)
        try:
            data = file.read_bytes()
        except OSError:
            read = self.base.sketched(cards[0].path)  # indexed for another base before
            with suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                atomic.write(file, packed(read) if read else b"")
            return read
        return unpacked(data) if data else None

    def _file(self, tensors: str) -> Path:
        folder = self.place / f"sketches-{_safe(self.base.name)}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{tensors[:40]}.sketch"

    def _fits(self, cards: Sequence[Card]) -> bool:
        """Whether a LoRA is for the base: a bundled one's layers fit, another one is of its family."""
        if self.base.name not in BUNDLES:
            return cards[0].family == self.base.family
        return self._sketch(cards) is not None

    def _behaviour(self, tensors: str) -> Any:
        with suppress(Refused):
            return self.profiles.behaviour(tensors, self.model, self.judge.name)
        return None

    def _row(self, tensors: str, cards: Sequence[Card], fits: bool) -> Row:
        """What all files of a LoRA say together."""
        first, words = cards[0], dict.fromkeys(card.words for card in cards)
        held = self._behaviour(tensors) if fits else None
        vector = np.asarray(held.direction, np.float32) if held is not None else None
        moved = vector is not None and float(np.linalg.norm(vector)) > 0.5
        triggers = dict.fromkeys(word for card in cards for word in card.words_of("header", "sidecar", "user"))
        return Row(
            id=tensors, files=tuple(str(card.path) for card in cards), name=first.name, title=next((card.title for card in cards if card.title), ""),
            family=self.base.name if fits else first.family, category=next((card.category for card in cards if card.category), ""),
            licence=first.licence, words="\n".join(words), triggers=tuple(triggers),
            behaviour=vector / np.linalg.norm(vector) if vector is not None and moved else None, strength=held.strength if held else None,
            consistency=held.consistency if held else None, updated=time.time())  # fmt: skip

    def _encoded(self, rows: Sequence[Row]) -> list[Row]:
        """With the vectors of their weights, where there is an encoder for them; those that the index has are kept."""
        if self.encoder is None:
            return list(rows)
        own = {row.id: row for row in rows if row.family == self.base.name}
        vectors = {key: row.weight for key, row in self.index.get(own).items() if row.weight is not None}
        for key, row in own.items():
            if key not in vectors and (lora := self._weights(row)) is not None and self.encoder.knows(lora):
                vectors[key] = self.encoder.encode([lora])[0].numpy()
        return [replace(row, weight=vectors[row.id]) if row.id in vectors else row for row in rows]

    def _weights(self, row: Row) -> Any:
        """A LoRA as the encoder reads it; None where it is for another base, or gone."""
        data = self._file(row.id).read_bytes()
        if not data or self.encoder is None or self.encoder.settings.reads == "sketches":
            return unpacked(data) if data else None
        return next((factors for path in row.files if (factors := self.base.factors(Path(path))) is not None), None)

    def _described(self, rows: Sequence[Row], groups: Mapping[str, Sequence[Card]]) -> list[Row]:
        """With the vectors of what is written of LoRAs for the base, as the judge reads it; what the index has of unchanged words is kept. Judges of
        few words, as Pocket's, take words that they never read for others, so theirs are not used."""
        if self.judge.thresholds:
            return list(rows)
        captions = {row.id: text for row in rows if row.family == self.base.name and (text := written.caption(groups[row.id]))}
        words = {row.id: row.words for row in rows}
        vectors = {key: row.text for key, row in self.index.get(captions).items() if row.text is not None and row.words == words[key]}
        if fresh := [key for key in captions if key not in vectors]:
            vectors |= dict(zip(fresh, self.judge.read([captions[key] for key in fresh]).numpy(), strict=True))
        return [replace(row, text=vectors[row.id]) if row.id in vectors else row for row in rows]

    def examples(self, side: int | None) -> list[Example]:
        """What an encoder can learn from: the LoRAs for the base, in the order of their hashes, with sketches of this side; None: with their factors."""
        examples = []
        for tensors, cards in sorted(self._groups(self.catalogue.cards()).items()):
            if self._fits(cards) and (read := self._sketch(cards)) is not None:
                lora: Lora | None = read.shrunk(side) if side else self.base.factors(cards[0].path)
                held = self._behaviour(tensors)
                direction = np.asarray(held.direction, np.float32) if held is not None else None
                if lora is not None:
                    examples.append(Example(tensors, lora, written.texts(cards), direction))
        return examples

    @property
    def size(self) -> int:
        """Bytes of the files that can be used, of any base."""
        return sum(card.size for card in self.catalogue.cards() if card.usable)

    # asking it -----------------------------------------------------------------------------------------------------

    def suggest(self, prompt: str, *, most: int = MOST, chance: float = CHANCE) -> list[Suggestion]:
        """The LoRAs for the model that a prompt calls for, best first; none where none fits. Raises Refused where nothing is indexed."""
        where = Filter(family=self.base.name)
        count = self.index.count(where)
        if not count:
            raise Refused(f"no LoRA for {self.model} is indexed: run `medley index` with the folders of your LoRAs first")
        queries: dict[Space, Queries] = {space: make for space, make in self._queries().items() if space in self.index.held_encoders()}
        phrases = [phrase.text for phrase in split(prompt)]
        vectors: dict[Space, Any] = {space: make(phrases) for space, make in queries.items()} if phrases else {}
        ids: dict[str, None] = {}
        for number, phrase in enumerate(phrases):
            query: dict[Space, Any] = {space: values[number] for space, values in vectors.items()}
            ids |= dict.fromkeys(hit.id for hit in self.index.search(query, phrase, where, NEAREST, fuzzy=False))
        candidates = [self._candidate(row) for row in self.index.get(ids).values()]
        nulls: dict[Space, Any] = {space: self._null(space, make) for space, make in queries.items()}
        return selection.suggest(prompt, candidates, queries, nulls, most=most, chance=chance, count=count)

    def search(self, text: str, where: Filter = ANY, most: int = 10) -> list[tuple[Row, Hit]]:
        """Rows of the index by their words or, where none has any of these, by what LoRAs do; phrases in quotes must occur. Best first, whatever their
        base."""
        words = parse(text)
        free = " ".join(words.terms) if not words.phrases else ""
        vectors: dict[Space, Any] = {space: make([free])[0] for space, make in self._queries().items() if free and space in self.index.held_encoders()}
        hits = self.index.search(vectors, text, where, most)
        hits = [hit for hit in hits if "words" in hit.ranks] or hits  # numbers alone are for what has no words
        rows = self.index.get(hit.id for hit in hits)
        return [(rows[hit.id], hit) for hit in hits if hit.id in rows]

    def paths(self, suggestion: Suggestion) -> list[Path]:
        """The files of a suggested LoRA that are there."""
        row = self.index.get([suggestion.candidate.id]).get(suggestion.candidate.id)
        return [path for path in map(Path, row.files if row else ()) if path.is_file()]

    def path(self, suggestion: Suggestion) -> Path:
        """The first of them. Raises Refused when all are gone."""
        if paths := self.paths(suggestion):
            return paths[0]
        raise Refused(f"the files of LoRA {suggestion.candidate.name!r} are gone since the last `medley index`: run it again")

    def _candidate(self, row: Row) -> Candidate:
        cards = [card for card in self.catalogue.of(row.id) if card.usable]
        tags = dict.fromkeys(tag for card in cards for tag in card.tags)
        weight = next((card.weight for card in cards if card.weight is not None), None)
        return Candidate(row.id, row.name, {space: vector for space, vector in row.vectors().items() if space in SPACES}, triggers=row.triggers,
                         tags=tuple(tags), category=row.category, weight=weight)  # fmt: skip

    def _queries(self) -> dict[Space, Queries]:
        """What makes vectors of phrases, by kind of evidence."""
        prompts = behaviour.POCKET if self.model in BUNDLES else behaviour.GENERAL

        names = list(self.judge.thresholds)

        def read(texts: Sequence[str]) -> np.ndarray:
            return self.judge.read(list(texts)).numpy()

        def directions(texts: Sequence[str]) -> np.ndarray:
            return np.stack([behaviour.direction(read, in_words_of(names, text), prompts) for text in texts])

        def known(texts: Sequence[str]) -> Any:
            return self.judge.read([in_words_of(names, text) for text in texts])

        queries: dict[Space, Queries] = {"behaviour": directions, "text": lambda texts: known(texts).numpy()}
        if self.encoder is not None:
            encoder = self.encoder
            queries["weight"] = lambda texts: encoder.read(known(texts)).numpy()
        return queries

    def _null(self, space: Space, make: Queries) -> np.ndarray:
        """Vectors of phrases of all kinds, made once and kept."""
        name = self.encoder.name if space == "weight" and self.encoder else self.judge.name if space == "text" else f"{self.model} {self.judge.name}"
        file = self.place / "nulls" / f"{space}-{_safe(name)}.npy"
        with suppress(OSError, ValueError):
            return np.load(file, allow_pickle=False)
        vectors = make(null.phrases(list(self.judge.thresholds)))
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(file, _npy(vectors))
        return vectors


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)[-80:]
