"""What lies in a study's `fidelity/`, and whose it is."""

from pathlib import Path

import pytest

from lowrank_tune.errors import InputError
from lowrank_tune.features.asked import Asked
from lowrank_tune.fidelity.kept import FOLDER, MODEL, Kept, Reply, place, read_kept, same_model, write_kept


def test_answers_of_another_language_model_are_refused(tmp_path: Path) -> None:
    same_model(tmp_path, {"checkpoint": "one", "max_new_tokens": 16})
    same_model(tmp_path, {"checkpoint": "one", "max_new_tokens": 16})
    with pytest.raises(InputError, match="another language model's answers .checkpoint one there and two now"):
        same_model(tmp_path, {"checkpoint": "two", "max_new_tokens": 16})


@pytest.mark.parametrize("damaged", ["", '{"che', "[]", "{}"])
def test_whose_answers_they_are_is_not_guessed(tmp_path: Path, damaged: str) -> None:
    same_model(tmp_path, {"checkpoint": "one"})
    (tmp_path / FOLDER / MODEL).write_text(damaged)
    with pytest.raises(InputError, match=r"model.json: is damaged, .* remove .*fidelity, and all is asked anew"):
        same_model(tmp_path, {"checkpoint": "one"})


@pytest.mark.parametrize("damaged", ["", '{"key', "[]", '{"key": "k", "question": "What?", "replies": {"x": 3}}'])
def test_a_damaged_question_is_asked_again(tmp_path: Path, damaged: str) -> None:
    (tmp_path / FOLDER).mkdir()
    own = Kept("k", "What?", (1, 2), "cat", False, {"x|0|int8|": Reply(text="cat")})
    write_kept(tmp_path, own)
    assert read_kept(tmp_path, "k", Asked("What?")) == own
    place(tmp_path, "k", "What?").write_text(damaged)
    assert read_kept(tmp_path, "k", Asked("What?")) == Kept("k", "What?")
