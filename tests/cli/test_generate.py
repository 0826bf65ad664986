"""``moka-pl generate``."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moka_pl.adapters import adapters_disabled
from moka_pl.adapters.reading import WEIGHTS_NAME
from moka_pl.backbone import BackboneConfig, load_backbone, load_tokenizer
from moka_pl.backbone.random_weights import shape_config
from moka_pl.cli.generate import generate
from moka_pl.cli.main import main
from moka_pl.errors import AdapterError, ConfigError, MokaError
from moka_pl.inference import complete, load_model
from moka_pl.prompts.segments import alpaca
from moka_pl.prompts.templates import cloze_prompt

PROMPT = "What is the capital of France?"


CHAT = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
ALPACA = alpaca({"instruction": PROMPT, "input": "", "output": "", "messages": []})[0].text
CLOZE = cloze_prompt(PROMPT)


def likeliest(adapter: Path, count: int, disabled: bool = False, text: str = CHAT) -> str:
    """The likeliest continuation of a text, a full forward pass a token; each computed once."""
    weights = (adapter / WEIGHTS_NAME).read_bytes()
    if (weights, count, disabled, text) not in KNOWN:
        KNOWN[weights, count, disabled, text] = computed(adapter, count, disabled, text)
    return KNOWN[weights, count, disabled, text]


KNOWN: dict[tuple[bytes, int, bool, str], str] = {}


def computed(adapter: Path, count: int, disabled: bool, text: str) -> str:
    """The likeliest continuation, with the adapter or without it."""
    model, tokenizer = load_model(adapter)
    prompt = ids = torch.tensor([tokenizer(text).input_ids], device=model.device)

    def extend(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)

    for _ in range(count):
        if disabled:
            with adapters_disabled(model):
                ids = extend(ids)
        else:
            ids = extend(ids)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)


def test_it_prints_the_likeliest_answer(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = likeliest(adapter, 12)
    capsys.readouterr()
    for _ in range(2):
        generate(adapter, PROMPT, max_new_tokens=12)
        output = capsys.readouterr()
        assert output.out == expected + "\n"
        assert output.err == ""


def test_compare_prints_both(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapted, base = likeliest(adapter, 12), likeliest(adapter, 12, disabled=True)
    assert adapted != base
    capsys.readouterr()
    generate(adapter, PROMPT, max_new_tokens=12, compare=True)
    assert capsys.readouterr().out == f"[base] {base}\n\n[adapted] {adapted}\n"


def test_on_the_command_line(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(adapter, PROMPT, max_new_tokens=5, compare=True)
    expected = capsys.readouterr().out
    main(["generate", str(adapter), PROMPT, "--max_new_tokens", "5", "--compare"])
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("stored", "given", "text"),
    [
        ("alpaca", None, ALPACA),
        ("cloze", None, CLOZE),
        ("letters", None, CLOZE),
        ("llm_adapters", None, ALPACA),
        ("chat", None, CHAT),
        ("alpaca", "chat", CHAT),
        ("chat", "alpaca", ALPACA),
        ("alpaca", "raw", PROMPT),
        ("one's own", "raw", PROMPT),
    ],
)
def test_it_asks_in_the_words_of_the_training(
    make_adapter: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    stored: str,
    given: str | None,
    text: str,
) -> None:
    adapter = make_adapter(prompt=stored)
    expected = likeliest(adapter, 8, text=text)
    others = {likeliest(adapter, 8, text=other) for other in {CHAT, ALPACA, CLOZE, PROMPT} - {text}}
    assert expected not in others
    capsys.readouterr()
    option = [] if given is None else ["--prompt_format", given]
    main(["generate", str(adapter), PROMPT, "--max_new_tokens=8", *option])
    assert capsys.readouterr().out == expected + "\n"


def without_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the chat template from the tokenizer of every base."""

    def load(config: BackboneConfig) -> object:
        tokenizer = load_tokenizer(config)
        tokenizer.chat_template = None
        return tokenizer

    monkeypatch.setattr("moka_pl.backbone.load.load_tokenizer", load)


