"""The command line's option ``model.adapter`` where it names a class.

Without a class its options are those of ``MokaConfig``, listed by ``--help``. A named class takes the
place of ``MokaConfig`` before anything is parsed, so that its own options are checked; only then is PEFT
imported.
"""

import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings

from moka_pl.adapters import FullFineTuning, MokaConfig
from moka_pl.backbone.quantization import import_quantiser
from moka_pl.errors import ConfigError
from moka_pl.training.module import MokaModule


def named_class(arguments: Sequence[str]) -> str | None:
    """The last ``class_path`` that arguments or the configuration files they name give for the adapter."""
    found = None
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    for argument, following in pairs:
        name, equals, value = argument.partition("=")
        value = value if equals else following
        if name in ("--config", "-c"):
            found = _in_config(_loaded(value)) or found
        elif name == "--model":
            found = _in_config({"model": _loaded(value)}) or found
        elif name == "--model.adapter.class_path":
            found = value
        elif name == "--model.adapter":
            adapter = _loaded(value)
            found = _in_config({"model": {"adapter": adapter}}) or found
            if isinstance(adapter, str):
                found = adapter
    return found


def module_class(class_path: str | None, base: type[MokaModule] = MokaModule) -> type[MokaModule]:
    """The module with ``adapter`` of the named class, for jsonargparse to read the options of.

    Args:
        class_path: What :func:`named_class` found, or a rival's ``class_path``; None is MoKA.
        base: The module's class.

    Returns:
        ``base``, or a class derived from it.

    Raises:
        ConfigError: If there is no such class or it configures no adapter.
    """
    if class_path is None:
        return base
    kind = adapter_class(class_path)
    if kind is MokaConfig:
        return base
    set_parsing_settings(subclasses_enabled=[kind])  # written back with its class_path

    class Adapted(base):  # type: ignore[valid-type, misc]
        def __init__(self, adapter: kind, **options: Any) -> None:  # type: ignore[valid-type]
            super().__init__(adapter=adapter, **options)

    Adapted.__doc__ = base.__doc__
    Adapted.__name__ = Adapted.__qualname__ = base.__name__
    return Adapted


def adapter_class(class_path: str) -> type:
    """Imports a class of adapter configurations; names without dots are those of moka_pl and of PEFT.

    Raises:
        ConfigError: If there is no such class or it configures no adapter.
    """
    module, _, name = class_path.rpartition(".")
    kind = None
    for home in [module] if module else ["moka_pl.adapters", "peft"]:
        if kind is not None:
            break
        try:
            if not home.startswith("moka_pl"):
                import_quantiser()  # which PEFT imports
            kind = getattr(import_module(home), name, None)
        except ImportError as error:
            raise ConfigError(
                f"adapter {class_path}: {error}. PEFT's classes need pip install 'moka_pl[peft]'"
            ) from error
    bases: tuple[type, ...] = (MokaConfig, FullFineTuning)
    if isinstance(kind, type) and not issubclass(kind, bases):
        try:
            from peft import PeftConfig

            bases = (*bases, PeftConfig)
        except ImportError:
            pass
    if not isinstance(kind, type) or not issubclass(kind, bases):
        raise ConfigError(
            f"adapter {class_path} is no configuration of an adapter; give MokaUngated, MokaS, KronA or "
            "FullFineTuning of moka_pl.adapters, or one of PEFT's such as peft.LoraConfig"
        )
    # PEFT's own default for it, written out by the parser.
    warnings.filterwarnings("ignore", message=".loftq_config. specified but will be ignored")
    return kind


def _in_config(config: Any) -> str | None:
    """``model.adapter.class_path`` of a loaded configuration, also below the name of a command."""
    if not isinstance(config, Mapping):
        return None
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        model = part.get("model")
        adapter = model.get("adapter") if isinstance(model, Mapping) else None
        if isinstance(adapter, Mapping) and isinstance(adapter.get("class_path"), str):
            return str(adapter["class_path"])
    return None


def _loaded(value: str) -> Any:
    """A value as YAML, read from a file where it names one; what is wrong with it the parser will tell."""
    import yaml

    try:
        file = Path(value)
        return yaml.safe_load(file.read_text(encoding="utf-8") if file.is_file() else value)
    except (OSError, ValueError, yaml.YAMLError):
        return None
