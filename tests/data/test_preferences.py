"""Judged groups: who wins, what a file of them keeps, and that a killed write leaves nothing that is believed."""

import itertools
import math
import os
import signal
import subprocess
import sys
import textwrap

import grain
import numpy as np
import pytest

from rlhf_jax.data import preferences
from rlhf_jax.data.encoding import encode_pair
from rlhf_jax.data.formats import Pair
from rlhf_jax.data.preferences import Annotators, PreferenceGroup


def group(index=0, completions=2):
    return PreferenceGroup(
        prompt=f"prompt {index} — é",
        completions=tuple(f"\n{i}" for i in range(completions)),
        prompt_tokens=(2, 5, index),
        completion_tokens=tuple(tuple(range(10, 11 + i)) for i in range(completions)),
        scores=tuple(i / 8 for i in range(completions)),  # exact in float32, as the rest
        pairs=tuple((j, i) for i, j in itertools.combinations(range(completions), 2)),
        margins=tuple(0.5 for _ in range(math.comb(completions, 2))),
        source="sampled",
    )


def judge(scores, seed=0, **options):
    return Annotators(np.random.default_rng(seed), **options).judge(scores)


def test_all_pairs_are_judged_by_score_and_ties_are_none():
    pairs, margins = judge([0.2, 0.9, 0.2, 0.5])
    assert pairs == ((1, 0), (3, 0), (1, 2), (1, 3), (3, 2))  # (0, 2) is a tie
    logit = {0.2: math.log(0.25), 0.9: math.log(9), 0.5: 0.0}
    expected = [logit[a] - logit[b] for a, b in ((0.9, 0.2), (0.5, 0.2), (0.9, 0.2), (0.9, 0.5), (0.5, 0.2))]
    assert margins == pytest.approx(expected)


def test_certain_scores_have_a_finite_margin():
    pairs, margins = judge([0.0, 1.0])
    assert pairs == ((1, 0),) and math.isfinite(margins[0]) and margins[0] > 20


def test_label_noise_flips_its_share_and_keeps_the_gap():
    scores = np.linspace(0.1, 0.9, 60)
    clean, clean_margins = judge(scores)
    noisy, margins = judge(scores, label_noise=0.25)
    assert margins == clean_margins and min(margins) > 0
    flipped = [a != b for a, b in zip(clean, noisy, strict=True)]
    assert all(a == b or a == b[::-1] for a, b in zip(clean, noisy, strict=True))
    assert np.mean(flipped) == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / len(flipped)))


def test_one_annotator_is_consistent_and_several_are_not():
    scores = [0.5, 0.52, 0.49, 0.51, 0.5, 0.48]

    def cycles(count):
        """Triples in which a beats b, b beats c, c beats a, over many groups."""
        found = 0
        annotators = Annotators(np.random.default_rng(0), count=count, disagreement=2.0)
        for _ in range(40):
            wins = set(annotators.judge(scores)[0])
            found += sum({(a, b), (b, c), (c, a)} <= wins for a, b, c in itertools.permutations(range(6), 3))
        return found

    assert cycles(1) == 0  # an opinion belongs to a completion, so one judge's order is an order
    assert cycles(5) > 0


def test_disagreement_follows_the_normal_distribution_of_two_opinions():
    """P(the better wins) = Φ(gap / (σ√2)); at a gap of σ√2 that is Φ(1) = 0.841."""
    sigma = 0.7
    better = 1 / (1 + math.exp(-sigma * math.sqrt(2)))
    annotators = Annotators(np.random.default_rng(0), count=3, disagreement=sigma)
    wins = np.mean([annotators.judge([better, 0.5])[0] == ((0, 1),) for _ in range(4_000)])
    assert wins == pytest.approx(0.8413, abs=0.02)


def test_judging_repeats_under_a_seed():
    options = {"count": 3, "disagreement": 1.0, "label_noise": 0.3}
    first, again, other = (judge(np.linspace(0.3, 0.7, 12), seed=seed, **options) for seed in (1, 1, 2))
    assert first == again != other


def test_a_pair_of_a_file_is_a_group_of_two(tokenizer):
    encode = encode_pair(tokenizer)
    made = encode(Pair("The film", " was fine.", " was long.", margin=1.5))
    assert made.pairs == ((0, 1),) and made.margins == (1.5,) and made.scores == ()
    assert made.prompt_tokens == (tokenizer.bos_id, *tokenizer.encode("The film"))
    for tokens, text in zip(made.completion_tokens, (" was fine.", " was long."), strict=True):
        assert tokens[-1] == tokenizer.eos_id and tokenizer.decode(tokens) == text
    assert encode(Pair("", "a", "b")).prompt_tokens == (tokenizer.bos_id,)


