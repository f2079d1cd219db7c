"""What the language model still sees of a study's test images: asked, counted, said and kept."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from PIL import Image
from pydantic import TypeAdapter

from lowrank_tune.comparison.methods import reason_of
from lowrank_tune.config.fidelity import FidelitySpec
from lowrank_tune.config.plan import Plan
from lowrank_tune.config.source import TensorSource
from lowrank_tune.errors import InputError
from lowrank_tune.features.asked import Questions, image_questions
from lowrank_tune.features.commits import UnusableError
from lowrank_tune.features.decoding import decode_image
from lowrank_tune.features.extract import plan_encoding
from lowrank_tune.features.groups import image_groups
from lowrank_tune.features.images import read_original
from lowrank_tune.features.shards import Notes, Progress
from lowrank_tune.fidelity.figures import fewer_flips, fold, table_of
from lowrank_tune.fidelity.job import Asking, Item, ask_all, lacking
from lowrank_tune.fidelity.kept import FOLDER, PIXELS, Kept, read_kept, same_model
from lowrank_tune.fidelity.ways import SVD, Wanted, bytes_of, wanted_forms
from lowrank_tune.fidelity.words import TRAINED, fidelity_words, stays_from
from lowrank_tune.files import read_fields, write_json, write_whole
from lowrank_tune.lowrank.data import spread
from lowrank_tune.measured import FACTORS, Comparison, Fidelity, FidelityExample, FidelityRow
from lowrank_tune.records import FeatureSet, Split, TrialOutcome
from lowrank_tune.runtime import ray_session

ROWS, NOTES = "fidelity.json", "fidelity_notes.json"
EXAMPLES = 5
PICTURE_SIDE = 224
"""Of an example's picture, in pixels."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a study has of itself when its comparison is made."""

    plan: Plan
    features: FeatureSet
    split: Split
    outcomes: tuple[TrialOutcome, ...]
    comparison: Comparison


def measure_fidelity(
    study: Measured,
    asked: FidelitySpec | None,
    *,
    note: Notes = lambda text: None,
    progress: Progress = lambda done, total: None,
    address: str | None = None,
) -> Fidelity | None:
    """`ask_fidelity`, but that whatever breaks costs a study these figures alone, and is told in the remarks.

    None where the study file asks nothing.
    """
    if asked is None:
        return None
    try:
        return ask_fidelity(study, asked, note=note, progress=progress, address=address)
    except Exception as error:
        said = f"what the language model still sees is left out: {reason_of(error)}"
        note(said)
        return Fidelity(remarks=(said,))


def ask_fidelity(
    study: Measured,
    asked: FidelitySpec,
    *,
    note: Notes = lambda text: None,
    progress: Progress = lambda done, total: None,
    address: str | None = None,
) -> Fidelity:
    """Ask the language model what was not asked yet, and write `fidelity.json` and what is said of it.

    Where nothing is lacking no Ray is started and no weight is loaded.

    Args:
        study: its features, trials and comparison.
        asked: what is asked of how many images.
        note: called with a sentence where there is something to wait for.
        progress: called with the number of images done and their total.
        address: the Ray to start or to join where the caller has none.

    Raises:
        InputError: the questions, the checkpoint or the images cannot be used.
        CacheError: features cannot be read.
        LowrankTuneError: the workers stopped.
    """
    # It loads transformers, which whoever only reads figures need not wait for.
    from lowrank_tune.fidelity.model import identity_of

    plan, features = study.plan, study.features
    if isinstance(plan.spec.features.source, TensorSource):
        raise InputError(
            "fidelity needs images and a checkpoint, and of ready tensors neither is known; extract features of images"
        )
    questions = image_questions(features, asked)
    groups = image_groups(features, plan.spec.split.group_by)
    items = _items(study, asked, questions, groups)
    wanted = wanted_forms(study.comparison, asked, features)
    encoding = plan_encoding(plan.spec.features, plan.features_root)
    if Path(encoding.directory).name != features.fingerprint:
        raise InputError(f"{encoding.encoder} is not what it was when it made these features")
    identity = identity_of(plan.spec.features, plan.features_root)
    same_model(plan.study_dir, identity | {"max_new_tokens": asked.max_new_tokens})
    asking = Asking(plan, asked, features, study.split, study.outcomes, wanted, encoding)
    problems = list[str]()
    if left := lacking(asking, items):
        note(f"asking the language model about {len(items)} test images in {len(wanted)} forms each")
        with ray_session(address):
            problems = ask_all(asking, left, len(items), note, progress)
    keys = {item.image: features.rows[item.image].key for item in items}
    answered = [read_kept(plan.study_dir, keys[item.image], each) for item in items for each in item.questions]
    right = {(keys[item.image], each.question): each for item in items for each in item.questions}
    table = table_of(answered, wanted, {keys[item.image]: groups[item.image] for item in items}, right)
    rows = fold(table, wanted, lambda each: bytes_of(each, study.comparison.rows, features))
    compared = study.comparison.rows
    fidelity = Fidelity(
        rows=rows,
        examples=tuple(_examples(study, answered, wanted)),
        model=f"{encoding.encoder} ({encoding.weights} weights)",
        words=fidelity_words(rows, compared, features.tokens, lambda one, other: fewer_flips(table, one, other)),
        remarks=tuple(_remarks(study, asked, questions, items, answered, wanted, problems)),
    )
    write_fidelity(plan.study_dir, fidelity)
    return fidelity


