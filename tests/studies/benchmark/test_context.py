"""The search for the longest row of tokens that fits, on made-up and on tiny memories."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from moka_pl.studies.benchmark import command, context
from moka_pl.studies.benchmark.arguments import make_parser, make_plan
from moka_pl.studies.benchmark.bench import Bench, Record
from moka_pl.studies.benchmark.context import STEP, Attempt, Search, find_limits, first_layers, search
from moka_pl.studies.benchmark.steps import plain_loss
from moka_pl.studies.benchmark.tables import context_table


def made_up(a_token: float, free: float, seconds: float = 1e-9, greedy: bool = False):
    """Attempts at steps that take so many GiB a token, and as a greedy one up to half of what is left."""
    made = []

    def attempt(tokens: int) -> Attempt:
        made.append(tokens)
        used = a_token * tokens
        fits = used <= free
        used += min(tokens * 1e-3, (free - used) / 2) if greedy and fits else 0.0
        return Attempt(tokens, fits, seconds * tokens**1.6, min(used, free))

    return attempt, made


@example(768, 30.391720662761447, False)
@given(st.integers(STEP, context.MOST - 1), st.floats(5, 80), st.booleans())
def test_a_search_closes_in_on_the_longest(longest: int, free: float, greedy: bool) -> None:
    # Half a token more than fits: the rounding of free / longest * longest must not decide.
    attempt, made = made_up(free / (longest + 0.5), free, greedy=greedy)
    found = search(attempt, free, 1e9)
    assert found.fits is not None
    assert found.fits.tokens <= longest
    assert found.trials == len(made) == len(set(made)) <= 14
    assert all(tokens % STEP == 0 and tokens <= context.MOST for tokens in made)
    if found.too_long is None:
        assert found.fits.tokens == context.MOST
    else:
        assert longest < found.too_long <= found.fits.tokens + max(STEP, 0.03 * found.fits.tokens)


def test_nothing_fits() -> None:
    attempt, _ = made_up(1.0, 16.0)
    assert search(attempt, 16.0, 1e9) == context.Longest(None, STEP, 0, 6)


def test_time_ends_a_search_with_a_prediction() -> None:
    attempt, made = made_up(0.001, 60.0, seconds=1e-6)  # 60,000 tokens fit, and would take 44 seconds
    found = search(attempt, 60.0, 20.0)
    assert found.too_long is None
    assert found.fits is not None
    assert 30_000 < found.fits.tokens == max(made) < 40_000
    assert found.predicted == 58_624  # a fiftieth below
    later = search(attempt, 120.0, 5.0, known=found.fits)  # no time for a longer one
    assert (later.fits, later.trials) == (found.fits, 0)
    assert later.predicted == 117_504


def test_a_search_that_ends_early_stays_below_what_failed() -> None:
    made = []

    def attempt(tokens: int) -> Attempt:
        made.append(tokens)  # a token takes more from 40,000 on
        return Attempt(tokens, tokens < 40_000, 1.0 if tokens < 40_000 else 30.0, 0.001 * tokens)

    found = search(attempt, 60.0, 31.0)
    assert found.fits is not None
    assert (found.fits.tokens, found.too_long) == (made[0], made[1])
    assert found.predicted == made[1] - STEP


@pytest.fixture
def gpu(monkeypatch) -> list[int]:
    """Cards of which each GiB takes 300 tokens; returns the lengths that were tried."""
    tried, card = [], [0]
    original = context._try_step

    @contextmanager
    def smaller_card(gib, device):
        card[0] = gib
        yield gib - 1.0

    def try_step(model, make_loss, optimizer, tokens):
        tried.append(tokens)
        done = original(model, make_loss, optimizer, min(tokens, 16))
        return Attempt(tokens, tokens <= 300 * card[0], done.seconds, min(tokens / 300, card[0]))

    monkeypatch.setattr(context, "smaller_card", smaller_card)
    monkeypatch.setattr(context, "_try_step", try_step)
    return tried


def test_the_rows_of_this_package(gpu, preset) -> None:
    bench = Bench("tiny", "cpu", checkpointing=True)
    records = list(context.measure_context(bench, Search((8, 4), 60.0), []))
    assert [(r.row, r.setting["gib"], r.checkpointing) for r in records] == [
        ("MoKA r10", 4, True),
        ("MoKA r10", 8, True),
        ("MoKA r2 all linear", 4, True),
        ("MoKA r2 all linear", 8, True),
    ]
    for record in records:
        assert record.error is None
        assert (
            record.values["tokens"] == record.values["predicted"] == {4: 1024, 8: 2304}[record.setting["gib"]]
        )
        assert record.values["too_long"] - record.values["tokens"] == STEP
        assert record.values["trainable"] > 0
    assert gpu[0] == STEP  # a short step first, which compiles


def test_a_few_layers_are_run_and_all_of_them_for_the_smallest_card(gpu, bench, monkeypatch) -> None:
    model = bench.built()
    model.get_input_embeddings().requires_grad_(True)
    counted, original = [], context._try_step

    def count(model, make_loss, optimizer, tokens):
        counted.append((len(model.get_decoder().layers), tokens))
        return original(model, make_loss, optimizer, tokens)

    monkeypatch.setattr(context, "_try_step", count)
    found = dict(find_limits(model, plain_loss, Search((8, 4), 60.0, layers=1)))
    every = len(model.get_decoder().layers)
    assert every > 1
    whole = [tokens for layers, tokens in counted if layers == every]
    assert whole == [STEP, found[4]["tokens"]]  # what compiles, and the longest
    assert {layers for layers, _ in counted} == {1, every}
    assert found[4]["peak_gib_all_layers"] == pytest.approx(found[4]["peak_gib"])
    assert not {"peak_gib_all_layers", "too_long_all_layers"} & set(found[8])


def test_layers_come_back(bench) -> None:
    model = bench.built()
    before = list(model.get_decoder().layers)
    for count in (1, None):
        with first_layers(model, count):
            assert list(model.get_decoder().layers) == before[:count]
        assert list(model.get_decoder().layers) == before
    with pytest.raises(ZeroDivisionError), first_layers(model, 1):
        1 / 0  # noqa: B018
    assert list(model.get_decoder().layers) == before


def test_a_step_out_of_memory_leaves_nothing_behind(bench) -> None:
    model = bench.built()
    embeddings = model.get_input_embeddings()
    embeddings.requires_grad_(True)
    optimizer = torch.optim.SGD(embeddings.parameters(), lr=0.0)

    def fails(error: Exception):
        def loss():
            raise error

        return lambda model, data: loss

    no_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert not context._try_step(model, fails(no_memory), optimizer, 8).fits
    assert context._try_step(model, plain_loss, optimizer, 8).fits
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="an illegal address"):
        context._try_step(model, fails(RuntimeError("an illegal address")), optimizer, 8)


def test_a_table_of_bounds_and_predictions() -> None:
    def record(row: str, gib: int, tokens: int, predicted: int, **more: float) -> Record:
        return Record("context", row, True, {"gib": gib}, {"tokens": tokens, "predicted": predicted} | more)

    table = context_table(
        [
            record("MoKA r10", 24, 10240, 10240, too_long=10496),
            record("MoKA r10", 40, 10240, 20480),
            record("MoKA r10", 80, 10240, 30720, too_long=40960),
            record("unsloth LoRA r8 q,v", 24, 8192, 8192, too_long=8448),
            record("unsloth LoRA r8 q,v", 40, 16384, 16384, too_long=16640),
            record("unsloth LoRA r8 q,v", 80, 16384, 16384, too_long=40960),
            Record("context", "MoKA r2 all linear", True, {"gib": 24}, error="it failed"),
        ]
    )
    assert table.splitlines()[2:] == [
        "| MoKA r10 | 10,240 (1.25) | ≥ 10,240, ≈ 20,480 (≈ 1.25) | ≥ 10,240, < 40,960, ≈ 30,720 |",
        "| unsloth LoRA r8 q,v | 8,192 | 16,384 | ≥ 16,384, < 40,960 |",
        "| MoKA r2 all linear | failed: it failed |  |  |",
    ]


def test_only_a_gpu_s_memory_is_searched(preset, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        command.main(["--preset", preset.name, "--context", "24"])
    assert "searches a GPU's memory, but preset tiny-cpu runs on the CPU" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    arguments = ["--preset", "llama3-8b-h100", "--context", "24", "40", "--unsloth"]
    plan = make_plan(make_parser().parse_args([*arguments, "--rows", "unsloth LoRA r8 q,v"]))
    assert (plan.measures, plan.search) == ((), Search((24, 40), 35.0))
    assert plan.command.endswith(
        "--preset llama3-8b-h100 --unsloth --context 24 40 --rows 'unsloth LoRA r8 q,v'"
    )
    plan = make_plan(make_parser().parse_args([*arguments, "--measure", "steps"]))
    assert plan.measures == ("steps",)
    assert plan.search == Search((24, 40), 35.0)
    assert plan.command.endswith("--preset llama3-8b-h100 --measure steps --unsloth --context 24 40")
    more = ["--seconds", "90", "--layers", "4"]
    plan = make_plan(make_parser().parse_args([*arguments, *more]))
    assert plan.search == Search((24, 40), 90.0, 4)
    assert plan.command.endswith("--unsloth --context 24 40 --seconds 90 --layers 4")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--layers", "4"], "--layers is an option of --context"),
        (["--context", "24", "--layers", "0"], "--layers must be above 0, not 0"),
        (["--context", "24", "--seconds", "-1"], "--seconds must be above 0, not -1.0"),
    ],
)
def test_options_of_a_search_are_checked(arguments, told, monkeypatch, capsys) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(SystemExit):
        command.main(["--preset", "llama3-8b-h100", *arguments])
    assert told in capsys.readouterr().err
