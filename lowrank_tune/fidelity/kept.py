"""What the language model answered, on disk: in a study's `fidelity/`, an atomic JSON file a question and image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lowrank_tune.errors import InputError
from lowrank_tune.features.asked import Asked
from lowrank_tune.fidelity.ways import Wanted
from lowrank_tune.files import read_fields, read_json, write_json

FOLDER = "fidelity"
"""In a study's folder."""
MODEL, PIXELS = "model.json", "pixels.json"
"""In it: whose answers these are; and whether X is what the model's own encoder makes of the pixels."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What one form of an image gave on one question; `reason` says why nothing, the rest being 0."""

    kl: float = 0.0  # as in `FidelityRow`
    first: bool = False  # the answer's first token is another one
    flip: bool = False  # the whole greedy answer is another one
    delta: float = 0.0  # log-likelihood of the answer that X gives, less X's own
    text: str = ""  # the answer; of one that did not flip X's
    bytes: int = 0  # where they differ from image to image
    error: float = 0.0  # ‖X − X̂‖ / ‖X‖
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Kept:
    """One question about one image."""

    key: str  # the image's
    question: str
    ids: tuple[int, ...] = ()  # X's own greedy answer; empty before it was asked
    answer: str = ""
    cut: bool = False  # whether it is longer than `max_new_tokens`
    replies: dict[str, Reply] = field(default_factory=dict)  # by `Wanted.key`

    def lacks(self, wanted: Iterable[Wanted]) -> list[Wanted]:
        """Those that were not asked yet."""
        return [each for each in wanted if each.key not in self.replies]


_KEPT = TypeAdapter(Kept)


def place(study_dir: Path, key: str, question: str) -> Path:
    """The file of a question about an image."""
    return study_dir / FOLDER / f"{key[:16]}-{hashlib.sha256(question.encode()).hexdigest()[:8]}.json"


def read_kept(study_dir: Path, key: str, asked: Asked) -> Kept:
    """What is on file of a question; nothing where it was not asked, or its file is damaged: it is asked again."""
    try:
        kept = _KEPT.validate_python(read_json(place(study_dir, key, asked.question)))
        if (kept.key, kept.question) == (key, asked.question):
            return kept
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return Kept(key, asked.question)


def write_kept(study_dir: Path, kept: Kept) -> None:
    """Write a question's file, whole or not at all."""
    write_json(place(study_dir, kept.key, kept.question), asdict(kept), indent=None)


def same_model(study_dir: Path, identity: dict[str, Any]) -> None:
    """Remember whose answers these are; an InputError where those on file are of another language model."""
    path = study_dir / FOLDER / MODEL
    known = read_fields(path)
    if path.is_file() and not known:
        raise InputError(
            f"{path}: is damaged, and whose answers lie beside it is not known; remove {path.parent}, and all is asked "
            "anew"
        )
    differ = [
        f"{name} {known[name]} there and {identity.get(name)} now"
        for name in known
        if known[name] != identity.get(name)
    ]
    if differ:
        raise InputError(
            f"{path.parent}: holds another language model's answers ({', '.join(differ)}); take that model again, or "
            "remove the folder, and all is asked anew"
        )
    if not known:
        path.parent.mkdir(exist_ok=True)
        write_json(path, identity)
