"""Parts of modules that a run's `plugins` names; and what is said of installed packages whose parts are left out."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

from rlhf.plugins.offers import offers, package_of
from rlhf.plugins.part import PartError
from rlhf.plugins.registry import choose, loaded, readmit, registering
from rlhf.shell.own_modules import import_own, looked_in
from transfer.agreement.shown import told


def use(modules: Sequence[str]) -> None:
    """Import the modules that `plugins` names, for what they register; PartError names the one that is wrong.

    Of a name that other modules have registered, too, theirs is the part that is found from now on.
    """
    choose(modules)
    for module in modules:
        said = f"plugins: {module}"
        if not all(each.isidentifier() for each in str(module).split(".")):
            raise PartError(f"plugins must be a list of modules like [package.module] (got {module!r})")
        try:
            with registering(module):
                import_own(module)
        except PartError:
            raise
        except (Exception, SystemExit) as error:  # whatever the module raises
            raise PartError(f"{said} cannot be imported, {looked_in()}: {told(error)}") from error
        package = module.partition(".")[0]
        if not any(part.where.partition(":")[0].partition(".")[0] == package for part in loaded()):
            raise PartError(f"{said} registers nothing: decorate what it makes, as in docs/configuration.md")
    readmit()


@functools.cache
def warn() -> None:
    """Say on stderr, once, which packages offer parts by names that are taken."""
    for part in loaded():
        for each in offers().get((part.kind, part.name), ()) if part.ours else ():
            print(
                f"warning: {part.chosen} of {package_of(each)} is left out, as there is one already: its entry point "
                f"{each.value} needs another name",
                file=sys.stderr,
            )
