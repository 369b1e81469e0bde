"""Chat templates: transformers' output, the mask of answers, and templates that mean no good."""

import json
import time
from pathlib import Path

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.interop import chat
from rlhf_jax.interop.chat import ChatTemplate
from rlhf_jax.interop.tokenizers import load_tokenizer
from tests.oracles_hf.awkward import CONVERSATIONS
from tests.oracles_hf.templates import CHATML, TEMPLATES

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

ORACLES = Path(__file__).parents[1] / "oracles_hf"
GOLDEN = json.loads((ORACLES / "tokenizers.json").read_text())
USER = [{"role": "user", "content": "Hi"}]
TALK = [*USER, {"role": "assistant", "content": "Hello 😀"}, *USER, {"role": "assistant", "content": "Bye"}]


@pytest.fixture(scope="module")
def one_second():
    """What a template may take is less here, so that the tests do not."""
    whole, chat.SECONDS = chat.SECONDS, 1
    chat._worker().stop()
    yield
    chat.SECONDS = whole
    chat._worker().stop()


def render(source, messages=USER, **options):
    return ChatTemplate(source, origin="it").render(messages, **options)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("key", ["own", *TEMPLATES])
def test_text_tokens_and_masks_are_those_of_transformers(name, key):
    tokenizer = load_tokenizer(ORACLES / "tokenizers" / name)
    kept = GOLDEN[name]["own"] if key == "own" else GOLDEN[name]["templates"][key]
    template = tokenizer.chat if key == "own" else ChatTemplate(TEMPLATES[key], tokenizer.chat.tokens)
    for messages, want in zip(CONVERSATIONS, kept, strict=True):
        text = template.render(messages)
        assert text == want["text"]
        assert tokenizer.encode(text) == want["ids"]
        assert template.render(messages, add_generation_prompt=True) == want["prompt"]
        if "mask" in want:
            ids, mask = tokenizer.encode_spans(*template.render_spans(messages))
            assert ids == want["ids"] and mask == [bool(x) for x in want["mask"]]


def test_a_prompt_is_what_the_answer_follows():
    tokenizer = load_tokenizer(ORACLES / "tokenizers" / "byte_level")
    tokens, mask = tokenizer.encode_chat(TALK[:2])
    prompt = tokenizer.encode_chat_prompt(USER)
    assert tokens[: len(prompt)] == prompt and not any(mask[: len(prompt)])
    answer = [token for token, counted in zip(tokens, mask, strict=True) if counted]
    assert answer == [*tokenizer.encode("Hello 😀"), tokenizer.eos_id]


@pytest.mark.parametrize("messages", [TALK, TALK[:2], TALK[1:], [*TALK[:2], *USER], USER])
def test_without_blocks_the_answers_are_found_by_what_each_turn_adds(messages):
    marked = ChatTemplate(CHATML, end="<|im_end|>")
    source = CHATML.replace("{%- generation %}{{ message", "{{- message").replace("{%- endgeneration %}", "")
    bare = ChatTemplate(source, end="<|im_end|>")
    assert bare.render_spans(messages) == marked.render_spans(messages)


def test_answers_are_found_where_the_template_rewrites_them_once_others_follow():
    source = """\
{%- for message in messages %}<{{ message.role }}>
{%- if message.role == 'assistant' and loop.last %}[thought]{% endif %}{{ message.content }}</{{ message.role }}>
{%- endfor %}{% if add_generation_prompt %}<assistant>[thought]{% endif %}"""
    text, spans = ChatTemplate(source, end="</assistant>").render_spans(TALK)
    assert [text[begin:end] for begin, end in spans] == ["Hello 😀</assistant>", "Bye</assistant>"]
    hidden = ChatTemplate("{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}", origin="it")
    with pytest.raises(UserError, match="it: the chat template hides where the assistant's answer, message 1"):
        hidden.render_spans([TALK[0], {"role": "assistant", "content": "x"}, *USER])


def test_blocks_in_macros_and_captures_are_found_and_changed_ones_refused():
    source = (
        "{% macro say(text) %}{% generation %}{{ text }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{% set all %}[{{ say(m.content) }}]{% endset %}{{ all }}{% endfor %}"
    )
    text, spans = ChatTemplate(source).render_spans(TALK[:2])
    assert [text[begin:end] for begin, end in spans] == ["Hi", "Hello 😀"]
    cut = ChatTemplate("{% set x %}{% generation %}abc{% endgeneration %}{% endset %}{{ x[1:] }}", origin="it")
    with pytest.raises(UserError, match="it: the chat template changes what its generation blocks hold"):
        cut.render_spans(USER)


