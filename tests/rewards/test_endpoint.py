"""A model behind an endpoint: a real server on this host that answers, refuses, hangs, hangs up and comes back."""

import json
import math
import time

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.rewards.endpoint import Answer, Client, Endpoint, Question
from rlhf_jax.rewards.judging import EndpointJudge, LocalJudge, Verdict, ask, letter_probability, read_answer
from tests.rewards.serving import Server, answer


def client(server, path, **changes):
    return Client(Endpoint(server.url, "judge-1", **{"pause": 0.01, "retries": 2, "seconds": 1.0, **changes}), path)


def test_a_question_is_asked_once_as_the_api_has_it_and_its_costs_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    questions = [Question(f"q{i}?\u2028", max_tokens=3, top_logprobs=5) for i in range(20)]
    with Server(answer) as server:
        ours = client(server, tmp_path / "a.jsonl", api_key_env="MY_KEY", price_in=2.0, price_out=10.0)
        answers = ours(questions)
        path, headers, body = next(one for one in server.asked if one[2]["messages"][0]["content"] == "q0?\u2028")
        assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
        assert body == {
            "model": "judge-1", "messages": [{"role": "user", "content": "q0?\u2028"}], "max_tokens": 3,
            "temperature": 0, "logprobs": True, "top_logprobs": 5,
        }  # fmt: skip
        assert ours.costs() == {
            "judge_requests": 20, "judge_tokens": 220, "judge_dollars": pytest.approx((200 * 2 + 20 * 10) / 1e6),
        }  # fmt: skip
        assert ours(questions[::-1]) == answers[::-1] and len(server.asked) == 20
    again = client(server, tmp_path / "a.jsonl", api_key_env="MY_KEY")  # nobody is there any more
    assert again(questions) == answers and "secret" not in (tmp_path / "a.jsonl").read_text()


def test_who_is_away_is_asked_again(tmp_path):
    with Server((500, "oh"), "hang up", (429, "later"), answer) as server:
        [said] = client(server, tmp_path / "a.jsonl", retries=3)([Question("q")])
        assert said == Answer("B", {}, 10, 1) and len(server.asked) == 4
        assert server.times[3] - server.times[2] >= 1  # what Retry-After asks for
    with Server("hang", answer) as server:
        began = time.monotonic()
        assert client(server, tmp_path / "b.jsonl", seconds=0.3)([Question("q")])[0].text == "B"
        assert time.monotonic() - began < 1.4


@pytest.mark.parametrize("how", ["drip", "drip headers", "drip error"])
def test_an_answer_that_comes_a_byte_now_and_then_is_late(tmp_path, how):
    with Server(how) as server:
        began = time.monotonic()
        with pytest.raises(UserError, match=r"cannot be reached \(timed out\), 2 times in a row"):
            client(server, tmp_path / "a.jsonl", seconds=0.6, retries=1)([Question("q")])
        assert time.monotonic() - began < 15 and len(server.asked) == 2  # whole answers would take a minute
        server.script = [answer]
        assert client(server, tmp_path / "a.jsonl")([Question("q")])[0].text == "B"


def test_equal_questions_are_asked_once(tmp_path):
    questions = [Question(f"q{i % 2}") for i in range(12)]
    with Server("hang", answer) as server:  # the first is under way while the others are due
        ours = client(server, tmp_path / "a.jsonl", seconds=30.0, price_in=1.0)
        assert [one.text for one in ours(questions)] == ["B"] * 12 and len(server.asked) == 2
        assert ours.costs() == {"judge_requests": 2, "judge_tokens": 22, "judge_dollars": pytest.approx(20 / 1e6)}


def test_a_key_loses_the_line_break_of_its_file_and_one_that_is_no_header_is_named_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret\n")
    with Server(answer) as server:
        client(server, tmp_path / "a.jsonl", api_key_env="MY_KEY")([Question("q")])
        assert server.asked[0][1]["Authorization"] == "Bearer secret"
        for key in ("sec\nret", "sécret", "sec\x7fret", "“secret”"):
            monkeypatch.setenv("MY_KEY", key)
            with pytest.raises(UserError, match=r"endpoint.api_key_env: the environment variable MY_KEY holds") as told:
                client(server, tmp_path / "b.jsonl", api_key_env="MY_KEY")
            assert "\n" not in str(told.value) and "ret" not in str(told.value).split("holds")[1]