def test_formats_that_cannot_be_had(
    make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(prompt="one's own")
    with pytest.raises(ConfigError, match=r"an unknown prompt; .* not \"one's own\""):
        generate(adapter, PROMPT)
    with pytest.raises(
        ConfigError,
        match="prompt_format must be one of chat, alpaca, cloze, letters, llm_adapters, raw, not 'x'",
    ):
        generate(adapter, PROMPT, prompt_format="x")

    without_template(monkeypatch)
    with pytest.raises(ConfigError, match="no chat template; choose another, such as alpaca"):
        generate(adapter, PROMPT, prompt_format="chat")


def test_without_a_remembered_format_or_a_template_the_prompt_stays_bare(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = likeliest(adapter, 8, text=PROMPT)
    without_template(monkeypatch)
    capsys.readouterr()
    generate(adapter, PROMPT, max_new_tokens=8)
    assert capsys.readouterr().out == expected + "\n"


def test_temperature_samples(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        generate(adapter, PROMPT, max_new_tokens=12, temperature=2.0)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_the_base_may_lie_elsewhere(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(adapter, PROMPT, max_new_tokens=5)
    expected = capsys.readouterr().out
    base = load_backbone(BackboneConfig("tiny", weights="random"))
    base.model.config.save_pretrained(tmp_path / "base")  # the same shape and seed: the same weights
    main(["generate", str(adapter), PROMPT, "--max_new_tokens=5", f"--base={tmp_path / 'base'}"])
    assert capsys.readouterr().out == expected
    with pytest.raises(AdapterError, match="another base model"):
        generate(adapter, PROMPT, base=_another(base, tmp_path / "other"))


def _another(base: object, folder: Path) -> str:
    base.model.config.intermediate_size += 64
    base.model.config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -0.5}, "temperature must be at least 0 and finite, not -0.5"),
        ({"temperature": float("nan")}, "temperature must be"),
    ],
)
def test_options_that_cannot_work(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(**({"adapter": tmp_path, "prompt": PROMPT} | options))


def test_several_prompts_are_answered_in_turn(
    loaded: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = [continued(loaded, text) for text in ("Hi", "Bye")]
    # Options may stand between the prompts.
    main(["generate", str(loaded.path), "Hi", "--max_new_tokens", "12", "Bye"])
    assert capsys.readouterr().out == f"> Hi\n{alone[0]}\n\n> Bye\n{alone[1]}\n"
    main(["generate", "--max_new_tokens=12", str(loaded.path), "--", "Hi"])
    assert capsys.readouterr().out == alone[0] + "\n"


def test_a_file_is_answered_in_its_order(
    loaded: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["Hi", "What is the capital of France?", "Bye", "x"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(texts))
    expected = [f"> {text}\n{continued(loaded, text)}\n" for text in texts]
    main(["generate", str(loaded.path), f"--file={file}", "--batch_size=3", "--max_new_tokens=12"])
    assert capsys.readouterr().out == "\n".join(expected)


def continued(loaded: SimpleNamespace, text: str) -> str:
    turns = [{"role": "user", "content": text}]
    ids = loaded.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    return complete(loaded.model, loaded.tokenizer, [ids["input_ids"]], 12, do_sample=False)[0].text


def test_what_is_streamed_is_what_is_generated(
    loaded: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = continued(loaded, "Hi")
    written: list[str] = []
    monkeypatch.setattr(
        "builtins.print", lambda *words, end="\n", **options: written.append(f"{words[0]}{end}")
    )
    generate(loaded.path, "Hi", max_new_tokens=12)
    assert "".join(written) == expected + "\n"
    assert len(written) > 1
    written.clear()
    generate(loaded.path, "Hi", max_new_tokens=12, num_beams=2)
    assert len(written) == 1


def test_a_terminal_is_shown_nothing_that_it_acts_upon(
    loaded: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded.tokenizer, "decode", lambda *args, **options: "a\x1b[2Jb\n")
    generate(loaded.path, "Hi", max_new_tokens=1)
    assert "a\x1b[2Jb" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    generate(loaded.path, "Hi", max_new_tokens=1)
    assert "a\\x1b[2Jb\n" in capsys.readouterr().out


def test_merged_it_answers_the_same(loaded: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for options in ([], ["--merge"]):
        main(["generate", str(loaded.path), PROMPT, "--max_new_tokens=24", *options])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_a_seed_repeats_the_drawing(loaded: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for seed in (1, 1, 2):
        generate(loaded.path, PROMPT, max_new_tokens=12, do_sample=True, top_p=0.99, seed=seed)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_without_prompts_a_terminal_gets_a_chat(
    loaded: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["Hi", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    expected = continued(loaded, "Hi")
    main(["generate", str(loaded.path), "--max_new_tokens=12"])
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": [], "file": None}, "nothing to answer; give a prompt, or --file FILE"),
        ({"file": Path("prompts.txt")}, "prompts cannot be combined with --file"),
        ({"prompt": [], "file": Path("prompts.txt")}, r"prompts.txt does not exist"),
        ({"prompt": ["Hi", " "]}, "prompt is empty"),
        ({"compare": True, "merge": True}, "--compare cannot be combined with --merge"),
        ({"compare": True, "prompt": [], "file": Path("a.txt")}, "--compare cannot be combined with --file"),
        ({"compare": True, "prompt": []}, "--compare cannot be combined with a chat"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"system": "Be brief.", "prompt_format": "raw"}, "raw has no system message"),
    ],
)
def test_it_is_refused_before_anything_is_loaded(
    options: dict[str, object], message: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moka_pl.inference.load_model", lambda *args, **more: pytest.fail("loaded"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    with pytest.raises(MokaError, match=message):
        generate(**({"adapter": saved, "prompt": "Hi"} | options))


def test_a_prompt_beyond_the_context_is_named_before_the_first_answer(
    loaded: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"prompt 2 has 6\d\d tokens, which leave .* context of 512"):
        generate(loaded.path, ["Hi", "x" * 600])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ["Hi", "x" * 600]}, r"prompt 2 has 6\d\d tokens, which leave .* context of 512"),
        ({"prompt": [], "file": "long.txt"}, r"long\.txt, line 2 has 6\d\d tokens"),
        ({"prompt": [], "system": "x" * 600}, r"the chat with its --system message has 6\d\d tokens"),
        ({"base": "other"}, "does not fit this model"),
    ],
)
def test_what_the_tokenizer_and_the_sizes_tell_is_refused_before_weights_are_loaded(
    options: dict,
    message: str,
    saved: Path,
    tmp_path: Path,
    no_weights: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_weights()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    if "file" in options:
        options["file"] = tmp_path / "long.txt"
        options["file"].write_text("Hi\n" + "x" * 600)
    if "base" in options:
        shape = shape_config("tiny")
        shape.num_attention_heads = shape.num_key_value_heads = 1
        shape.save_pretrained(tmp_path / "other")
        options["base"] = str(tmp_path / "other")
    with pytest.raises(MokaError, match=message):
        generate(**({"adapter": saved, "prompt": "Hi"} | options))


def test_a_system_message_without_a_template_is_refused_before_weights_are_loaded(
    saved: Path, no_weights: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_weights()
    without_template(monkeypatch)
    with pytest.raises(ConfigError, match="has no chat template"):
        generate(saved, PROMPT, system="Be brief.")
