#!/usr/bin/env python3
"""Chooses each layer's filters from the gradient of a few batches of a run's own training data.

    python scripts/choose_filters.py --config configs/smollm2.yaml --out filters.json
    python -m moka_pl fit --config configs/smollm2.yaml --model.adapter.filters filters.json

The budget is that of `diverse` unless --parameters gives another. The file lists every layer's shapes, and so
does the adapter directory of a run that uses it.
"""

import argparse
import json
import sys
from collections import Counter
from itertools import islice
from pathlib import Path


def main() -> None:
    """Writes the file and prints how often which shapes were chosen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="configuration of the run (YAML)")
    parser.add_argument("--out", type=Path, default=Path("filters.json"), help="file to write")
    parser.add_argument("--batches", type=int, default=4, help="training batches whose gradient is taken")
    parser.add_argument("--parameters", type=int, help="budget of all factors' entries; default: diverse's")
    parser.add_argument(
        "--identities",
        action="store_true",
        help="offer block-diagonal components, too; layers that mix them with others train slower on a GPU",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args, rest = parser.parse_known_args()
    sys.argv[1:] = []  # Lightning warns of a command line beside arguments

    from moka_pl.adapters import find_targets
    from moka_pl.adapters.filter_search import choose_filters
    from moka_pl.backbone import load_backbone
    from moka_pl.cli.lightning import build
    from moka_pl.lm.scoring import score_tokens

    cli = build(["fit", "--config", str(args.config), *rest])
    module, data = cli.model, cli.datamodule
    loaded = load_backbone(module.backbone, args.device)
    data.connect(loaded.tokenizer)
    data.prepare_data()
    data.setup("fit")
    batches = list(islice(data.train_dataloader(), args.batches))

    def loss(batch):
        ids, labels = (batch[key].to(args.device) for key in ("input_ids", "labels"))
        return score_tokens(loaded.model, ids, labels).nll.sum()

    names = find_targets(loaded.model, module.adapter)
    filters, used = {}, Counter()
    for name, shapes, share in choose_filters(
        loaded.model, names, batches, loss, module.adapter.components, args.parameters, args.identities
    ):
        filters[name] = shapes
        used.update(map(tuple, shapes))
        print(f"{name:<44} first {shapes[0]}, captures {share:.1%} of the gradient's energy", flush=True)
    args.out.write_text(json.dumps(filters) + "\n", encoding="utf-8")
    print(f"{args.out}: {len(filters)} layers; most used:")
    for shape, count in used.most_common(12):
        print(f"  {list(shape)} {count} times")


if __name__ == "__main__":
    main()
