"""Pairs by a judge's word: what is asked in which order, what the answers make of it, and a judge that goes away."""

import itertools
import json
import math
import re

import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import ai_feedback
from rlhf_jax.data.encoding import encode_pair
from rlhf_jax.data.reading import read_pairs
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.endpoint import Endpoint
from rlhf_jax.rewards.judging import EndpointJudge, LocalJudge, ask
from rlhf_jax.rewards.sentiment import GoldClassifier
from rlhf_jax.sampling import Sampling
from tests.algorithms.conftest import SPEC, put_stages
from tests.rewards.serving import Server

TEMPLATE = "{principle}<{prompt}|{first}|{second}>"
CONFIG = {
    "prompts": 10,
    "batch_size": 8,
    "completion_tokens": 6,
    "prompt_tokens": (2, 4),
    "principles": ("good?", "kind?"),
}


@pytest.fixture
def context(make_context):
    context = make_context()
    put_stages(context)
    return context


def kept_in(context, name="feedback"):
    return context.stage_dir(name) / "rows" / "rows.jsonl"


def rows(context, name="feedback"):
    return [json.loads(line) for line in kept_in(context, name).read_text().split("\n")[:-1]]


def test_a_model_judges_by_its_next_token_in_both_orders(context):
    config = ai_feedback.Config(**CONFIG, judge=LocalJudge(model="sft", template=TEMPLATE, length=60, batch_size=8))
    figures = ai_feedback.train(config, context, "feedback")
    tokenizer, params = context.tokenizer, context.policy("sft")
    a, b = (tokenizer.encode(f"Answer: {letter}")[-1] for letter in "AB")

    def first_is_better(row, first, second):
        text = ask(TEMPLATE, principle=row["principle"], prompt=row["prompt"], first=first, second=second)
        tokens = [tokenizer.bos_id, *tokenizer.encode(f"{text}\n\nAnswer:")]
        logits = np.float64(models.logits(SPEC, params, np.asarray([tokens]))[0, -1])
        return 1 / (1 + math.exp(logits[b] - logits[a]))

    made = rows(context)
    assert len(made) == figures["pairs"] == 10 and {row["principle"] for row in made} == {"good?", "kind?"}
    for row in made:
        once = first_is_better(row, row["chosen"], row["rejected"])
        turned = 1 - first_is_better(row, row["rejected"], row["chosen"])
        assert row["probability"] == pytest.approx((once + turned) / 2, abs=1e-5) and row["probability"] >= 0.5
    assert figures["questions_cut"] == 0
    learnt = [encode_pair(tokenizer)(pair) for pair in itertools.chain(*read_pairs(Jsonl(kept_in(context))))]
    for row, group in zip(made, learnt, strict=True):  # as they were written: those cut at the limit have no EOS
        assert group.prompt_tokens == tuple(row["prompt_tokens"]) and group.completions == (
            row["chosen"],
            row["rejected"],
        )
        assert group.completion_tokens == (tuple(row["chosen_tokens"]), tuple(row["rejected_tokens"]))
        for tokens in group.completion_tokens:
            assert len(tokens) == CONFIG["completion_tokens"] or tokens[-1] == tokenizer.eos_id
    assert any(tokens[-1] != tokenizer.eos_id for group in learnt for tokens in group.completion_tokens)
    assert figures["confidence"] == pytest.approx(np.mean([row["probability"] for row in made]))
    assert figures["agreement_low"] < figures["agreement"] < figures["agreement_high"]


def served(context):
    """A judge that sees the gold score: of each question P(A) = 0.9 or 0.1."""
    gold = GoldClassifier.fit(context.reviews.train)

    def said(body):
        prompt, first, second = re.search(r"<(.*)\|(.*)\|(.*)>", body["messages"][0]["content"], re.DOTALL).groups()
        one, other = gold([prompt + first, prompt + second])
        p = 0.9 if one > other else 0.1
        tops = [{"token": "A", "logprob": math.log(p)}, {"token": "B", "logprob": math.log(1 - p)}]
        choice = {"message": {"content": "A"}, "logprobs": {"content": [{"token": "A", "top_logprobs": tops}]}}
        return {"choices": [choice], "usage": {"prompt_tokens": 20, "completion_tokens": 1}}

    return said


