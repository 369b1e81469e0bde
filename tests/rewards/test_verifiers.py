"""Answers are read as people write them, compared exactly, and never evaluated."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.rewards.verifiers import AnswerChecker, PatternMatch, read_answer

# (what a completion says, the number that it gives)
SAID = [
    ("Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n48+24 = <<48+24=72>>72 clips.\n#### 72", 72),
    ("so $12 an hour for 50 minutes is $10.", 10),
    ("It costs $1,234.50 in all", Fraction("1234.5")),
    ("#### -$1,000,000\nand then 7 more", -1_000_000),
    ("#### $-3", -3),
    ("a loss of \N{MINUS SIGN}4 degrees", -4),
    ("That is 25%.", 25),
    (r"Therefore \boxed{\frac{3}{4}} of the 12", Fraction(3, 4)),
    (r"\boxed{2\dfrac{1}{2}}", Fraction(5, 2)),
    (r"\boxed{x = -\frac{3}{4}}", Fraction(-3, 4)),
    (r"\boxed{\text{12{,}000 apples}}", 12_000),
    (r"\boxed{\$1\,500}", 1500),
    (r"first \boxed{1}, no: \boxed{2}", 2),
    (r"\boxed{1} and so #### 3", 3),
    ("#### 1 1/2", Fraction(3, 2)),
    ("1/2 and then .5", Fraction(1, 2)),
    ("10-3=7", 7),
    ("7-3", None),  # an expression is no number, on whichever side
    ("(5)-3", None),
    ("they sold 5*3", None),
    ("- Cost: 10\n- 5 apples", 5),  # a list, no subtraction
    ("Apples (3)\n- 5", 5),
    ("total 2\n* 5", 5),
    ("what he's - 5", 5),
    ("she earns $60/h", 60),
    ("Total = 5*3", None),
    ("Total = 5 * 3", None),
    ("so 5 × 3", None),
    ("1 000", None),
    ("it costs 1\N{NARROW NO-BREAK SPACE}000", None),
    ("12:30", None),
    ("so 10^5", None),
    ("2\\pi", None),
    ("it is 3x+2", None),
    ("the answer is **5**", 5),
    ("The answer is *5*.", 5),
    ("the answer - 5", 5),
    ("- 5 apples", 5),
    ("$5$", 5),
    ("$x = 5$", 5),
    ("The answer is 5!", 5),
    ("5kg", 5),
    ("5 m", 5),
    ("covid-19", 19),
    ("the 5-year plan", 5),
    ("1,00", None),
    ("In 2020 they sold 300", 300),
    ("#### 5*3", None),
    ("#### 1 000", None),
    ("#### 5-10", None),
    ("#### **5**", 5),
    ("#### 5 - that is all", 5),
    ("#### 5 apples", 5),
    ("#### 10-3=7", None),
    (r"\boxed{\sqrt{2}}", None),
    (r"\boxed{\sqrt 2}", None),
    (r"\boxed{2\pi}", None),
    (r"\boxed{2 \pi}", None),
    (r"\boxed{3x+2}", None),
    (r"\boxed{3x}", None),
    (r"\boxed{x+5}", None),
    (r"\boxed{10^5}", None),
    (r"\boxed{10^{5}}", None),
    (r"\boxed{3 \times 10^5}", None),
    (r"\boxed{5!}", None),
    (r"\boxed{(1, 2)}", None),
    (r"\boxed{1, 2}", None),
    (r"\boxed{x < 5}", None),
    (r"\boxed{x \leq 5}", None),
    (r"\boxed{\frac{\sqrt{3}}{2}}", None),
    (r"\boxed{2(x+1)}", None),
    (r"\boxed{1 000}", None),
    (r"\boxed{10-3=7}", 7),
    (r"\boxed{x = 5}", 5),
    (r"\boxed{\pi \approx 3.14}", Fraction("3.14")),
    (r"\boxed{90^\circ}", 90),
    (r"\boxed{90^{\circ}}", 90),
    (r"\boxed{5 \text{ cm}}", 5),
    (r"\boxed{5\,\mathrm{cm}^3}", 5),
    (r"\boxed{-5}", -5),
    (r"\boxed{5\%}", 5),
    ("divide 12 60/3", 20),
    ("2.5e3 grams", 2500),
    ("water is H2O", None),
    ("no number at all", None),
    ("it is 5/0", None),
    ("#### none, though there were 8", 8),
    ("####", None),
    ("####\n42", 42),
    ("The answer is 7. #### ", 7),
    (r"\boxed{12 \text{ m}^2}", 12),
    (r"\boxed{\frac12}", Fraction(1, 2)),
    ("an area of 5 m^{2}", 5),
    (r"\boxed{}", None),
    (r"\boxed{7", 7),
    ("1" * 5000, None),
    ("", None),
]


@pytest.mark.parametrize(("text", "number"), SAID)
def test_the_answer_of_a_text(text, number):
    assert read_answer(text) == number


@given(
    sign=st.sampled_from(["", "-", "-$", "$-"]),
    thousandths=st.integers(1, 10**12),
    before=st.sampled_from(["", "The 3 of them: ", "= ", "(", "**", "approx. "]),
    after=st.sampled_from(["", ".", "%", " dollars.", ")", "**", ", I think"]),
)
def test_decimals_with_commas_are_read_exactly(sign, thousandths, before, after):
    written = f"{Decimal(thousandths) / 1000:,}"
    expected = Fraction(thousandths, 1000) * (-1 if "-" in sign else 1)
    assert read_answer(f"{before}{sign}{written}{after}") == expected


@given(st.fractions(), st.sampled_from(["{}/{}", "{} / {}", r"\frac{{{}}}{{{}}}", r"\boxed{{\tfrac{{{}}}{{{}}}}}"]))
def test_fractions_are_read_exactly(number, form):
    assert read_answer("it is " + form.format(number.numerator, number.denominator)) == number


@given(st.text(alphabet="0123456789.,/-$ e{}\\#boxdfrc", max_size=60))
def test_any_text_is_read_without_an_error(text):
    assert isinstance(read_answer(text), Fraction | None)


def test_the_right_answer_scores_and_no_other():
    checker = AnswerChecker(correct=2.0, wrong=-1.0)
    rows = [{"answer": "… 24 clips\n#### 1,072"}, {"answer": 39.0}, {"answer": 0.1}, {"answer": Decimal("2.50")}]
    right = ["#### 1072", "so 39 pieces", r"\boxed{\frac{1}{10}}", "5/2"]
    assert checker([""] * 4, right, rows) == [2.0] * 4
    assert checker([""] * 4, [*right[1:], right[0]], rows) == [-1.0] * 4
    assert checker([""], ["__import__('os').abort()"], [{"answer": 0}]) == [-1.0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "label": 1}, "reward.answer: the row has no field 'answer', but 'question', 'label'"),
        ({}, "the row has no field 'answer', but none"),
        ({"answer": "nobody knows"}, "the row's 'answer' holds no number: 'nobody knows'"),
        ({"answer": r"\boxed{\sqrt{2}}"}, r"the row's 'answer' is more than a number: .*sqrt.*; MathChecker reads"),
        ({"answer": r"so it is $\boxed{3x+2}$"}, r"is more than a number: .*3x\+2.*; MathChecker reads expressions$"),
        ({"answer": "2\\pi"}, "is more than a number: .*; MathChecker reads expressions$"),
        ({"answer": "1 000"}, "is more than a number: '1 000'; MathChecker reads expressions$"),
        ({"answer": None}, "holds no number: None"),
        ({"answer": True}, "holds no number: True"),
        ({"answer": float("nan")}, "holds no number: nan"),
    ],
)
def test_a_row_without_an_answer_is_told(row, message):
    with pytest.raises(ValueError, match=message):
        AnswerChecker().check_row(row)


def test_a_pattern_is_found_or_not():
    form = PatternMatch(r"(?s)\A<think>.*</think>\s*\S", found=0.5, missing=-0.5)
    completions = ["<think>a\nb</think> 7", "so <think>a</think> 7", "<think>a</think>", ""]
    assert form([""] * 4, completions, [{}] * 4) == [0.5, -0.5, -0.5, -0.5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PatternMatch("(a"), r"reward.pattern: '\(a' is no regular expression: missing \)"),
        (lambda: PatternMatch("a", found=float("nan")), "reward.found and reward.missing must be finite, got nan"),
        (lambda: AnswerChecker(wrong=float("-inf")), "reward.correct and reward.wrong must be finite"),
        (lambda: AnswerChecker(seconds=0), "reward.seconds must be over 0 and finite, got 0"),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
