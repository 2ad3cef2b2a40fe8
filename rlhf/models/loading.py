"""What others have made, loaded by transformers from a folder or the hub; whatever is wrong with it is one ValueError.

That names the key by which it was asked for (`model.path`, `reward.path`, ...).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.models.saving import Brought, carry
from rlhf.models.stop_tokens import carry_stop_ids
from transfer.agreement.shown import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "config.json"  # what each model's folder has
HUB_TIMEOUT_S = 10.0
TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"  # transformers' name of a warning


def load_tokenizer(path: str, key: str, trust: bool) -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer, with its stop ids and what else the checkpoint brought; it pads on the left."""
    from transformers import AutoConfig, AutoTokenizer

    shape = from_pretrained(AutoConfig, path, f"{key}: cannot load a model", trust_remote_code=trust)
    tokenizer = from_pretrained(AutoTokenizer, path, f"{key}: cannot load a tokenizer", trust_remote_code=trust)
    prepare(tokenizer, f"{key}: the tokenizer of {path}")
    brought = from_pretrained(Brought, path, f"{key}: cannot load a model")
    text = shape.get_text_config()
    named = [brought.generation.get("eos_token_id"), shape.eos_token_id, text.eos_token_id]
    carry_stop_ids(tokenizer, named, getattr(text, "vocab_size", len(tokenizer)))
    carry(tokenizer, brought)
    return tokenizer


def prepare(tokenizer: PreTrainedTokenizerBase, said: str) -> None:
    """Let it pad on the left, by some token; ValueError where it has none that ends an answer."""
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{said} has no end-of-sequence token (eos_token), so no answer could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    say_nothing_of_lengths(tokenizer)


def say_nothing_of_lengths(tokenizer: PreTrainedTokenizerBase) -> None:
    """Rows that are too long are refused or left out by line, where all of them are known."""
    tokenizer.deprecation_warnings[TOO_LONG] = True


def load_weights(auto: Any, path: str, key: str, **options: Any) -> PreTrainedModel:
    """A model with all of its weights: none is made up where the checkpoint lacks it."""
    model, report = from_pretrained(auto, path, f"{key}: cannot load a model", output_loading_info=True, **options)
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:5])
        raise ValueError(f"{key}: {path} lacks weights of {type(model).__name__}: {missing}, ...")
    return model


def without_dropout(config: Any) -> Any:
    """`config` with every dropout set to 0: log-probs of the same tokens must be the same in every pass."""
    for name, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, 0.0)
    return config


def check_folder(path: str, failure: str) -> None:
    """ValueError where a path, which cannot be a hub's name, is no folder; of a folder, where no model is in it."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{failure} from the folder {path}: it has no {CONFIG}{_below(path, folder)}")
    elif folder.is_absolute() or path.startswith(".") or path.count("/") > 1:
        raise ValueError(f"{failure}: there is no folder {path} (seen from {Path.cwd()})")


def _below(path: str, folder: Path) -> str:
    """Which folders in it have a model, of a run's folder, say; nothing if none has."""
    there = sorted(each.parent.name for each in folder.glob(f"*/{CONFIG}"))
    return f", but {' and '.join(f'{path}/{name}' for name in there)} has" if there else ""


def from_pretrained(auto: Any, path: str, failure: str, trust_remote_code: bool = False, **options: Any) -> Any:
    """`auto.from_pretrained`, with a ValueError for whatever is wrong with a folder or a hub name.

    Without `trust_remote_code` a checkpoint that needs code of its own is refused: transformers would ask on the
    terminal, and run it.
    """
    _hide_bars()
    check_folder(path, failure)
    folder = Path(path).expanduser()
    local = folder.is_dir() or not _hub_answers(path)
    where = f"the folder {path}" if folder.is_dir() else f"the Hugging Face hub as {path!r}, which is no folder here"
    options |= {"local_files_only": local, "trust_remote_code": trust_remote_code}
    try:
        return auto.from_pretrained(str(folder) if folder.is_dir() else path, **options)
    except Exception as error:  # safetensors, tokenizers and the hub each have exceptions of their own
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise ValueError(_untrusted(failure.partition(".path")[0], where)) from error
        reason = one_line(str(error), 300)
        unreachable = (
            "the hub cannot be reached, and nothing is in the cache: " if local and not folder.is_dir() else ""
        )
        raise ValueError(f"{failure} from {where}: {unreachable}{reason}") from error


def _untrusted(group: str, where: str) -> str:
    return (
        f"{group}.trust_remote_code is false, and {where} brings code of its own (auto_map), without which it does not "
        f"load: read that code, and set the key to true if you trust it, or choose another {group}.path"
    )


def _hide_bars() -> None:
    """A run has progress bars of its own."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


@functools.cache
def _hub_answers(name: str) -> bool:
    """Whether the hub can be asked about `name`; if not, the cache serves at once, instead of a minute of retries."""
    from huggingface_hub import model_info
    from huggingface_hub.errors import HfHubHTTPError

    try:
        model_info(name, timeout=HUB_TIMEOUT_S)
    except (HfHubHTTPError, ValueError):
        return True  # it refuses, and from_pretrained will say why
    except Exception:  # whatever the HTTP library raises when there is no network
        return False
    return True
