"""Which prompt an evaluation uses: the adapter's own, unless the user chose another."""

from collections.abc import Collection

from lightning.pytorch.utilities import rank_zero_warn


def settle_prompt(
    chosen: str | None, trained: str | None, known: Collection[str], default: str, *, warned: set[str]
) -> str:
    """Settle the prompt of a data module.

    Args:
        chosen: What the user chose; None leaves it to the adapter.
        trained: The prompt that the adapter was trained with, if there is an adapter that tells.
        known: The prompts among which there is a choice; an adapter trained with any other decides nothing.
        default: The prompt where neither decides.
        warned: What has been warned of; the same warning is given once.

    Returns:
        The name of the prompt.
    """
    own = trained if trained in known else None
    if chosen is None:
        return own or default
    if own is not None and own != chosen and own not in warned:
        warned.add(own)
        rank_zero_warn(
            f"the adapter was trained with `prompt: {own}`, but the data are asked for with `prompt: "
            f"{chosen}`; leave the option out to use the adapter's own"
        )
    return chosen
