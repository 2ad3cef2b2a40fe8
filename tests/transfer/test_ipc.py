"""The one-shot API: its names, arguments and messages, and what the receiving half does with them."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from one_shot import Loaded, digests, message, pickled, receive, weights

import transfer
from transfer import (
    IPCTrainerSendWeightsArgs,
    IPCWeightTransferEngine,
    IPCWeightTransferInitInfo,
    IPCWeightTransferUpdateInfo,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from transfer.engine.handles import Exporter

# --- the table: names and arguments -----------------------------------------------------------------------------------


def test_importing_the_package_and_checking_arguments_imports_no_torch():
    script = """
import sys
from transfer import IPCTrainerSendWeightsArgs, IPCWeightTransferEngine
IPCTrainerSendWeightsArgs("http", url="http://127.0.0.1:1")
IPCWeightTransferEngine(None, None).parse_update_info(dict(names=[], dtype_names=[], shapes=[], ipc_handles=[]))
print([name for name in ("torch", "ray", "requests", "numpy") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


def test_a_name_that_the_package_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'transfer' has no attribute 'IPCEngine'"):
        _ = transfer.IPCEngine


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "ray"}, "llm_handle is required for 'ray' mode"),
        ({"mode": "ray", "llm_handle": []}, "llm_handle is required for 'ray' mode"),
        ({"mode": "ray", "url": "http://x"}, "llm_handle is required for 'ray' mode"),
        ({"mode": "http"}, "url is required for 'http' mode"),
        ({"mode": "http", "url": ""}, "url is required for 'http' mode"),
        ({"mode": "http", "llm_handle": object()}, "url is required for 'http' mode"),
        ({"mode": "nccl"}, "mode must be 'ray' or 'http', got 'nccl'"),
        ({"mode": None}, "mode must be 'ray' or 'http', got None"),
        (
            {"mode": "http", "url": "file:///etc/passwd"},
            "url must be like http://127.0.0.1:8000, got 'file:///etc/passwd'",
        ),
    ],
)
def test_trainer_arguments_that_do_not_fit_the_mode_are_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        IPCTrainerSendWeightsArgs(**arguments)
    assert str(error.value) == message
    with pytest.raises(ValueError) as error:
        IPCWeightTransferEngine.trainer_send_weights(iter([]), arguments)
    assert str(error.value) == message


def test_trainer_arguments_have_the_fields_mode_llm_handle_and_url():
    actor = object()
    assert IPCTrainerSendWeightsArgs("ray", actor).llm_handle is actor
    assert IPCTrainerSendWeightsArgs("http", None, "http://h:1").url == "http://h:1"


@pytest.mark.parametrize("arguments", [{"mode": "http", "uri": "x"}, {}, None, "http"])
def test_trainer_arguments_in_a_dict_with_other_keys_are_a_value_error_with_the_known_keys(arguments):
    with pytest.raises(ValueError, match=r"keys: mode, llm_handle, url"):
        IPCWeightTransferEngine.trainer_send_weights(iter([]), arguments)


def test_there_is_nothing_to_agree_on():
    engine = IPCWeightTransferEngine(None, None)
    info = engine.parse_init_info({})
    assert info == IPCWeightTransferInitInfo()
    assert engine.init_transfer_engine(info) is None
    assert engine.shutdown() is None
    with pytest.raises(ValueError, match=r"IPCWeightTransferInitInfo: .*'packed'; keys: none"):
        engine.parse_init_info({"packed": True})


def test_the_engine_and_its_messages_have_the_documented_base_classes():
    assert issubclass(IPCWeightTransferEngine, WeightTransferEngine)
    assert issubclass(IPCWeightTransferInitInfo, WeightTransferInitInfo)
    assert issubclass(IPCWeightTransferUpdateInfo, WeightTransferUpdateInfo)
    assert IPCWeightTransferEngine.init_info_cls is IPCWeightTransferInitInfo
    assert IPCWeightTransferEngine.update_info_cls is IPCWeightTransferUpdateInfo
    WeightTransferEngine[IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo]  # generic over both
    with pytest.raises(TypeError, match="abstract"):
        WeightTransferEngine(None, None)
    engine = IPCWeightTransferEngine("config", parallel_config="parallel")
    assert (engine.config, engine.parallel_config) == ("config", "parallel")


def test_the_handle_field_names_are_those_of_vllm():
    names = [field.name for field in dataclasses.fields(IPCWeightTransferUpdateInfo)]
    assert names == ["names", "dtype_names", "shapes", "ipc_handles", "ipc_handles_pickled"]


# --- the table: update info -------------------------------------------------------------------------------------------

TWO = {"names": ["a", "b"], "dtype_names": ["int8"] * 2, "shapes": [[1]] * 2, "ipc_handles": [{}, {}]}


def test_exactly_one_of_the_two_handle_fields_must_be_given():
    for fields in ({"ipc_handles": None}, {"ipc_handles_pickled": pickled([{}, {}])}):
        with pytest.raises(ValueError, match="exactly one of ipc_handles and ipc_handles_pickled must be given"):
            IPCWeightTransferUpdateInfo(**{**TWO, **fields})


