"""Chat templates of strangers."""

import gc
import os

import pytest

from moka_pl.errors import ConfigError, DataError
from moka_pl.prompts import rendering
from moka_pl.prompts.ends import end_tokens
from moka_pl.prompts.rendering import check_template, render_chat
from moka_pl.prompts.templates import chat_prompt

LOOP = "{% for i in range(99999) %}"
DEEP = "".join(f"{{% for {name} in messages %}}" for name in "abcdefgh")
HOSTILE = {
    "nested loops": LOOP + LOOP + "{{ i }}" + "{% endfor %}" * 2,
    "loops over messages": DEEP + "{{ a.role }}" + "{% endfor %}" * 8,
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "loops over characters": "".join(f"{{% for {name} in messages[0].content %}}" for name in "abcd")
    + "{% endfor %}" * 4,
    "loops over tools": "".join(f"{{% for {name} in tools %}}" for name in "abcdefgh") + "{% endfor %}" * 8,
    "a power": "{{ 10 ** (10 ** 9) }}",
    "a long text": "{{ 'a' * 10 ** 10 }}",
    "a wide field": "{{ '%10000000000s' % 1 }}",
    "doubling": "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}",
}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """No test knows what another one has tried."""
    monkeypatch.setattr(rendering, "_bounded", {})


@pytest.mark.parametrize(
    "name", ["a long text", "a wide field", *(pytest.param(name, marks=pytest.mark.slow) for name in HOSTILE)]
)
def test_a_template_that_does_not_end_is_refused(name, tiny_tokenizer):
    tiny_tokenizer.chat_template = HOSTILE[name]
    for _ in range(2):  # the verdict is kept
        with pytest.raises(
            DataError, match=r"the chat template of the tokenizer \(.*\) takes more than 1 s or"
        ) as caught:
            render_chat(tiny_tokenizer, [rendering.QUESTION], prompt=True)
        assert "\n" not in str(caught.value)
    assert end_tokens(tiny_tokenizer) == [tiny_tokenizer.eos_token_id]


def test_one_try_that_fails_is_not_the_templates_fault(tiny_tokenizer, monkeypatch):
    real, tries = rendering._ends, []

    def ends(work):
        tries.append(bool(tries) and real(work))
        return tries[-1]

    monkeypatch.setattr(rendering, "_ends", ends)
    check_template(tiny_tokenizer)
    check_template(tiny_tokenizer)  # the verdict is kept
    assert tries == [False, True]


def test_what_this_process_has_left_to_collect_is_not_collected_by_the_child(tmp_path):
    class Left:
        def __del__(self):
            (tmp_path / str(os.getpid())).touch()

    armed = [True]  # a handler stays for good; it stands for any that allocates
    os.register_at_fork(after_in_child=lambda: armed and gc.isenabled() and gc.collect())
    left = Left()
    left.itself = left
    del left
    assert rendering._ends(lambda: [[[]] for _ in range(10**5)] and None)
    armed.clear()
    assert gc.isenabled()
    gc.collect()
    assert [file.name for file in tmp_path.iterdir()] == [str(os.getpid())]


def test_a_slow_child_is_ended(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(rendering, "_LONGEST_WAIT", 0.01)
    monkeypatch.setattr(rendering, "_limit", lambda: None)
    monkeypatch.setattr(rendering, "_render_samples", lambda tokenizer: rendering.time.sleep(60))
    with pytest.raises(DataError, match="takes more than"):
        check_template(tiny_tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{% for",
        "{{ raise_exception('never\nmind') }}",
        "{{ messages[3].x }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_a_template_that_refuses_is_another_matter(template, tiny_tokenizer):
    tiny_tokenizer.chat_template = template
    check_template(tiny_tokenizer)
    with pytest.raises(ConfigError, match=r"chat template rejects a single user message: .*Choose") as caught:
        chat_prompt("Why?", tiny_tokenizer)
    assert "\n" not in str(caught.value)


def test_without_fork_nothing_is_tried(tiny_tokenizer, monkeypatch):
    monkeypatch.delattr(rendering.os, "fork")
    assert render_chat(tiny_tokenizer, [rendering.QUESTION], prompt=True).endswith("<|im_start|>assistant\n")
