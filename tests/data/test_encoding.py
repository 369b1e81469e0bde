"""Rows in tokens: what lengths drop, cut and count; nothing is longer than it may be, nothing is lost unsaid."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.encoding import encode_example, encode_group, encode_pair, encode_ranked, select
from rlhf_jax.data.formats import Example, Pair, Ranked
from rlhf_jax.data.judged import JudgedRow
from rlhf_jax.data.reading import Mixed, Rows
from rlhf_jax.data.sources import Jsonl, Mixture
from rlhf_jax.errors import UserError

PAIRS = [Pair("so " * (i % 7), " yes" * (1 + i % 5), " no" * (1 + i % 11)) for i in range(60)]


def part(rows, heldout=4, **fields):
    return Rows(Jsonl("rows.jsonl", **fields), rows[:-heldout], rows[-heldout:], merged=2)


def sizes(tokenizer, pairs):
    """Tokens of each pair's longer side, with BOS and EOS."""
    return [
        2 + len(tokenizer.encode(p.prompt)) + max(len(tokenizer.encode(text)) for text in (p.chosen, p.rejected))
        for p in pairs
    ]


LIMITS = st.tuples(st.integers(0, 12), st.none() | st.integers(12, 24), st.sampled_from(["drop", "cut"]))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(limits=LIMITS, length=st.integers(14, 30))
def test_every_row_is_kept_dropped_or_cut_and_counted(tokenizer, limits, length):
    least, most, too_long = limits
    rows = part(PAIRS, heldout=20, min_tokens=least, max_tokens=most, too_long=too_long)
    chosen = select(rows.source, [rows], encode_pair(tokenizer), length=length)
    room = length if most is None else min(most, length)
    gone = cut = 0
    for size in sizes(tokenizer, PAIRS):
        dropped = size < least or (most is not None and too_long == "drop" and size > most)
        gone += dropped
        cut += not dropped and size > room
    counts = chosen.counts
    assert (counts.dropped, counts.cut, counts.merged) == (gone, cut, 2)
    assert counts.train + counts.heldout + gone == len(PAIRS)
    assert (len(chosen.train), len(chosen.heldout)) == (counts.train, counts.heldout)
    assert all(least <= group.longest <= room for group in (*chosen.train, *chosen.heldout))
    assert all(group.prompt_tokens[0] == tokenizer.bos_id for group in chosen.train)


def test_pairs_that_are_the_same_or_differ_past_the_end_are_dropped(tokenizer):
    same, late = Pair("p", " a", " a"), Pair("p", " a" * 30 + " b", " a" * 30 + " c")
    rows = part([Pair("p", " a", " b"), same, late, Pair("p", " c", " d")], heldout=1)
    chosen = select(rows.source, [rows], encode_pair(tokenizer), length=12, tells=lambda group: group.tells)
    assert [group.completions for group in (*chosen.train, *chosen.heldout)] == [(" a", " b"), (" c", " d")]
    assert chosen.counts.dropped == 2


def test_examples_lose_the_start_of_their_prompt_and_then_their_end(tokenizer):
    rows = part([Example("so " * n, " it was fine") for n in (0, 3, 40)] + [Example("", " a" * 40)] * 4, heldout=1)
    chosen = select(rows.source, [rows], encode_example(tokenizer), length=12)
    ending = [*tokenizer.encode(" it was fine"), tokenizer.eos_id]
    for row in chosen.train[:3]:
        assert row.tokens[0] == tokenizer.bos_id and list(row.tokens[-len(ending) :]) == ending
        assert [t for t, counts in zip(row.tokens, row.counted, strict=True) if counts] == ending
    assert len(chosen.train[2].tokens) == 12 and chosen.counts.cut == 5
    assert list(chosen.heldout[0].tokens) == [tokenizer.bos_id, *tokenizer.encode(" a" * 40)[:11]]


def test_a_cut_row_keeps_the_completion_then_what_stands_next_to_it(tokenizer):
    def cut(prompt, length):
        return encode_group(tokenizer, prompt, (" h i j",), (), ()).cut(length).rows()[0]

    prompt, text = tokenizer.encode("a b c d e f g"), tokenizer.encode(" h i j")
    whole = [tokenizer.bos_id, *prompt, *text, tokenizer.eos_id]
    assert cut("a b c d e f g", len(whole)) == whole
    assert cut("a b c d e f g", len(text) + 4) == [whole[0], *whole[-len(text) - 3 :]]
    assert cut("", 3) == [tokenizer.bos_id, *text[:2]]


def test_ranks_are_all_pairs_but_ties(tokenizer):
    group = encode_ranked(tokenizer)(Ranked("p", ("a", "b", "c", "d"), (1, 0, 1, 2)))
    assert set(group.pairs) == {(1, 0), (1, 2), (0, 3), (1, 3), (2, 3)} and len(group.margins) == 5
    assert all(tokens[-1] == tokenizer.eos_id for tokens in group.completion_tokens)


def test_parts_of_a_mixture_have_their_own_lengths(tokenizer):
    short, long = part(PAIRS, max_tokens=12), part(PAIRS, min_tokens=9)
    mixture = Mixture((short.source, long.source), (1.0, 3.0))
    chosen = select(mixture, [short, long], encode_pair(tokenizer), length=40)
    assert isinstance(chosen.train, Mixed) and chosen.train.weights == (1.0, 3.0)
    assert max(group.longest for group in chosen.train.parts[0]) <= 12 < max(g.longest for g in chosen.train.parts[1])
    assert min(group.longest for group in chosen.train.parts[1]) >= 9
    assert chosen.counts.merged == 4 and chosen.counts.dropped > 0


def test_nothing_left_is_said(tokenizer):
    rows = part(PAIRS, max_tokens=36, min_tokens=35)
    with pytest.raises(UserError, match=r"^rows\.jsonl: no row to train on is left that has 35 to 36 tokens$"):
        select(rows.source, [rows], encode_pair(tokenizer), length=40)


def test_a_long_solution_loses_the_steps_that_nobody_judged_before_its_prompt():
    row = JudgedRow("q", (1, 2, 3), ((4, 5), (6, 7), (8,), (9, 9)), (1.0, 0.0, None, None))
    assert row.cut(10) == row
    assert row.cut(9) == row.cut(8) == dataclasses.replace(row, parts=row.parts[:3], targets=row.targets[:3])
    assert row.cut(7) == dataclasses.replace(row, parts=row.parts[:2], targets=row.targets[:2])
    short = row.cut(6)  # and only then what follows its first token
    assert short.prompt_tokens == (1, 3) and short.judged == [(3, 1.0), (5, 0.0)]
    judged = dataclasses.replace(row, targets=(None, None, None, 1.0))
    assert judged.cut(9).parts == row.parts and judged.cut(9).prompt_tokens == (1, 3)
