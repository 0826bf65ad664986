"""Commands that start others on several machines."""

from torch.distributed.run import get_args_parser


def without_launcher(words: list[str]) -> list[str]:
    """The command that ``torchrun`` or ``srun`` starts; others as they are."""
    match words:
        case ["torchrun", *rest]:
            parsed = get_args_parser().parse_args(rest)
            assert parsed.module
            return ["python", "-m", parsed.training_script, *parsed.training_script_args]
        case ["srun", *rest]:
            return rest[rest.index("python") :]
    return words
