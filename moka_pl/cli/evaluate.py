"""``moka-pl evaluate``: the lm-evaluation-harness on a base model with its adapter."""

import re
import sys
from pathlib import Path
from typing import Literal

from moka_pl.errors import ConfigError
from moka_pl.utils import expanded


def evaluate(
    adapter: Path | None = None,
    tasks: str = "",
    base: str | None = None,
    data: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    output: Path | None = None,
    quantization: Literal["nf4", "fp4", "int8", "int4", "float8", "hqq", "gptq", "awq", "none"] | None = None,
    apply_chat_template: bool = False,
    log_samples: bool = False,
) -> None:
    """Run EleutherAI's lm-evaluation-harness on a base model, with or without an adapter.

    Args:
        adapter: An adapter directory. Without one, base is evaluated alone.
        tasks: Names of tasks or groups, separated by commas, such as arc_easy,piqa, or patterns such as
            mmlu_*.
        base: Name or path of the base model. Default: the one stored with the adapter.
        data: A folder of local data, used instead of the hub: sub-folders named by task with a test.json
            each, or MMLU's test/ and dev/ with CSV files (tasks mmlu_<subject>, group mmlu). Other tasks come
            from lm_eval.
        limit: Number of questions per task, from the first. Default: all.
        num_fewshot: Few-shot examples before each question. Default: each task's own number (5 for local
            MMLU, 0 for other local tasks).
        batch_size: Sequences per batch.
        output: JSON file to write, or an existing folder. Default: results_<time>.json in the adapter
            directory, or in lightning_logs/evaluate/<base> without an adapter.
        quantization: Storage of the base's linear weights, as in --model.backbone.quantization. Only without
            an adapter, which stores its own. Default: nf4.
        apply_chat_template: Wrap the prompts in the tokenizer's chat template.
        log_samples: Add each question with the model's scores to the JSON file.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if adapter is None and not base:
        raise ConfigError("nothing to evaluate; give --adapter DIR, or --base NAME for a base model alone")
    if adapter is not None and quantization is not None:
        raise ConfigError(
            "--quantization cannot be combined with --adapter, which determines it; remove one of them"
        )
    counts = {"limit": (limit, 1), "num_fewshot": (num_fewshot, 0), "batch_size": (batch_size, 1)}
    for name, (value, least) in counts.items():
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, not {value}")
    from moka_pl.evaluation.lm_eval.tasks import require_lm_eval

    if adapter is not None:
        _check_adapter(adapter, base)
    require_lm_eval()
    from lm_eval.utils import make_table

    from moka_pl.evaluation.lm_eval.results import results_path, write_results
    from moka_pl.evaluation.lm_eval.run import check_chat_template, load_described, run_harness
    from moka_pl.evaluation.lm_eval.tasks import select_tasks

    alone = Path("lightning_logs/evaluate") / re.sub(r"[^\w.-]+", "_", str(base)).strip("_.")
    path = results_path(output, alone if adapter is None else adapter)
    selection = select_tasks(names, data, num_fewshot)
    checked = {"before": check_chat_template} if apply_chat_template else {}
    model, tokenizer, about = load_described(adapter, base, quantization, **checked)
    results = run_harness(
        model,
        tokenizer,
        selection,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        apply_chat_template=apply_chat_template,
        log_samples=log_samples,
    )
    results["config"]["model"] = about["base"]["name"]
    source = None if data is None else str(expanded(data).absolute())
    results["moka_pl"] = about | {"tasks": selection.names, "data": source}
    write_results(results, path)
    print(str(make_table(results)).strip())
    print(f"Results saved in {path}", file=sys.stderr)


def _check_adapter(adapter: Path, base: str | None) -> None:
    """Refuses a damaged folder, and one that scores no texts, before the harness is imported."""
    from moka_pl.adapters import read_adapter
    from moka_pl.adapters.reading import read_counted_shapes
    from moka_pl.inference.load import check_kind

    check_kind(read_adapter(adapter), adapter, base)
    read_counted_shapes(adapter)
