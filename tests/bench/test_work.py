import pytest

from rlhf_jax.bench.work import KINDS, SIZES, choose
from rlhf_jax.errors import UserError

ALL = ",".join(KINDS)


def whats(sizes, what):
    return [(work.size, work.what) for work in choose(sizes, what, accelerator=False)]


def test_a_kind_is_all_its_variants_and_each_stands_once():
    assert whats("tiny", "decode,sft,decode/1") == [("tiny", "decode/1"), ("tiny", "decode/batch"), ("tiny", "sft")]
    assert whats("tiny,small", "ppo/hydra") == [("tiny", "ppo/hydra"), ("small", "ppo/hydra")]


def test_commands_are_of_no_size_and_come_last():
    assert whats("tiny,small", "cold,sweep/apart,rm") == [
        ("tiny", "rm"), ("small", "rm"),
        ("quickstart", "cold/compiling"), ("quickstart", "cold/cached"), ("quickstart", "sweep/apart"),
    ]  # fmt: skip


def test_curves_of_cost_are_of_the_smallest_size_alone():
    works = choose("small,tiny", "cost", accelerator=False)
    assert {(work.size, work.prompt, work.epochs, work.minibatches) for work in works} == {("tiny", 16, 4, 4)}
    assert {(work.rows, work.completion) for work in works} == {
        (8, 48), (16, 48), (32, 48), (64, 48), (128, 48), (256, 48),
        (16, 64), (16, 128), (16, 256), (16, 512), (16, 1024),
    }  # fmt: skip
    assert SIZES["tiny"].spec.max_len >= 16 + 1024


@pytest.mark.parametrize(
    ("sizes", "what", "told"),
    [
        ("tiny,huge", "sft", "--sizes: huge is none of tiny, small, smollm2, 1b, 8b"),
        ("", "sft", "--sizes: nothing is none of"),
        ("tiny", "ppo/none", "--what: ppo/none is none of sft, rm"),
        ("8b", "sft", "--sizes: 8b is measured on an accelerator, and this machine has none"),
    ],
)
def test_names_that_there_are_not(sizes, what, told):
    with pytest.raises(UserError, match=told):
        choose(sizes, what, accelerator=False)


def test_on_an_accelerator_all_sizes(tmp_path):
    works = choose(",".join(SIZES), ALL, accelerator=True)
    once = sum(len(KINDS[kind]) for kind in ("cost", "cold", "sweep"))
    assert len(works) == len(SIZES) * sum(map(len, KINDS.values())) - (len(SIZES) - 1) * once
    assert {work.job(tmp_path, threads=1)["precision"] for work in works if work.size == "8b"} == {"bfloat16"}


def test_peers_do_the_same_work_but_share_no_trunk(tmp_path):
    jobs = {work.what: work.of_peers.job(tmp_path, threads=2) for work in choose("tiny", "ppo", accelerator=False)}
    assert jobs["ppo/shared"] == jobs["ppo/hydra"] == jobs["ppo"]
    different = {name for name in jobs["ppo"] if jobs["ppo"][name] != jobs["ppo/natural"][name]}
    assert different == {"what", "variant", "model"}


def test_the_sizes_and_schedules_that_are_promised():
    tiny, small = (SIZES[name].spec for name in ("tiny", "small"))
    assert (tiny.n_layers, tiny.d_model, tiny.n_heads, tiny.d_ff, tiny.vocab_size, tiny.tied) == (
        4, 192, 6, 512, 4096, False
    )  # fmt: skip
    assert (small.n_layers, small.d_model, small.n_heads, small.d_ff, small.vocab_size) == (8, 512, 8, 1408, 8192)
    ppo = {work.size: work for work in choose("tiny,small", "ppo", accelerator=False) if work.what == "ppo"}
    assert [(w.rows, w.prompt, w.completion, w.epochs, w.minibatches) for w in ppo.values()] == [
        (64, 16, 48, 4, 4), (32, 32, 64, 4, 4)
    ]  # fmt: skip
