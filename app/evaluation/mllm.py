"""An optional second opinion: a multimodal language model of the user's choice compares two pictures of the same prompt.

Any OpenAI-compatible endpoint. Such judges favour a position (ComposLoRA, 2402.16843, section 5), so every pair is asked in
both orders; an answer that turns with the order counts as a tie, and how often that happens is reported.
"""

import base64
import io
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from PIL import Image

from app.evaluation import statistics
from app.evaluation.cases import key
from app.evaluation.variants import EQUAL, REFERENCES
from composition import Refused, pictures, untrusted
from composition.log import Log

LOG = "mllm.jsonl"
KEY = "MEDLEY_MLLM_KEY"
TRIES, WAIT, TIMEOUT = 4, 2.0, 120.0
POINTS = {"first": 1, "second": -1, "tie": 0}
SIDE = 512  # pixels that small pictures are enlarged to
QUESTION = (
    "Two pictures, the first and the second, were made for this prompt: {prompt!r}. Which shows better what the prompt asks "
    "for: every thing named, each with its own looks, in the place and the style named? Be critical; say tie only when "
    'neither is better. Answer with JSON alone: {{"better": "first"}}, {{"better": "second"}} or {{"better": "tie"}}.'
)


@dataclass(frozen=True)
class Endpoint:
    """Where to ask: the base address (".../v1"), the model's name, and the key (from MEDLEY_MLLM_KEY)."""

    url: str
    model: str
    key: str = ""

    @staticmethod
    def read(url: str, model: str) -> "Endpoint":
        """Raises Refused for an address that is none, or no model."""
        if not re.match(r"https?://[^/\s]+", url):
            raise Refused(f"--mllm {url}: give the endpoint's address, as http://localhost:8000/v1")
        if not model:
            raise Refused("--mllm needs --mllm-model: the model's name at that endpoint")
        return Endpoint(url.rstrip("/").removesuffix("/chat/completions"), model, os.environ.get(KEY, ""))

    def better(self, prompt: str, first: Path, second: Path) -> str:
        """"first", "second" or "tie". Raises Refused when the endpoint does not answer so."""
        pictures = [{"type": "image_url", "image_url": {"url": _data(path)}} for path in (first, second)]
        body = {"model": self.model, "temperature": 0, "max_tokens": 200,
                "messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION.format(prompt=prompt)}, *pictures]}]}  # fmt: skip
        answer = self._post(json.dumps(body).encode())
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise Refused(f"{self.url} answered without a message: {str(answer)[:200]}") from None
        match = re.search(r'"better"\s*:\s*"(first|second|tie)"', str(text).lower())
        if not match:
            raise Refused(f"{self.model} did not answer as asked: {str(text)[:200]!r}")
        return match[1]

    def _post(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        for turn in range(TRIES):
            try:
                call = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
                with urllib.request.urlopen(call, timeout=TIMEOUT) as answer:
                    return untrusted.parse(answer.read(untrusted.MAX_BYTES + 1))
            except urllib.error.HTTPError as error:
                if error.code not in (408, 429, 500, 502, 503, 504) or turn == TRIES - 1:
                    raise Refused(f"{self.url} refused ({error.code} {error.reason}): {error.read(200).decode('utf-8', 'replace')}") from None
            except (urllib.error.URLError, OSError, ValueError) as error:
                if turn == TRIES - 1:
                    raise Refused(f"{self.url} cannot be reached: {error}") from None
            time.sleep(WAIT * 2**turn)
        raise AssertionError


def _data(path: Path) -> str:
    picture = pictures.load(path).convert("RGB")
    if min(picture.size) < SIDE:
        scale = SIDE / min(picture.size)
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def compare(
    endpoint: Endpoint, folder: Path, rows: Sequence[Mapping[str, Any]], variants: Sequence[str], limit: int, *, resamples: int,
    seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every two methods on up to `limit` cases both have, each in both orders; answers are kept in mllm.jsonl.

    Returns for each two: wins of the first and second, ties, share of cases where the order decided, and the mean of
    +1, 0, -1 with its interval over groups.
    """
    log = Log(folder / LOG)
    known = {(row["model"], row["first"], row["second"]): row["better"] for row in log.rows() if {"model", "first", "second", "better"} <= set(row)}
    by = {(row["variant"], key(row)): row for row in rows}
    opinions = []
    for a, b in combinations([variant for variant in variants if variant not in REFERENCES and not variant.endswith(EQUAL)], 2):
        cases = [case for variant, case in by if variant == a and (b, case) in by][:limit]
        points, turned = [], 0
        for case in cases:
            of_a, of_b = by[a, case], by[b, case]
            votes = []
            for first, second in ((of_a, of_b), (of_b, of_a)):
                answer = (endpoint.model, first["id"], second["id"])
                if answer not in known:
                    known[answer] = endpoint.better(of_a["text"], folder / first["picture"], folder / second["picture"])
                    log.append(dict(zip(("model", "first", "second"), answer, strict=True)) | {"better": known[answer]})
                votes.append(POINTS[known[answer]] * (1 if first is of_a else -1))
            turned += votes[0] * votes[1] < 0
            points.append(float((sum(votes) > 0) - (sum(votes) < 0)) if votes[0] * votes[1] >= 0 else 0.0)
        if cases:
            mean = statistics.interval(points, [case[0] for case in cases], resamples=resamples, seed=seed)
            opinions.append({"first": a, "second": b, "first_wins": points.count(1.0), "second_wins": points.count(-1.0),
                          "ties": points.count(0.0), "order_decided": turned / len(cases), "difference": asdict(mean)})  # fmt: skip
    return opinions
