"""Chooses filters from the gradient of a run's own data; ``scripts/choose_filters.py`` runs it."""

import sys
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

from moka_pl.studies.common import Parser, check_device, one_line_errors, positive_int, write_json
from moka_pl.studies.outputs import REPLACED, json_output

DESCRIPTION = """\
Chooses each layer's filters from the gradient of a few batches of a run's own training data.

    python scripts/choose_filters.py --config configs/smollm2.yaml --out filters.json
    python -m moka_pl fit --config configs/smollm2.yaml --model.adapter.filters filters.json

The budget is that of `diverse` unless --parameters is set. The file lists every layer's shapes, and the
adapter directory of a run that uses it stores them. Other options are passed to the run.
"""


@one_line_errors("choose_filters")
def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the file and prints how often which shapes were chosen.

    Args:
        arguments: Default: the process's.
    """
    parser = Parser("choose_filters", DESCRIPTION)
    parser.add_argument("--config", required=True, help="configuration of the run (YAML)")
    parser.add_argument(
        "--out", type=json_output(_are_filters), default="filters.json", help=f"file to write; {REPLACED}"
    )
    parser.add_argument(
        "--batches", type=positive_int, default=4, help="number of training batches for the gradient"
    )
    parser.add_argument(
        "--parameters",
        type=positive_int,
        help="budget for the entries of all factors (default: that of diverse)",
    )
    parser.add_argument(
        "--identities",
        action="store_true",
        help="also offer block-diagonal components; layers that mix them with others train slower on a GPU",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args, rest = parser.parse_known_args(arguments)
    check_device(args.device)
    sys.argv[1:] = []  # Lightning warns of a command line beside arguments

    from moka_pl.adapters import find_targets
    from moka_pl.adapters.filter_search import choose_filters
    from moka_pl.backbone import load_backbone
    from moka_pl.cli.lightning import run
    from moka_pl.lm.scoring import score_tokens

    cli = run(["--config", args.config, *rest], only_build=True)
    module, data = cli.model, cli.datamodule
    loaded = load_backbone(module.backbone, args.device)
    data.connect(loaded.tokenizer)
    data.prepare_data()
    data.setup("fit")

    def loss(batch: dict[str, Any]) -> Any:
        ids, labels = (batch[key].to(args.device) for key in ("input_ids", "labels"))
        return score_tokens(loaded.model, ids, labels).nll.sum()

    names = find_targets(loaded.model, module.adapter)
    batches = list(islice(data.train_dataloader(), args.batches))
    options = module.adapter.components, args.parameters, args.identities
    filters, used = {}, Counter[tuple[int, ...]]()
    for name, shapes, share in choose_filters(loaded.model, names, batches, loss, *options):
        filters[name] = shapes
        used.update(map(tuple, shapes))
        print(f"{name:<44} first {shapes[0]}, captures {share:.1%} of the gradient's energy", flush=True)
    write_json(args.out, filters)
    print(f"{args.out}: {len(filters)} layers; most used:")
    for shape, count in used.most_common(12):
        print(f"  {list(shape)} {count} times")


def _are_filters(content: Any) -> bool:
    """Whether a JSON value is a list of shapes for every layer, as :func:`main` writes it."""
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(own, list) and own and all(map(_is_shape, own)) for own in content.values())


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(size, int) for size in value)
