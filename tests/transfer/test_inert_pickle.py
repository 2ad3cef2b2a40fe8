"""The inert reader: honest payloads of every protocol are read, everything else is refused, and nothing ever runs."""

import ast
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from transfer.engine import inert_pickle
from transfer.engine.inert_pickle import Global, loads

FIELDS = (
    torch.Tensor,
    torch.Size([2, 3]),
    (3, 1),
    0,
    torch.storage.TypedStorage,
    torch.bfloat16,
    0,
    b"\x03c" + bytes(range(192, 256)),
    2**33,
    512,
    False,
    b"/torch_12_345_0",
    7,
    b"\xff" * 64,
    True,
)
READ = (
    Global("torch.Tensor"),
    (2, 3),
    (3, 1),
    0,
    Global("torch.storage.TypedStorage"),
    Global("torch.bfloat16"),
    *FIELDS[6:],
)
PROTOCOLS = (2, 3, 4, 5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_handles_as_torch_makes_them_are_read_in_every_protocol(protocol):
    handles = [{"GPU-a": FIELDS}, {"GPU-a": FIELDS, "GPU-b": FIELDS}, {}]
    assert loads(pickle.dumps(handles, protocol)) == [{"GPU-a": READ}, {"GPU-a": READ, "GPU-b": READ}, {}]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_function_of_early_engines_becomes_a_name_that_cannot_be_called(protocol):
    [(function, fields)] = loads(pickle.dumps([(rebuild_cuda_tensor, FIELDS)], protocol))
    assert function == Global("torch.multiprocessing.reductions.rebuild_cuda_tensor")
    assert not callable(function)
    assert fields == READ


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4) | st.tuples(inner, inner),
    max_leaves=8,
).filter(lambda value: depth(value) <= inert_pickle.MAX_DEPTH)