def test_an_endpoint_judges_and_goes_away_and_the_run_goes_on(context):
    with Server(*[served(context)] * 9, (503, "down")) as server:
        endpoint = Endpoint(server.url, "judge-1", retries=0, parallel=1, price_in=1.0)
        config = ai_feedback.Config(**CONFIG, judge=EndpointJudge(endpoint, template=TEMPLATE))
        with pytest.raises(UserError, match=r"answers 503: down, 1 times in a row; the answers so far are in "):
            ai_feedback.train(config, context, "feedback")
        assert not (context.stage_dir("feedback") / "rows").exists()
        server.script = [served(context)]
        figures = ai_feedback.train(config, context, "feedback")
        assert len(server.asked) <= 20 + 2  # each question once, but for what was under way when it went away
    assert figures["agreement"] == 1.0 and figures["flipped"] == 0 and figures["unread"] == 0
    assert figures["judge_requests"] == 20 and figures["judge_dollars"] == pytest.approx(20 * 20 / 1e6)
    gold = GoldClassifier.fit(context.reviews.train)
    for row in rows(context):
        assert gold([row["prompt"] + row["chosen"]]) >= gold([row["prompt"] + row["rejected"]])
        assert row["probability"] == pytest.approx(0.9)


def test_pairs_that_the_judge_is_not_sure_of_are_left_out(context):
    template = "{prompt}{first}{second}"
    with Server(lambda body: {"choices": [{"message": {"content": "A"}}]}) as server:  # whatever stands first
        judge = EndpointJudge(Endpoint(server.url, "judge-1"), template=template, top_logprobs=0)
        config = ai_feedback.Config(**CONFIG, judge=judge)
        with pytest.raises(UserError, match="feedback: of 10 pairs 10 differ, and of none is the judge sure enough"):
            ai_feedback.train(config, context, "feedback")  # a half for each, which says nothing


def test_pairs_of_a_half_are_dropped_and_counted(context):
    gold = GoldClassifier.fit(context.reviews.train)

    def said(body):
        """By one principle whatever stands first, by the other 0.6 for the better one."""
        question = body["messages"][0]["content"]
        prompt, first, second = re.search(r"<(.*)\|(.*)\|(.*)>", question, re.DOTALL).groups()
        one, other = gold([prompt + first, prompt + second])
        p = 0.75 if question.startswith("good?") else 0.6 if one > other else 0.4
        tops = [{"token": "A", "logprob": math.log(p)}, {"token": "B", "logprob": math.log(1 - p)}]
        choice = {"message": {"content": "A"}, "logprobs": {"content": [{"token": "A", "top_logprobs": tops}]}}
        return {"choices": [choice]}

    with Server(said) as server:
        judge = EndpointJudge(Endpoint(server.url, "judge-1"), template=TEMPLATE)
        figures = ai_feedback.train(ai_feedback.Config(**CONFIG, judge=judge), context, "feedback")
        made = rows(context)
        assert {row["principle"] for row in made} == {"kind?"} and 0 < len(made) < 10
        assert all(row["probability"] == pytest.approx(0.6) for row in made)
        assert figures["pairs"] == len(made) and figures["undecided"] == figures["left_out"] == 10 - len(made)
        assert figures["flipped"] == pytest.approx(1 - len(made) / 10)
        sure = ai_feedback.Config(**CONFIG, judge=judge, least_confidence=0.2)
        with pytest.raises(UserError, match="sure: of 10 pairs 10 differ, and of none is the judge sure enough"):
            ai_feedback.train(sure, context, "sure")


def test_completions_that_are_the_same_are_not_judged_and_equal_questions_are_paid_once(context):
    def said(body):
        """The one that comes later in the alphabet."""
        first, second = body["messages"][0]["content"].split("\x1e")
        return {
            "choices": [{"message": {"content": "A" if first > second else "B"}}],
            "usage": {"prompt_tokens": 20, "completion_tokens": 1},
        }

    with Server(said) as server:
        judge = EndpointJudge(Endpoint(server.url, "judge-1"), template="{first}\x1e{second}", top_logprobs=0)
        fields = {**CONFIG, "prompts": 40, "completion_tokens": 1, "sampling": Sampling(top_k=3)}
        figures = ai_feedback.train(ai_feedback.Config(**fields, judge=judge), context, "feedback")
        asked = [body["messages"][0]["content"] for _, _, body in server.asked]
    judged = {
        f"{a}\x1e{b}" for row in rows(context) for a, b in itertools.permutations((row["chosen"], row["rejected"]))
    }
    assert len(asked) == len(set(asked)) and set(asked) == judged
    assert (figures["judge_requests"], figures["judge_tokens"]) == (len(asked), 21 * len(asked))
    assert figures["pairs"] + figures["left_out"] == 40 and figures["left_out"] > 0
    assert figures["flipped"] == 0 and figures["confidence"] == 1  # of pairs that were judged