def test_rows_keep_bos_and_lose_the_start_of_their_prompt_first_which_all_share():
    long = group(7, completions=3)  # prompt 2 5 7, completions of 1, 2 and 3 tokens
    assert long.rows() == [[2, 5, 7, 10], [2, 5, 7, 10, 11], [2, 5, 7, 10, 11, 12]] and long.longest == 6
    assert long.cut(9) == long.cut(6) == long
    assert long.cut(5).rows() == [[2, 7, 10], [2, 7, 10, 11], [2, 7, 10, 11, 12]]
    assert long.cut(4).rows() == [[2, 10], [2, 10, 11], [2, 10, 11, 12]]
    assert long.cut(2).rows() == [[2, 10], [2, 10], [2, 10]]
    assert all(long.cut(n).longest == n for n in range(2, 7))


def test_what_is_written_is_read_back(tmp_path):
    splits = {
        "train": [group(i, completions=2 + i % 3) for i in range(300)],
        "heldout": [from_judges() for _ in range(3)],
    }
    assert not preferences.exists(tmp_path)
    preferences.write(tmp_path, splits)
    assert preferences.exists(tmp_path)
    stored = preferences.read(tmp_path)
    assert set(stored) == {"train", "heldout"}
    for name, groups in splits.items():
        assert len(stored[name]) == len(groups) and list(stored[name]) == groups  # in the order they were given
    assert stored["train"][-1] == splits["train"][-1] and stored["train"][3:5] == splits["train"][3:5]
    assert grain.MapDataset.source(stored["train"]).shuffle(seed=0)[5] in splits["train"]


def from_judges():
    """Scores absent, no pair, an empty prompt and completion, and a token beyond 16 bits."""
    return PreferenceGroup("", ("", "x"), (2,), ((3,), (70_000, 3)), (), (), (), "file")


def test_the_dataset_opens_with_tfds_alone_and_without_tensorflow(tmp_path):
    preferences.write(tmp_path, {"train": [group(1)], "heldout": [group(2)]})
    program = f"""
        import glob, sys
        import tensorflow_datasets as tfds
        (info,) = glob.glob({str(tmp_path)!r} + "/**/dataset_info.json", recursive=True)
        source = tfds.builder_from_directory(info.rpartition("/")[0]).as_data_source("train")
        assert len(source) == 1 and source[0]["prompt_tokens"].tolist() == [2, 5, 1]
        assert sys.modules.get("tensorflow") is None
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_writing_again_replaces_and_says_nothing_on_stdout(tmp_path, capfd):
    preferences.write(tmp_path, {"train": [group(1), group(2)], "heldout": [group(3)]})
    preferences.write(tmp_path, {"train": [group(4)], "heldout": [group(5)]})
    stored = preferences.read(tmp_path)
    assert list(stored["train"]) == [group(4)] and list(stored["heldout"]) == [group(5)]
    assert capfd.readouterr().out == ""


def test_a_flipped_byte_is_found_and_the_groups_set_aside(tmp_path):
    preferences.write(tmp_path, {"train": [group(1)], "heldout": [group(2)]})
    assert preferences.set_aside_if_damaged(tmp_path) is None
    path = next(tmp_path.rglob("*train*"))
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    line = preferences.set_aside_if_damaged(tmp_path)
    assert line is not None and line.startswith(str(path)) and "preferences.damaged" in line
    assert not preferences.exists(tmp_path) and preferences.set_aside_if_damaged(tmp_path) is None


def test_a_write_that_fails_is_not_believed(tmp_path):
    def failing():
        yield group(1)
        raise KeyboardInterrupt

    class Failing(list):
        def __iter__(self):
            return failing()

    with pytest.raises(KeyboardInterrupt):
        preferences.write(tmp_path, {"train": [group(1)], "heldout": Failing([group(2)])})
    assert not preferences.exists(tmp_path)


def test_a_killed_write_is_not_believed_and_its_remains_go(tmp_path):
    program = """
        import os, pathlib, signal, sys
        from rlhf_jax.data import preferences
        from rlhf_jax.data.preferences import PreferenceGroup

        class Killer(list):
            def __iter__(self):
                yield self[0]
                os.kill(os.getpid(), signal.SIGKILL)

        group = PreferenceGroup("p", ("a", "b"), (2,), ((4,), (5,)), (), ((0, 1),), (0.0,), "file")
        preferences.write(pathlib.Path(sys.argv[1]), {"train": [group], "heldout": Killer([group])})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "preferences").iterdir()] != ["1.0.0"]  # it had begun
    assert not preferences.exists(tmp_path)
    preferences.write(tmp_path, {"train": [group(1)], "heldout": [group(2)]})
    assert list(preferences.read(tmp_path)["train"]) == [group(1)]
    assert [path.name for path in (tmp_path / "preferences").iterdir()] == ["1.0.0"]