def depth(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@given(plain, st.sampled_from((3, 4, 5)))
def test_plain_values_come_back_as_they_were(value, protocol):
    assert loads(pickle.dumps(value, protocol)) == value


def test_long_lists_and_dicts_which_pickle_writes_in_batches_are_read():
    value = [list(range(5000)), {str(number): number for number in range(5000)}]
    assert loads(pickle.dumps(value)) == value


HOSTILE = """
import builtins, copyreg, functools, importlib, operator, os, subprocess
class Calls:
    def __init__(self, function, *arguments): self.how = function, arguments
    def __reduce__(self): return self.how
class State(Calls):
    def __reduce__(self): return (list, (), {"a": 1}, iter([1]), iter([("k", Calls(os.system, "true"))]))
VALUES = [
    Calls(os.system, "true"), Calls(eval, "1"), Calls(exec, "1"), Calls(__import__, "os"), Calls(getattr, 1, "x"),
    Calls(subprocess.Popen, ["true"]), Calls(importlib.import_module, "os"), Calls(open, "/etc/passwd"),
    Calls(copyreg._reconstructor, object, object, None), Calls(copyreg._reduce_ex, object, 2), State(print),
    Calls(functools.partial, os.system, "true"), Calls(operator.attrgetter("system"), 1),
    object(), {1, 2}, bytearray(b"x"), [{"gpu": Calls(os.system, "true")}],
]
BY_HAND = [
    b"cos\\nsystem\\n(S'true'\\ntR.",
    b"\\x80\\x02(S'true'\\nios\\nsystem\\n.", b"\\x80\\x02(cos\\nsystem\\nS'true'\\no.",
    b"\\x80\\x02\\x82\\x01.", b"\\x80\\x02Pid\\n.", b"\\x80\\x02NQ.", b"\\x80\\x02ctorch\\nSize\\n)\\x81.",
    b"\\x80\\x02ctorch\\nSize\\n}b.", b"\\x80\\x04\\x8c\\x05torch\\x8c\\x04load\\x93.",
    b"\\x80\\x04\\x8c\\x05torch\\x8c\\x0bTensor.size\\x93.", b"\\x80\\x02ctorch\\nTensor\\n)R.",
    b"\\x80\\x02ctorch.multiprocessing.reductions\\nrebuild_cuda_tensor\\n)R.",
    b"\\x80\\x02c_codecs\\nencode\\nX\\x01\\x00\\x00\\x00aX\\x03\\x00\\x00\\x00zip\\x86R.",
]
"""


def test_hostile_pickles_are_refused_and_an_audit_hook_sees_nothing_run():
    script = f"""
import pickle, sys
from transfer.engine import inert_pickle
{HOSTILE}
payloads = BY_HAND + [pickle.dumps(value, protocol) for value in VALUES for protocol in range(6)]
seen = []
sys.addaudithook(lambda event, arguments: seen.append(event) if event != "builtins.id" else None)  # our own
accepted = []
for payload in payloads:
    try:
        inert_pickle.loads(payload)
        accepted.append(payload)
    except ValueError:
        pass
assert not accepted, accepted
assert not seen, seen
try:  # and the hook does see a real unpickling
    pickle.loads(payloads[0])
finally:
    assert "pickle.find_class" in seen
    print(len(payloads), "refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{13 + 17 * 6} refused\n"


VALID = [pickle.dumps([{"GPU-a": (rebuild_cuda_tensor, FIELDS)}], protocol) for protocol in PROTOCOLS]
change = st.tuples(st.integers(0, 2000), st.binary(max_size=4), st.integers(0, 4))  # where, what, instead of how much


@settings(max_examples=400)
@given(st.sampled_from(VALID), st.lists(change, min_size=1, max_size=4))
def test_a_damaged_payload_is_read_as_plain_values_or_refused_with_a_value_error(payload, changes):
    for where, what, length in changes:
        where %= len(payload) + 1
        payload = payload[:where] + what + payload[where + length :]
    try:
        value = loads(payload)
    except ValueError as error:
        assert "refused at byte" in str(error)
    else:
        assert_inert(value)


@settings(max_examples=400)
@given(st.lists(st.sampled_from([bytes([code]) for code in range(256)] + [b"K\x01", b"\x8c\x01a", b"h\x00"])))
def test_random_instructions_are_read_as_plain_values_or_refused_with_a_value_error(instructions):
    try:
        value = loads(b"\x80\x04" + b"".join(instructions) + b".")
    except ValueError as error:
        assert "refused at byte" in str(error)
    else:
        assert_inert(value)


def assert_inert(value):
    kinds = (list, tuple, dict, str, bytes, int, float, bool, type(None), Global)
    assert type(value) in kinds
    for inner in value.values() if type(value) is dict else value if type(value) in (list, tuple) else ():
        assert_inert(inner)


def nested(depth):
    return b"\x80\x04" + b"N" + b"\x85" * depth + b"."


REFUSED = {
    "more than 8 containers inside each other": nested(9),
    "more than 1048576 instructions": b"\x80\x04" + b"N" * 2**20 + b".",
    "it is cut short": pickle.dumps([1, 2, 3])[:-1],
    "it must hold one value and end there": pickle.dumps([]) + b"N.",
    "there is no list to add to": b"\x80\x04]\x94h\x00a.",  # a list inside itself
    "there is no dict to add to": b"\x80\x04}\x94\x8c\x01ah\x00s.",  # a dict inside itself
    "a dict needs pairs of a string and a value": b"\x80\x04}NNs.",
    "nothing was remembered as 7": b"\x80\x04h\x07.",
    "a mark is missing": b"\x80\x04]Nt.",
    "a mark stands where a value belongs": b"\x80\x04(.",
    "protocol 6 is not read, protocols 2 to 5 are": b"\x80\x06N.",
    "instruction b'i' is not allowed": b"\x80\x02(ios\nsystem\n.",
    "the name 'os.system' is not allowed": b"\x80\x02cos\nsystem\n.",
    "a call is not allowed": b"\x80\x02ctorch\nTensor\n)R.",
}


@pytest.mark.parametrize(("reason", "payload"), REFUSED.items(), ids=REFUSED)
def test_what_is_refused_says_why(reason, payload):
    with pytest.raises(ValueError, match=f"refused at byte [0-9]+: .*{reason}"):
        loads(payload)


def test_eight_levels_are_read():
    assert loads(nested(8)) == ((((((((None,),),),),),),),)


def test_a_list_that_is_in_a_tuple_may_not_grow_a_cycle_through_it():
    with pytest.raises(ValueError, match="there is no list to add to"):
        loads(b"\x80\x04]\x94h\x00\x85\x94h\x00h\x01a.")


def test_a_payload_over_the_size_limit_is_refused_unread():
    with pytest.raises(ValueError, match="at most 8388608 are read"):
        loads(b"\x80\x04" + b"N" * 2**23)


def test_a_length_beyond_the_end_allocates_nothing():
    with pytest.raises(ValueError, match="it is cut short"):
        loads(b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.")


def test_bytes_of_protocol_2_cannot_be_multiplied_to_fill_the_memory():
    text = "a" * (inert_pickle.MAX_ENCODED + 1)
    with pytest.raises(ValueError, match="a call is not allowed"):
        loads(pickle.dumps(text.encode(), 2))


def test_pickle_is_imported_only_to_write_the_legacy_payload_and_to_hand_rows_to_a_process_of_ones_own():
    root = Path(inert_pickle.__file__).parent.parent.parent
    found = []
    for path in [*root.glob("transfer/**/*.py"), *root.glob("rlhf/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            unsafe = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve"}
            found += [path.relative_to(root).as_posix() for name in names if name.rpartition(".")[2] in unsafe]
    of_environments = ["rlhf/environments/host.py", "rlhf/environments/hosts.py"]  # a pipe that no one else has
    assert sorted(found) == [*of_environments, "transfer/engine/ipc.py"]
    assert (root / "transfer/engine/ipc.py").read_text().count("pickle.dumps(") == 1
