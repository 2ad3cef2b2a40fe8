"""In a sweep over `plugins`, each job has the parts of its own modules: two of them may have one of the same name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback

from rlhf.plugins.found import use
from rlhf.plugins.part import PartError
from rlhf.plugins.wanted import wanted


class PartsOfJobs(Callback):
    """Has a sweep's launcher, whichever it is, compose its jobs by `Loader`."""

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        """Before the sweeper is made, which gets the loader."""
        hydra = GlobalHydra.instance().hydra
        if hydra is not None:
            hydra.config_loader = Loader(hydra.config_loader.get_search_path())


class Loader(ConfigLoaderImpl):
    """Composes a job with the parts of the modules that it names."""

    def load_sweep_config(self, master_config: Any, sweep_overrides: list[str]) -> Any:
        """As Hydra's own."""
        sources = [each.path for each in master_config.hydra.runtime.config_sources if each.schema == "file"]
        try:
            for modules in wanted(sweep_overrides, list(map(Path, sources))):  # one list: it is one job
                use(modules)
        except PartError as error:
            raise CompactHydraException(str(error)) from error
        return super().load_sweep_config(master_config, sweep_overrides)
