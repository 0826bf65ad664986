"""``moka-pl inspect``: what an adapter is, where its gates stand, and what its updates are like."""

from collections.abc import Sequence
from json import dumps
from pathlib import Path

from moka_pl.errors import ConfigError, printable
from moka_pl.utils import expanded


def inspect(
    adapter: Path,
    other: str | Sequence[str] = (),
    json: bool = False,
    html: Path | None = None,
    base: str | None = None,
    spectra: bool = False,
) -> None:
    """Print an adapter's options, metrics, gates and updates, and compare it with another adapter.

    Args:
        adapter: An adapter directory.
        other: Another adapter directory, to be compared with it.
        json: Print one JSON object, for scripts.
        html: File for a page with pictures, which needs no network.
        base: Name or folder of the base model, for ‖ΔW‖ / ‖W‖; "stored" takes the adapter's own. Without this
            option no base is loaded.
        spectra: Compute singular values however long that takes; otherwise up to about a minute.
    """
    from moka_pl.inspection.comparison import compare
    from moka_pl.inspection.report import check_adapter, inspect_adapter
    from moka_pl.inspection.text import as_json, as_text, comparison_json, comparison_text

    others = [other] if isinstance(other, str) else list(other)
    if len(others) > 1:
        raise ConfigError(f"inspect compares two adapters, not {1 + len(others)}; leave out {others[1]}")
    if html is not None:
        from moka_pl.inspection.page import check_target, write_page

        check_target(html)
    paths = [adapter, *(expanded(one) for one in others)]
    for path in paths:  # before a base is loaded for the first one
        check_adapter(path)
    found = [inspect_adapter(path, base, spectra) for path in paths]
    compared = compare(found[0], found[1]) if others else None
    if json:
        contents = as_json(found[0])
        if compared is not None:
            contents["other"] = as_json(found[1])
            contents["compared"] = comparison_json(found[1].path, compared)
        print(dumps(contents, indent=2))
    else:
        heads = [f"{printable(str(one.path))}\n" if others else "" for one in found]
        print("\n\n".join(head + as_text(one) for head, one in zip(heads, found, strict=True)))
        if compared is not None:
            print(f"\n{comparison_text(found[0].path, found[1].path, compared)}")
    if html is not None:
        write_page(html, found, compared)
        if not json:
            print(f"\npage written to {html}")
