"""The Hugging Face hub's data sets, or those of its cache where it does not answer: no waiting, and no retries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transfer.agreement.shown import one_line

TIMEOUT_S = 3.0  # for the first answer; asked twice at most


@contextmanager
def hub_or_cache(name: str, key: str) -> Iterator[None]:
    """datasets asks the hub, or the cache alone; whatever it raises is a ValueError of one line."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    offline = any(before)
    silent = not offline and not _answers(name)
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = offline or silent
    try:
        yield
    except Exception as error:  # of datasets, of the hub, of its HTTP library, of the reader of a file
        why = "HF_HUB_OFFLINE is set" if offline else "the hub does not answer (HF_HUB_OFFLINE=1 does not ask it)"
        cache = f"{why}, and the cache ({datasets.config.HF_DATASETS_CACHE}) has none of that name: "
        reason = one_line(str(error) or type(error).__name__, 300)
        raise ValueError(
            f"{key}: {name} is no file or folder in {Path.cwd()}, and as a data set of the Hugging Face hub it cannot "
            f"be read: {cache if offline or silent else ''}{reason}{_hint(reason)}"
        ) from None
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _hint(reason: str) -> str:
    """Which key to change."""
    return "; set task.name" if "onfig" in reason else ""


def _answers(name: str) -> bool:
    """Whether the hub can be asked about a data set; a refusal is an answer, too."""
    from huggingface_hub import dataset_info
    from huggingface_hub.errors import HfHubHTTPError

    try:
        dataset_info(name, timeout=TIMEOUT_S)
    except (HfHubHTTPError, ValueError):
        return True
    except Exception:  # whatever the HTTP library raises when there is no network
        return False
    return True