def test_rows_of_conversations_stay_conversations(context, tmp_path):
    path = tmp_path / "prompts.jsonl"
    prompts = [{"prompt": [{"role": "user", "content": f"What is {i}?"}]} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    config = ai_feedback.Config(
        **{**CONFIG, "prompt_tokens": (1, 30), "prompts": 6}, data=Jsonl(path), judge=LocalJudge("sft", TEMPLATE, 64, 8)
    )
    config.check_inputs(context.data)
    ai_feedback.train(config, context, "feedback")
    train, heldout = read_pairs(Jsonl(context.stage_dir("feedback") / "rows" / "rows.jsonl", heldout=0.2))
    assert len(train) + len(heldout) == 6
    for pair in (*train, *heldout):
        assert (
            pair.chosen_messages[0]["content"].startswith("What is") and pair.chosen_messages[1]["role"] == "assistant"
        )


def test_a_completion_that_ended_at_once_is_learnt(context, tmp_path):
    tokenizer, path = context.tokenizer, tmp_path / "rows.jsonl"
    ids = {"prompt_tokens": [tokenizer.bos_id, *tokenizer.encode("It was")], "rejected_tokens": [tokenizer.eos_id]}
    row = {"prompt": "It was", "chosen": " good", "rejected": "", "chosen_tokens": tokenizer.encode(" good"), **ids}
    asked = [{"role": "user", "content": "It was"}]
    said = {name: [{"role": "assistant", "content": row[name].strip()}] for name in ("chosen", "rejected")}
    for texts in ({}, {"prompt": asked, **said}):
        path.write_text("".join(json.dumps(row | texts | {"annotator": i}) + "\n" for i in range(2)))
        [group] = map(encode_pair(tokenizer), read_pairs(Jsonl(path)).train)
        assert group.pairs == ((0, 1),) and group.completion_tokens == (
            tuple(row["chosen_tokens"]),
            (tokenizer.eos_id,),
        )
        assert group.prompt_tokens == tuple(ids["prompt_tokens"])
    path.write_text("".join(json.dumps(row | {"rejected_tokens": [i + 9]}) + "\n" for i in range(2)))
    with pytest.raises(
        UserError, match="'rejected_tokens' are not this model's tokens of 'rejected': ''; leave ids out"
    ):
        list(map(encode_pair(tokenizer), read_pairs(Jsonl(path)).train))


def test_what_cannot_be_is_one_line(context, tmp_path):
    for changes, said in (
        ({"batch_size": 7}, "batch_size=7 must be even: two completions a prompt"),
        ({"constitution": "mine.json"}, "principles and constitution: only one of the two"),
        ({"least_confidence": 0.5}, "least_confidence"),
    ):
        with pytest.raises(ValueError, match=said):
            ai_feedback.Config(**{**CONFIG, **changes})
    long = ai_feedback.Config(**CONFIG, judge=LocalJudge("sft", length=20))
    with pytest.raises(UserError, match=r"^judge.length=20 must hold a question of \d+ tokens"):
        long.check_tokenizer(context.tokenizer)
    for content, said in (
        (None, "No such file"), ("{", "not JSON"), ("[]", "a constitution is a list of objects with critique"),
        ('[{"critique": "c", "revision": "r"}]', "principle 1 has no text 'preference'"),
    ):  # fmt: skip
        path = tmp_path / "constitution.json"
        if content is not None:
            path.write_text(content)
        config = ai_feedback.Config(**{**CONFIG, "principles": ()}, constitution=str(path))
        with pytest.raises(UserError, match=f"constitution: .*{said}"):
            config.check_inputs(context.data)