@pytest.mark.parametrize("field", ["dtype_names", "shapes", "ipc_handles"])
def test_lists_of_different_lengths_are_refused_with_the_list_and_both_lengths(field):
    with pytest.raises(ValueError, match=f"{field} must have as many entries as names: got 1 and 2"):
        IPCWeightTransferUpdateInfo(**{**TWO, field: TWO[field][:1]})


def test_pickled_handles_of_another_length_are_refused_with_both_lengths():
    with pytest.raises(ValueError, match="ipc_handles must have as many entries as names: got 3 and 2"):
        IPCWeightTransferUpdateInfo(**{**TWO, "ipc_handles": None, "ipc_handles_pickled": pickled([{}] * 3)})


@pytest.mark.parametrize("field", ["names", "dtype_names", "shapes", "ipc_handles"])
@pytest.mark.parametrize("value", ["ab", 3, {"a": 1, "b": 2}])
def test_a_field_that_is_no_list_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} must be a list"):
        IPCWeightTransferUpdateInfo(**{**TWO, field: value})


def test_names_that_are_no_strings_are_refused():
    with pytest.raises(ValueError, match="names must be strings"):
        IPCWeightTransferUpdateInfo(**{**TWO, "names": ["a", 1]})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickled_handles_are_decoded_into_the_other_field(protocol):
    handles = [{"host-1": ("memfd", 12, 3, 2**40, 256, 4, "int8", (4,))}, {"GPU-2": ()}]
    info = IPCWeightTransferUpdateInfo(
        **{**TWO, "ipc_handles": None, "ipc_handles_pickled": pickled(handles, protocol)}
    )
    assert (info.ipc_handles, info.ipc_handles_pickled) == (handles, None)


class RunsCode:
    def __reduce__(self):
        return os.system, ("echo ran",)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (pickled([{}, RunsCode()]), r"the name '(posix|nt)\.system' is not allowed"),
        (pickled([{}, {}])[:-4], "refused at byte|not base64"),
        ("no base64!", "ipc_handles_pickled is not base64"),
        (7, r"ipc_handles_pickled must be a base64 string \(got int\)"),
    ],
    ids=["code", "cut short", "not base64", "not a string"],
)
def test_pickled_handles_that_are_not_plain_are_refused_and_nothing_runs(capfd, value, reason):
    with pytest.raises(ValueError, match=reason):
        IPCWeightTransferUpdateInfo(**{**TWO, "ipc_handles": None, "ipc_handles_pickled": value})
    assert capfd.readouterr().out == ""


def test_an_update_with_unknown_or_missing_keys_is_a_value_error_with_the_known_keys():
    engine = IPCWeightTransferEngine(None, None)
    known = "keys: names, dtype_names, shapes, ipc_handles, ipc_handles_pickled"
    with pytest.raises(ValueError, match=f"'packed'; {known}"):
        engine.parse_update_info({**TWO, "packed": True})
    with pytest.raises(ValueError, match=f"'names', 'dtype_names', and 'shapes'; {known}"):
        engine.parse_update_info({})
    assert engine.parse_update_info(TWO) == IPCWeightTransferUpdateInfo(**TWO)


# --- the table: receive_weights ---------------------------------------------------------------------------------------


def test_weights_are_handed_over_one_tensor_at_a_time_and_exactly():
    sent, loaded = weights(), Loaded()
    with Exporter() as exporter:
        receive(message(exporter, sent), loaded.load_weights)
    assert digests(loaded.weights) == digests(sent)
    assert loaded.calls == [1] * len(sent)


def test_a_torch_module_can_be_loaded_through_the_same_call():
    source, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    with Exporter() as exporter:
        update = message(exporter, dict(source.named_parameters()))
        receive(update, lambda pairs: target.load_state_dict(dict(pairs), strict=False))
    assert digests(target.state_dict()) == digests(source.state_dict())


def test_a_handle_for_no_device_of_ours_is_refused_with_what_there_is_and_nothing_is_loaded():
    loaded = Loaded()
    with Exporter() as exporter:
        update = message(exporter, {"a": torch.ones(1), "b": torch.ones(1)})
        update["ipc_handles"][1] = {"GPU-elsewhere": ()}
        with pytest.raises(ValueError) as error:
            receive(update, loaded.load_weights)
    assert "'b': IPC handle not found for GPU UUID " in str(error.value)
    assert str(error.value).endswith(". Available UUIDs: ['GPU-elsewhere']")
    assert loaded.calls == []


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("dtype_names", "int32", "'b': the message says int32, the handle float32"),
        ("shapes", [2, 2], r"'b': the message says shape \[2, 2\], the handle \(4,\)"),
        ("shapes", [3], "'b': the message says shape"),
    ],
)
def test_dtypes_and_shapes_are_compared_with_the_handles_before_anything_is_loaded(field, value, reason):
    loaded = Loaded()
    with Exporter() as exporter:
        update = message(exporter, {"a": torch.ones(4), "b": torch.ones(4)})
        update[field][1] = value
        with pytest.raises(ValueError, match=reason):
            receive(update, loaded.load_weights)
    assert loaded.calls == []


def test_what_load_weights_raises_reaches_the_caller_as_it_is():
    def broken(pairs):
        raise KeyError("no such parameter")

    with Exporter() as exporter, pytest.raises(KeyError, match="no such parameter"):
        receive(message(exporter, {"a": torch.ones(4)}), broken)