@pytest.mark.parametrize(
    ("script", "said", "times"),
    [
        ([(401, '{"error":\n"no key"}')], r'answers 401: \{"error": "no key"\}$', 1),
        ([(200, "<html>")], "answers with what is no JSON: '<html>'", 1),
        ([(200, '{"object": "list"}')], "does not answer as chat/completions does: .*list", 1),
        ([(503, "starting")], "answers 503: starting, 3 times in a row; the answers so far are in .*a.jsonl", 3),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, script, said, times):
    with Server(*script) as server:
        with pytest.raises(UserError, match=said) as caught:
            client(server, tmp_path / "a.jsonl", parallel=1)([Question("q")])
        assert "\n" not in str(caught.value) and len(server.asked) == times


def test_a_run_goes_on_where_the_endpoint_went_away(tmp_path):
    questions = [Question(f"q{i}") for i in range(6)]
    with Server(*[answer] * 4, (500, "")) as server:
        with pytest.raises(UserError, match="answers 500"):
            client(server, tmp_path / "a.jsonl", parallel=1)(questions)
        with (tmp_path / "a.jsonl").open("a") as file:
            file.write('{"key": "torn')  # by a process that was killed
        server.script = [answer]
        before = len(server.asked)
        assert [one.text for one in client(server, tmp_path / "a.jsonl", parallel=1)(questions)] == ["B"] * 6
        assert len(server.asked) - before == 2
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert len(lines) == 6 and all(json.loads(line)["text"] == "B" for line in lines)


def test_nobody_there(tmp_path):
    with Server(answer) as server:
        pass
    with pytest.raises(UserError, match=r"cannot be reached \(.*refused\), 3 times in a row"):
        client(server, tmp_path / "a.jsonl")([Question("q")])


class TestJudging:
    def test_the_letters_share_their_probability(self):
        logprobs = {"B": math.log(0.6), " A": math.log(0.15), "A": math.log(0.05)}
        assert letter_probability(logprobs) == pytest.approx(0.25)
        assert letter_probability({"So": -0.1}) is None
        assert letter_probability({"A": -9.0}) == 1.0

    def test_without_log_probs_the_letter_that_is_said_counts(self):
        said = {"A": 1, " (B)": 0, "**a**": 1, "Option B.": 0, "A: it is kind": 1, "B\n": 0}
        assert {text: read_answer(Answer(text)) for text in said} == said
        assert [read_answer(Answer(text)) for text in ("Both", "", "neither", "A good question")] == [None] * 4

    def test_both_orders_are_averaged(self):
        assert Verdict(0.9, 0.5).probability == pytest.approx(0.7)
        assert Verdict(0.9, 0.2).is_flipped and not Verdict(0.9, 0.8).is_flipped

    def test_a_question_is_filled_once(self):
        text = ask("{principle}|{prompt}|{first}|{second}", principle="p", prompt="{first}", first="{x}", second="b")
        assert text == "p|{first}|{x}|b"

    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda: LocalJudge(template="{first} or {last}"), "judge.template: 'last' cannot be filled"),
            (lambda: LocalJudge(template="{first}"), r"judge.template has no \{second\}"),
            (lambda: LocalJudge(template="{first} {second} {"), "judge.template: .* cannot be filled"),
            (lambda: EndpointJudge(Endpoint("localhost", "m")), "endpoint.url must begin with http"),
            (lambda: Endpoint("http://x", "m", retries=-1), "endpoint.retries must be at least 0, got -1"),
            (lambda: Endpoint("http://x", "m", seconds=0.0), "endpoint.seconds must be over 0"),
        ],
    )
    def test_fields_that_cannot_be(self, make, said):
        with pytest.raises(ValueError, match=said):
            make()
