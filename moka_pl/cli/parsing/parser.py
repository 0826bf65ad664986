"""The parser of Lightning's commands: how ``model.adapter`` is read, and how mistakes are reported.

``model.adapter`` names a class like every other option, ``class_path`` with ``init_args``. Without a class it
is MoKA: ``--model.adapter.components 5`` and ``adapter: {components: 5}`` need no ``class_path``.
"""

import logging
import re
import warnings
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from moka_pl.adapters import MokaConfig
from moka_pl.cli.class_paths import check_classes
from moka_pl.cli.config_files import YAML_MODE
from moka_pl.cli.parsing.messages import told
from moka_pl.errors import printable

_ADAPTER = "model.adapter"
#: Most characters of a message.
_LONGEST = 6_000
#: What to do about data of the other kind of model, by what is said of the data.
_HINTS = {
    r"(ImageFolder|Digits)Data is no MokaDataModule": "; images need --model moka_pl.VisionModule",
    "is no ImageData": "; a VisionModule takes images: moka_pl.ImageFolderData or moka_pl.DigitsData",
}


class MokaParser(LightningArgumentParser):
    """Reads ``model.adapter``, builds a run's parts only, and reports a wrong option in one line.

    Attributes:
        command: The command as the user calls it, where Lightning's has another name.
    """

    command = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"parser_mode": YAML_MODE, **kwargs})
        # PEFT's own default for it, written out by the parser.
        warnings.filterwarnings("ignore", message=".loftq_config. specified but will be ignored")
        # Lightning (2.6) walks over batches by a name of older PyTorch's.
        warnings.filterwarnings("ignore", message=r".isinstance\(treespec, LeafSpec\). is deprecated")
        # Importing PEFT imports bitsandbytes, which on some CPUs asks for a package with a kernel of its own.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

    @property
    def program(self) -> str:
        """The words that call this parser's command."""
        own = str(self.prog).replace(" [options]", "")
        return f"{own.rpartition(' ')[0]} {self.command}" if self.command else own

    def get_defaults(self, *args: Any, **kwargs: Any) -> Namespace:
        """Leaves out the default adapter's options: another class would take over their values."""
        # Those of the class that is chosen in the end are added after parsing.
        defaults: Namespace = super().get_defaults(*args, **kwargs)
        if _ADAPTER in defaults:
            defaults[_ADAPTER].pop("init_args", None)
        return defaults

    def instantiate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> Namespace:
        """Builds what a configuration names, once all of it is of the kinds that are allowed."""
        if "subcommand" not in namespace:  # else the parser of that command does the same
            check_classes(namespace)
        built: Namespace = super().instantiate(namespace, *args, **kwargs)
        return built

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Lists MoKA's options, too, which the option of a class alone does not."""
        text: str = super().format_help(*args, **kwargs)
        if _ADAPTER not in self.get_defaults():
            return text
        # Of more than a hundred options the usage is no summary.
        options = text.partition("\n\n")[2]
        text = f"usage: {self.program} [--config NAME_OR_FILE] [OPTION VALUE ...]\n\n{options}"
        moka = ArgumentParser(usage="", add_help=False)
        moka.add_class_arguments(MokaConfig, _ADAPTER)
        options = str(moka.format_help()).partition("\n\n")[2]
        return f"{text}\n{options}"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the process with status 2, without the page of usage that would hide the message."""
        if not self.exit_on_error:  # the parser of a class inside, whose message becomes part of another
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        program = getattr(parser, "program", parser.prog)
        line = told(message, parser.get_defaults().keys())
        if len(line) > _LONGEST:  # a value of a megabyte; what stands before and after it tells the mistake
            line = f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"
        if "No module named 'peft'" in line:
            line += "; run pip install 'moka_pl[peft]'"
        line += next((hint for found, hint in _HINTS.items() if re.search(found, line)), "")
        self.exit(2, f"{program}: error: {printable(line)} (all options: {program} --help)\n")
        raise AssertionError  # exit does not return