def write_fidelity(study_dir: Path, fidelity: Fidelity) -> None:
    """Write the rows, a list by contract, and beside them what is said of them."""
    write_json(study_dir / ROWS, [asdict(row) for row in fidelity.rows])
    write_json(study_dir / NOTES, asdict(replace(fidelity, rows=())))


def read_fidelity(study_dir: Path) -> Fidelity | None:
    """Read what `write_fidelity` wrote; None where it did not, or its files are damaged: they can be made again."""
    try:
        rows = TypeAdapter(tuple[FidelityRow, ...]).validate_json((study_dir / ROWS).read_bytes())
        return replace(TypeAdapter(Fidelity).validate_json((study_dir / NOTES).read_bytes()), rows=rows)
    except (OSError, ValueError):
        return None


def _items(study: Measured, asked: FidelitySpec, questions: Questions, groups: Sequence[str]) -> list[Item]:
    """The test images that are asked about, spread over groups: more of them are these and some others."""
    keys = [row.key for row in study.features.rows]
    able = [image for image in study.split.test if keys[image] in questions.by_image]
    if not able:
        raise InputError(
            "fidelity.questions: no test image has a question; raise split.test, or ask a text of them all"
        )
    places = spread([groups[image] for image in able], asked.images, study.plan.spec.seed)
    return [Item(able[place], questions.by_image[keys[able[place]]]) for place in sorted(places)]


def _remarks(
    study: Measured,
    asked: FidelitySpec,
    questions: Questions,
    items: Sequence[Item],
    answered: Sequence[Kept],
    wanted: Sequence[Wanted],
    problems: Sequence[str],
) -> Iterator[str]:
    tested = len(study.split.test)
    yield f"{len(answered)} questions about {len(items)} of {tested} test images were asked"
    if study.features.weights == "random":
        yield "random weights: what the language model answers shows the pipeline, not the science"
    if questions.blank:
        yield f"{questions.blank} of the images' records have no question and are left out"
    if asked.answers and (without := sum(not each.answers for item in items for each in item.questions)):
        yield f"{without} of the questions have no right answer on file, and no part in the accuracy"
    if cut := sum(each.cut for each in answered):
        yield (
            f"{cut} of {len(answered)} answers are longer than max_new_tokens, {asked.max_new_tokens}, and are cut: "
            "what follows is not compared"
        )
    if pixels := read_fields(study.plan.study_dir / FOLDER / PIXELS):
        yield str(pixels["said"])
    for each in wanted:
        reasons = Counter(own.replies[each.key].reason for own in answered if each.key in own.replies)
        del reasons[""]
        if left_out := reasons.total():
            name = f"{each.method}{f', rank {each.rank},' if each.rank else ''} as {each.form}"
            yield f"{name} is left out of {left_out} of {len(answered)} questions: {reasons.most_common(1)[0][0]}"
    if problems:
        yield problems[0] + (f"; and {len(problems) - 1} more such images" if problems[1:] else "")


def _examples(study: Measured, answered: Sequence[Kept], wanted: Sequence[Wanted]) -> Iterator[FidelityExample]:
    """Questions whose answers the ranks tell apart, of one image each; then others."""
    chosen = {(row.method, row.rank) for row in study.comparison.rows if row.chosen}
    factors = [each for each in wanted if each.form == FACTORS]
    lines = {
        SVD: [each for each in factors if each.method == SVD],
        TRAINED: [each for each in factors if (each.method, each.rank) in chosen],
    }

    def flips(own: Kept) -> int:
        of = [own.replies[each.key].flip for line in lines.values() for each in line if each.key in own.replies]
        return min(sum(of), len(of) - sum(of))

    shown = set[str]()
    for own in sorted(answered, key=flips, reverse=True):
        if own.key in shown:
            continue
        if len(shown) == EXAMPLES:
            return
        picture = _picture(study, own.key)
        if picture is None:
            continue
        shown.add(own.key)
        replies = {
            name: {each.rank: own.replies[each.key] for each in line if each.key in own.replies}
            for name, line in lines.items()
        }
        yield FidelityExample(
            key=own.key,
            picture=picture,
            question=own.question,
            answer=own.answer,
            answers={name: {rank: reply.text for rank, reply in of.items()} for name, of in replies.items()},
            stays_from={
                name: stays_from([(rank, float(reply.flip)) for rank, reply in of.items()])
                for name, of in replies.items()
            },
        )


def _picture(study: Measured, key: str) -> str | None:
    """A small JPEG of an image, below the study's folder; None where its file is gone."""
    path = study.plan.study_dir / FOLDER / f"{key[:16]}.jpg"
    spec = study.plan.spec.features
    try:
        square_HWC = decode_image(read_original(study.features, key), spec.encoder.image_size, spec.max_pixels)
    except (OSError, UnusableError):
        return None
    file = io.BytesIO()
    Image.fromarray(square_HWC).resize((PICTURE_SIDE, PICTURE_SIDE)).save(file, "jpeg", quality=85)
    write_whole(path, lambda place: place.write_bytes(file.getvalue()))
    return str(path.relative_to(study.plan.study_dir))
