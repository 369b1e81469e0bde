"""Texts to rows: nothing lost, rows start at sentences, openings are cut between words."""

import itertools

import numpy as np

from rlhf_jax.data.text import opening, sentence_rows, sentence_starts


def test_rows_cover_the_text_and_start_at_sentences(reviews, tokenizer):
    def longest_sentence(text):  # one that fills a row alone loses its end
        starts = [*sentence_starts(text), len(text)]
        return max(len(tokenizer.encode(text[a:b])) for a, b in itertools.pairwise(starts))

    text = max((review.text for review in reviews.test[:200] if longest_sentence(review.text) < 60), key=len)
    rows = sentence_rows([text], tokenizer, row_length=64)
    starts = {text[start:][:20] for start in sentence_starts(text)}
    at = 0
    for row in rows:
        assert row.tokens[0] == tokenizer.bos_id and len(row.tokens) <= 64
        assert row.loss_mask == [False] + [True] * (len(row.tokens) - 1)
        part = tokenizer.decode(row.tokens)
        found = text.index(part)
        assert found <= at and found + len(part) > at  # overlaps or touches what came before, and goes on
        at = found + len(part)
        assert any(text[found:].startswith(start) for start in starts)
    assert at == len(text) and rows[-1].tokens[-1] == tokenizer.eos_id
    assert all(tokenizer.eos_id not in row.tokens for row in rows[:-1])


def test_a_sentence_longer_than_a_row_does_not_repeat_for_ever(tokenizer):
    text = "word " * 400 + "end. Next one."
    rows = sentence_rows([text], tokenizer, row_length=32)
    assert len(rows) == 2  # the long sentence's first row, then the next sentence
    assert tokenizer.decode(rows[1].tokens) == "Next one."


def test_openings_are_cut_between_words(reviews, tokenizer):
    rng = np.random.default_rng(0)
    lengths = set()
    for review in reviews.test[:300]:
        tokens = tokenizer.encode(review.text[:400])
        cut = opening(tokens, tokenizer, rng, prompt=(2, 8), completion=20)
        if cut is None:
            assert not any(tokenizer.starts_word(token) for token in tokens[2:9])
            continue
        assert cut.prompt[0] == tokenizer.bos_id and 3 <= len(cut.prompt) <= 9
        assert tokenizer.starts_word(cut.completion[0]) and 1 <= len(cut.completion) <= 20
        assert review.text.startswith(tokenizer.decode(cut.prompt))
        rest = tokenizer.decode(cut.completion)
        assert review.text[len(tokenizer.decode(cut.prompt)) :].startswith(rest)
        lengths.add(len(cut.prompt))
    assert len(lengths) == 7  # every length occurs


def test_a_short_text_ends_with_eos(tokenizer):
    tokens = tokenizer.encode("a fine film")
    cut = opening(tokens, tokenizer, np.random.default_rng(0), prompt=(1, 8), completion=40)
    assert cut is not None and cut.completion[-1] == tokenizer.eos_id


def test_tokenizer_is_lossless(reviews, tokenizer):
    awkward = ["", " leading", "trailing ", "two  spaces", "¾ 漢字 🎬", "tab\tand\nline"]
    for text in [*awkward, *(review.text for review in reviews.test[:100])]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len({tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}) == 3
