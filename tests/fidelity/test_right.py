import pytest

from lowrank_tune.fidelity.right import accuracy, alike, similarity


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("The Coca-Cola.", "coca cola"),
        ("It's two o'clock!", "it 's 2 o'clock"),
        ("1,000", "1000"),
        ("3.5 litres.", "3.5 litres"),
        ("DONT walk", "don't walk"),
        ("he'dve", "he'd've"),
        ("an apple / a pear", "apple pear"),
        ("none", "0"),
        ("a/b", "b"),
        ('say "no"', "say no"),
    ],
)
def test_answers_are_made_alike_as_the_evaluation_of_vqa_does(answer: str, same: str) -> None:
    assert alike(answer) == same


@pytest.mark.parametrize(("agreeing", "right"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_peoples_answers_give_the_published_steps(agreeing: int, right: float) -> None:
    people = ["Cola"] * agreeing + [f"other {number}" for number in range(10 - agreeing)]
    assert accuracy("cola.", people) == pytest.approx(right)


def test_any_of_a_shorter_list_is_right() -> None:
    assert accuracy("two", ["2", "pair"]) == 1.0
    assert accuracy("three", ["2", "pair"]) == 0.0
    assert accuracy("three", []) == 0.0


def test_similarity_forgives_misspelling_and_no_other_word() -> None:
    assert similarity("Kitten", ["sitting", "dog"]) == pytest.approx(1 - 3 / 7)
    assert similarity("cola", ["cola"]) == 1.0
    assert similarity("tea", ["coffee"]) == 0.0
    assert similarity("", [""]) == 1.0
