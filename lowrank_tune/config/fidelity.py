"""`fidelity` of a study file: whether the language model still answers the same from what comes back."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationInfo, field_validator

from lowrank_tune.config.axes import PositiveInt, Range, Section, Text, Whole, distinct, rejected, whole_values
from lowrank_tune.config.source import ManifestSource, TensorSource

Form = Literal["factors", "int8", "int4", "coded", "pictures"]

_Measured = Annotated[
    Annotated[PositiveInt, Tag("<rank>")] | Annotated[Form, Tag("<form>")],
    Discriminator(lambda value: "<form>" if isinstance(value, str) else "<rank>"),
]
_Some = Annotated[
    tuple[_Measured, ...],
    Field(min_length=1, json_schema_extra={"uniqueItems": True}),
    AfterValidator(distinct),
]


class FidelitySpec(Section):
    """What the language model still sees of the test images: how its answers change."""

    questions: Text
    """A manifest's column, a question a record; or a text with a space or `?` in it, which each image is asked."""
    answers: Text | None = Field(default=None, validate_default=True)
    """The column of right answers, a text or a list of several people's; without one no accuracy is measured."""
    images: PositiveInt = 64
    """Test images that are asked about, at most, spread evenly over groups."""
    max_new_tokens: Annotated[int, Field(strict=True, ge=1, le=512)] = 16
    """The longest answer; a longer one is cut, and told."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the whole model runs: `auto` takes the GPUs where there are any."""
    at: _Some | None = None
    """Ranks, and forms among factors, int8, int4, coded and pictures, that are measured; all by default."""

    @field_validator("answers")
    @classmethod
    def _asked_of_records(cls, answers: str | None, info: ValidationInfo) -> str | None:
        questions = info.data.get("questions")
        if answers is not None and is_question(answers):
            raise rejected("a column of right answers is expected, and this is a sentence: name the column")
        if answers is not None and answers == questions:
            raise rejected("the questions' own column: name the one with the right answers, or null")
        return answers

    def check(self, source: Section, rank: Whole | None) -> None:
        """Refuse what a study of this source, and of these ranks as far as they are known, cannot be asked."""
        if isinstance(source, TensorSource):
            raise rejected("it needs images and a checkpoint, and of ready tensors neither is known: remove it")
        if self.columns and not isinstance(source, ManifestSource):
            name = "answers" if is_question(self.questions) else "questions"
            remedy = "make it null" if name == "answers" else 'write the question itself, "What is in the picture?"'
            raise rejected(f"only a manifest has columns: {remedy}, or list the images in one", (name,))
        values = whole_values(rank) if rank is not None else ()
        ranged = isinstance(rank, Range) and rank.kind == "int"
        known = range(min(values), max(values) + 1) if values and ranged else values
        lacking = [place for place, each in enumerate(self.at or ()) if isinstance(each, int) and each not in known]
        if values and lacking:
            axis = f"search.space.rank has {', '.join(map(str, values))}"
            raise rejected(f"no trial has this rank: {axis}", *(("at", place) for place in lacking))

    @property
    def columns(self) -> tuple[str, ...]:
        """The manifest's columns that are needed."""
        named = () if is_question(self.questions) else (self.questions,)
        return named if self.answers is None else (*named, self.answers)

    def wants(self, form: str, rank: int = 0) -> bool:
        """Whether this form, of this rank where it has one, is to be measured."""
        ranks = [each for each in self.at or () if isinstance(each, int)]
        forms = [each for each in self.at or () if isinstance(each, str)]
        return (not forms or form in forms) and (not ranks or not rank or rank in ranks)


def is_question(text: str) -> bool:
    """Whether a text is the question itself, and no column's name."""
    return " " in text.strip() or "?" in text