def test_variables_are_there_for_the_template():
    variables = {"tools": [{"name": "f"}], "enable_thinking": False}
    assert render("{{ tools[0].name }}{{ enable_thinking }}", variables=variables) == "fFalse"
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10


HOSTILE = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by filter": "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).x }}",
    "globals": "{{ raise_exception.__globals__['os'].system('touch gone') }}",
    "code": "{{ cycler.__init__.__globals__.os.popen('touch gone').read() }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}{{ ('%s' % messages.append).x.y }}",
    "changing the input": "{% set x = messages.append(1) %}",
    "imports": "{% include '/etc/passwd' %}",
    "a long range": "{% for x in range(10**9) %}x{% endfor %}",
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "ranges that print": "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
    "multiplied": "{{ 'x' * 10**10 }}",
    "multiplied list": "{{ ([0] * 10**9) | length }}",
    "power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "doubled": "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "padded": "{{ 'x'.ljust(10**11) }}",
    "format width": "{{ '%999999999999d' % 1 }}",
    "indent": "{{ 'a\nb' | indent(10**11) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "twofold recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "syntax": "{% for %}",
    "unknown filter": "{{ 1 | nothing }}",
    "undefined": "{{ nothing.at.all }}",
    "its own word": "{{ raise_exception('roles must alternate') }}",
    "division": "{{ 1 / 0 }}",
    "wrong types": "{{ 'a' + 1 }}",
    "half a character": "{{ '\\ud800' }}{{ 1 / 0 }}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates_are_one_error(case, tmp_path, monkeypatch, one_second):
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        render(HOSTILE[case])
    message = str(caught.value)
    assert message.startswith("it: the chat template ") and "\n" not in message and len(message) < 400
    assert time.monotonic() - began < 60
    assert list(tmp_path.iterdir()) == []
    assert render("{{ messages[0].content }}") == "Hi"  # the next one is none the worse


def test_words_of_the_errors(one_second):
    for case, words in {
        "classes": "reaches for what a template may not have",
        "its own word": "roles must alternate",
        "syntax": "line 1",
        "recursion": "calls itself without end",
        "multiplied": "makes more text than it may",
    }.items():
        with pytest.raises(UserError, match=words):
            render(HOSTILE[case])


def test_messages_are_no_templates():
    said = "{{ 1 + 1 }}{% raw %}\n<|im_end|>"
    assert render("{{ messages[0].content }}", [{"role": "user", "content": said}]) == said


def test_long_templates_and_texts():
    with pytest.raises(UserError, match="it: a chat template of 1048577 characters"):
        ChatTemplate("x" * (2**20 + 1), origin="it")
    long = [{"role": "user", "content": "é" * 3_000_000}]
    assert render("{{ messages[0].content }}", long) == "é" * 3_000_000


def test_the_process_is_started_again_and_ends_with_its_owner():
    assert render("a") == "a"
    worker = chat._worker()
    first = worker._process
    first.kill()
    first.wait()
    with pytest.raises(UserError, match="more time or memory"):
        render("a")
    assert render("a") == "a"
    second = worker._process
    assert second.pid != first.pid
    worker.stop()
    assert second.poll() is not None and worker._process is None


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    chat._worker().stop()
    monkeypatch.setattr(chat.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs the package jinja2.*pip install "rlhf_jax\[hf\]"'):
        render("a")


def test_the_worker_imports_nothing_of_the_package():
    source = Path(chat.__file__).with_name("chat_worker.py").read_text()
    assert "rlhf_jax" not in source


def test_only_the_late_answers_count():
    source = CHATML.replace("{%- generation %}{{ message", "{{- message").replace("{%- endgeneration %}", "")
    for template in (ChatTemplate(CHATML, end="<|im_end|>"), ChatTemplate(source, end="<|im_end|>")):
        _, both = template.render_spans(TALK)
        for start, kept in ((0, both), (1, both), (2, both[1:]), (3, both[1:]), (4, [])):
            assert template.render_spans(TALK, start=start)[1] == kept
    parts = "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}"
    with pytest.raises(UserError, match="not one generation block for each answer"):
        ChatTemplate(parts, origin="it").render_spans(TALK, start=2)
