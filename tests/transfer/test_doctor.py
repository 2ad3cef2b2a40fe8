"""`python -m transfer.doctor`: real checks on this machine, on machines made worse for real, and simulated failures."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from shared_memory import left_in_shared_memory

from transfer.doctor import catalog, child, gpus, host, installed, load, runner, sessions, table
from transfer.doctor.__main__ import NO_TIME
from transfer.doctor.choice import choose
from transfer.doctor.finding import FAIL, LATE, OK, SKIP, WARN, Check, Finding, Problem, Result, failed
from transfer.doctor.runner import run

ROOT = Path(__file__).resolve().parents[2]
MARK = "DOCTOR_TEST_MARK"
DOCTOR = [sys.executable, "-m", "transfer.doctor"]
DEADLINE_S = 100.0
GONE_S = 5.0
PATIENT = ("--deadline", "80")  # the machine may be busy with other tests
Space = namedtuple("Space", "f_blocks f_bavail f_frsize")

pytestmark = pytest.mark.usefixtures("default_signals")


@contextmanager
def leaving_nothing():
    """The environment for a doctor; afterwards, no process of it runs, and no file of it is left."""
    mark, shared = uuid.uuid4().hex, set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory(prefix="d-", dir="/tmp") as folder:  # short, as Ray wants it
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        yield os.environ | {MARK: mark, "PYTHONPATH": path, "TMPDIR": folder}
        end = time.monotonic() + 10
        while (left := marked(mark)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not left, [process.cmdline() for process in left]
        assert not os.listdir(folder)
    new = left_in_shared_memory(shared, GONE_S)
    assert not [name for name in new if name.startswith(("doctor", "plasma", "cuda.shm.")) and not is_anothers(name)]


def is_anothers(name):
    """Whether CUDA has made this for a process that still runs, so none of the doctor's: cuda.shm.<user>.<pid>.<n>."""
    return name.startswith("cuda.") and psutil.pid_exists(int(name.split(".")[3], 16))


def marked(mark):
    """All processes that were started with this mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def command(process):
    """Its words; none of one that has just ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def doctor(*arguments, before=()):
    """Run the doctor, behind the command `before`: its exit code, its results by name, and its choice."""
    with leaving_nothing() as environment:
        command = [*before, *DOCTOR, "--json", *PATIENT, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, cwd="/")
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    return done.returncode, {check["name"]: check for check in report["checks"]}, report["choice"]


def statuses(checks, *names):
    return {checks[name]["status"] for name in names}


CPU_HTTP = ("ipc arena+view, http", "ipc arena+copy, http", "ipc live+copy, http", "disk, http", "one-shot API, http")
CPU_RAY = ("ipc arena+view, ray", "ipc arena+copy, ray", "ipc live+copy, ray", "disk, ray")


# --- the command ------------------------------------------------------------------------------------------------------


def test_help_comes_at_once_because_it_imports_little():
    code = "import runpy, sys\ntry: runpy.run_module('transfer.doctor', run_name='__main__', alter_sys=True)\n"
    code += "finally: print(sorted({'torch', 'numpy', 'ray', 'rich'} & set(sys.modules)), len(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    *text, last = done.stdout.splitlines()
    assert done.returncode == 0 and "--quick" in "\n".join(text) and "75: they did not, and some checks" in done.stdout
    assert last.startswith("[] ") and int(last.split()[1]) < 200


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan"])
def test_a_bad_deadline_is_one_clear_line(text):
    done = subprocess.run([*DOCTOR, f"--deadline={text}"], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert f"must be a number of seconds greater than 0 (got {text})" in done.stderr.splitlines()[-1]


def test_a_doctor_whose_time_is_over_reports_all_the_same_and_leaves_nothing():
    code, checks, choice = doctor("--deadline", "0.7")
    assert code == NO_TIME and not choice["moves"]
    assert set(checks) == {check.name for check in catalog.checks()}
    assert checks["torch"]["status"] == checks["disk, http"]["status"] == LATE
    assert checks["torch"]["seen"] == "not tried: no time (not done when the doctor's 0.7 s were over)"
    assert "--deadline" in checks["torch"]["do"] and "--deadline" in checks["disk, http"]["do"]
    assert FAIL not in statuses(checks, *checks) and any("not tried: no time" in line for line in choice["why"])


def test_what_was_left_out_on_purpose_is_no_matter_of_time():
    _, checks, _ = doctor("--quick", "--deadline", "0.7")
    assert statuses(checks, "Ray starts", *CPU_RAY) <= {SKIP, LATE} and checks["Ray starts"]["status"] == SKIP


@pytest.mark.slow
def test_the_tables_and_the_progress_are_readable():
    for deadline in ("2.6", "5", "10"):  # over after the machine was looked at, and before a transfer was tried
        with leaving_nothing() as environment:
            command = [*DOCTOR, "--quick", "--deadline", deadline]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, cwd="/")
        if "memory without a name" in done.stdout:
            break
    assert done.returncode == NO_TIME
    assert "this machine" in done.stdout and "memory without a name" in done.stdout
    assert "no time" in done.stdout and "FAILS" not in done.stdout
    assert "Nothing is known to work here: there was no time to try all." in done.stdout
    assert done.stdout.count("left out by --quick") == 1  # five checks, in one row
    assert "checks done; running: " in done.stderr and "Traceback" not in done.stderr
    assert max(map(len, done.stderr.splitlines())) <= 110


@pytest.mark.slow
def test_every_backend_works_here_over_http_and_over_ray_and_the_choice_says_how(compose_run):
    code, checks, choice = doctor()
    assert code == 0 and choice["moves"]
    assert statuses(checks, "Python", "packages", "torch", "memfd", "descriptors between processes") == {OK}
    assert statuses(checks, "memory by /proc/<pid>/fd", "tensors by torch's files", "loopback HTTP", "local") == {OK}
    assert statuses(checks, *CPU_HTTP) == {OK}, [checks[name]["seen"] for name in CPU_HTTP]
    assert all(0 < checks[name]["data"]["ms"] < 5000 for name in CPU_HTTP)
    assert statuses(checks, "Ray", "Ray starts", *CPU_RAY) == {OK}, [checks[name]["seen"] for name in CPU_RAY]
    assert compose_run(*choice["overrides"]).transfer


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_doctor_that_is_stopped_takes_its_workers_along(number, code):
    with leaving_nothing() as environment:
        process = subprocess.Popen([*DOCTOR, "--quick"], env=environment, cwd="/", stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 40
            while not any("transfer.worker.plain_worker" in command(p) for p in marked(environment[MARK])):
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.1)
            process.send_signal(number)
            assert process.wait(10) == code
        finally:
            process.kill()
            process.wait()
        if number == signal.SIGKILL:  # nobody is left to remove its folder
            for folder in Path(environment["TMPDIR"]).iterdir():
                shutil.rmtree(folder)


# --- machines made worse for real -------------------------------------------------------------------------------------


def may_unshare(what):
    try:
        return subprocess.run(["unshare", what, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not may_unshare("--net"), reason="may not make a network namespace")
def test_without_loopback_only_local_is_left_and_the_exit_code_says_so():
    code, checks, choice = doctor("--quick", before=["unshare", "--net"])
    assert code == 1 and choice["overrides"] == ["transfer=local"]
    assert checks["loopback HTTP"]["status"] == FAIL and "unreachable" in checks["loopback HTTP"]["seen"]
    assert statuses(checks, *CPU_HTTP) == {FAIL} and "unreachable" in checks["disk, http"]["seen"]
    assert statuses(checks, "memfd", "descriptors between processes", "local") == {OK}


@pytest.mark.slow
@pytest.mark.skipif(not may_unshare("--mount"), reason="may not make a mount namespace")
def test_with_a_tiny_dev_shm_ipc_works_and_torchs_own_sharing_does_not():
    script = 'mount -t tmpfs -o size=512k shm /dev/shm && exec "$@"'
    code, checks, choice = doctor("--quick", before=["unshare", "--mount", "sh", "-c", script, "sh"])
    assert code == 0 and choice["overrides"][0] == "transfer=ipc"
    assert checks["/dev/shm"]["status"] == FAIL and "No space left" in checks["/dev/shm"]["seen"]
    assert checks["tensors by torch's files"]["status"] == FAIL
    assert statuses(checks, *CPU_HTTP) == {OK}, [checks[name]["seen"] for name in CPU_HTTP]


SYSCALL = {"x86_64": 319, "aarch64": 279}  # memfd_create
REFUSING = """
import ctypes, os, struct, sys
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, {number}), (6, 0, 0, 0x00050001), (6, 0, 0, 0x7FFF0000)]  # EPERM, else allow
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
program = ctypes.create_string_buffer(struct.pack("HP", len(rules), ctypes.addressof(code)))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program) == 0  # no new privileges; the filter
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in SYSCALL, reason="the number of memfd_create is not known")
def test_where_the_kernel_refuses_memfd_disk_is_chosen():
    script = REFUSING.format(number=SYSCALL[platform.machine()])
    code, checks, choice = doctor("--quick", before=[sys.executable, "-c", script])
    assert code == 0 and choice["overrides"] == ["transfer=disk", "transfer/sender=http"]
    assert checks["memfd"]["status"] == FAIL and "refused" in checks["memfd"]["seen"] and checks["memfd"]["do"]
    assert statuses(checks, *CPU_HTTP[:3], "one-shot API, http") == {FAIL}
    assert "memfd_create" in checks["ipc arena+view, http"]["seen"]
    assert statuses(checks, "disk, http", "local") == {OK}
    assert statuses(checks, "descriptors between processes", "memory by /proc/<pid>/fd") == {SKIP}


# --- transfers --------------------------------------------------------------------------------------------------------


def test_a_real_transfer_of_a_mebibyte_is_checked_by_the_digest_of_the_live_weights():
    finding = sessions.session("ipc", "http", "arena", "view")
    assert finding.status == OK and finding.data["bytes"] == 2**20 and finding.data["pushes"] == sessions.PUSHES


def test_local_moves_nothing_and_works():
    assert sessions.local().status == OK


@contextmanager
def worker_module(monkeypatch, tmp_path, source):
    """The worker process runs this module instead of a plain worker."""
    (tmp_path / "sabotaged_worker.py").write_text(textwrap.dedent(source))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sessions, "WORKER", "sabotaged_worker")
    yield


TORN = """
    from transfer.worker import plain_worker
    from transfer.worker.update import Updates

    write = Updates._write_weights

    def a_part(self):
        self._staged.popitem()
        return write(self)

    Updates._write_weights = a_part
    plain_worker.main()
"""


def test_a_worker_that_takes_only_a_part_of_the_weights_is_seen(monkeypatch, tmp_path):
    with (
        worker_module(monkeypatch, tmp_path, TORN),
        pytest.raises(Problem, match="serves other weights than were sent"),
    ):
        sessions.session("ipc", "http", "arena", "view")


def test_a_worker_that_cannot_start_is_reported_with_its_last_words(monkeypatch, tmp_path):
    with worker_module(monkeypatch, tmp_path, "import no_such_package"), pytest.raises(Problem) as caught:
        sessions.session("disk", "http")
    assert caught.value.seen == "the worker did not come up: ModuleNotFoundError: No module named 'no_such_package'"


def test_a_worker_that_never_comes_up_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(sessions, "START_S", 0.5)
    with worker_module(monkeypatch, tmp_path, "import time; time.sleep(60)"), pytest.raises(Problem, match="come up"):
        sessions.session("disk", "http")


def test_a_package_that_a_transfer_needs_and_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sessions.NEEDS, "http", ("requests", "no_such_package"))
    with pytest.raises(Problem, match="not installed: no_such_package") as caught:
        sessions.session("disk", "http")
    assert caught.value.do == "pip install no_such_package"


# --- the runner -------------------------------------------------------------------------------------------------------


def check(name, target="transfer.doctor.host:open_files", lane="one", **options):
    return Check(name, "group", lane, target, **options)


def found(tmp_path, *checks, deadline_s=30.0):
    """The findings of these checks, by name, and the seconds of all."""
    began = time.monotonic()
    results = run(checks, tmp_path, deadline_s, lambda done, running: None)
    assert [result.check.name for result in results] == [check.name for check in checks]
    return {result.check.name: result.finding for result in results}, time.monotonic() - began


def test_a_hanging_check_is_reported_at_its_deadline_and_the_next_one_runs(tmp_path):
    hanging = check("hangs", "signal:pause", deadline_s=0.5, do="wait")
    findings, seconds = found(tmp_path, hanging, check("next"), deadline_s=60.0)
    assert findings["hangs"] == Finding(FAIL, "no end within 0.5 s", "wait")
    assert findings["next"].status == OK and seconds < 30


def test_lanes_run_side_by_side(tmp_path):
    """Each check waits until all four are there, then ends; had they to wait for each other, none would."""
    (tmp_path / "there").mkdir()
    wait = 'touch "$0"; while [ $(ls | wc -l) -lt 4 ]; do sleep 0.02; done'
    arguments = [{"args": ["sh", "-c", wait, str(lane)], "cwd": str(tmp_path / "there")} for lane in range(4)]
    checks = [check(str(lane), "subprocess:run", str(lane), arguments=told) for lane, told in enumerate(arguments)]
    findings, _ = found(tmp_path, *checks, deadline_s=60.0)
    assert not [finding for finding in findings.values() if "no end within" in finding.seen or finding.status == LATE]


SLOW = {"delay_s": 0.01}  # 120 round trips: more than a second


@pytest.mark.slow
def test_a_check_that_had_no_processor_is_given_the_time_that_it_has_waited(tmp_path, monkeypatch):
    slow = check("slow", "transfer.doctor.host:loopback", arguments=SLOW, deadline_s=0.5)
    assert found(tmp_path, slow)[0]["slow"] == Finding(FAIL, "no end within 0.5 s")
    began = time.monotonic()
    monkeypatch.setattr(runner, "waited_s", lambda processes: time.monotonic() - began)  # always, since then
    assert found(tmp_path, slow, deadline_s=120.0)[0]["slow"].status == WARN


def test_a_check_that_has_waited_only_before_it_hangs_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "waited_s", lambda processes: 1000.0 if list(processes) else 0.0)
    first, hanging = check("first"), check("hangs", "signal:pause", deadline_s=0.5)
    findings, _ = found(tmp_path, first, hanging, deadline_s=60.0)
    assert findings["hangs"].seen == "no end within 0.5 s"


def test_what_needs_a_check_without_time_has_none_either(tmp_path):
    checks = [check("long", "signal:pause"), check("needy", lane="two", needs=("long",)), check("late")]
    findings, _ = found(tmp_path, *checks, deadline_s=0.5)
    assert {finding.status for finding in findings.values()} == {LATE}
    assert all(finding.seen.startswith("not tried: no time (") for finding in findings.values())


@pytest.mark.parametrize("busy, status", [(True, LATE), (False, FAIL)])
@pytest.mark.parametrize("how", ["itself", "cause", "context", "process"])
def test_a_deadline_inside_a_check_proves_nothing_on_a_busy_machine(busy, status, how, monkeypatch):
    def raising():
        if how == "process":
            subprocess.run(["sleep", "9"], timeout=0.01)
        try:
            raise TimeoutError("it is late")
        except TimeoutError as error:
            if how == "itself":
                raise
            raise Problem("no answer") from (error if how == "cause" else None)

    monkeypatch.setattr(load.Since, "busy", busy)
    monkeypatch.setattr(host, "raising", raising, raising=False)
    finding = child.carried_out("transfer.doctor.host:raising", {})
    assert finding.status == status and ("not tried: no time (" in finding.seen) is busy


def test_other_errors_are_failures_on_a_busy_machine_too(monkeypatch):
    monkeypatch.setattr(load.Since, "busy", True)
    assert child.carried_out("os:listdir", {"path": "/no/such"}).status == FAIL


def test_the_load_is_what_processes_have_waited_for_a_processor():
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this kernel does not count it")
    core = min(os.sched_getaffinity(0))
    spin = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    with subprocess.Popen(["sleep", "60"]) as idle:
        busy = [subprocess.Popen([sys.executable, "-S", "-c", spin]) for _ in range(3)]
        try:
            end = time.monotonic() + 30
            while load.waited_s([busy[0].pid]) < 0.2 and time.monotonic() < end:
                time.sleep(0.02)
            assert load.waited_s([process.pid for process in busy]) > load.waited_s([busy[0].pid]) >= 0.2
            assert load.waited_s([idle.pid]) < load.waited_s([busy[0].pid]) / 4
        finally:
            for process in [*busy, idle]:
                process.kill()
                process.wait()
    assert load.waited_s([idle.pid, 2**22]) == 0.0


def test_a_busy_machine_has_more_patience(monkeypatch):
    assert 1.0 <= load.patience() <= load.MOST
    monkeypatch.setattr(load, "_pressure", {"avg10": 100.0}.get)
    assert load.patience() == load.MOST and load.patient(2.0) == 2.0
    monkeypatch.setenv(load.PATIENCE, "2.5")
    assert load.patient(2.0) == 5.0


def test_a_check_whose_process_dies_is_reported_with_the_reason_and_the_next_one_runs(tmp_path):
    checks = [check("aborts", "os:abort"), check("exits", "os:_exit", arguments={"status": 3}), check("next")]
    findings, _ = found(tmp_path, *checks)
    assert "died of SIGABRT" in findings["aborts"].seen and "ended with code 3" in findings["exits"].seen
    assert findings["aborts"].status == findings["exits"].status == FAIL and findings["next"].status == OK


def test_a_check_that_raises_is_reported_in_one_line_and_its_process_goes_on(tmp_path):
    findings, _ = found(tmp_path, check("raises", "os:listdir", arguments={"path": "/no/such"}), check("next"))
    assert findings["raises"].seen == "FileNotFoundError: [Errno 2] No such file or directory: '/no/such'"
    assert findings["next"].status == OK


def test_a_check_waits_for_what_it_needs_and_is_left_out_if_that_failed(tmp_path):
    checks = [
        check("needy", lane="two", needs=("works", "fails")),
        check("works"),
        check("fails", "os:abort"),
        check("quick", lane="three", skip="left out by --quick"),
        check("needs quick", lane="three", needs=("quick",)),
        check("content", lane="two", needs=("works",)),
    ]
    findings, _ = found(tmp_path, *checks)
    assert findings["needy"] == Finding(SKIP, "needs what failed above: fails")
    assert findings["needs quick"] == Finding(SKIP, "left out by --quick")
    assert findings["content"].status == OK


def test_what_a_hanging_check_has_started_ends_with_it(tmp_path):
    with leaving_nothing() as environment:
        os.environ[MARK] = environment[MARK]
        try:
            sleeper = {"args": ["sh", "-c", "sleep 1000 & sleep 1001"], "start_new_session": True}
            findings, _ = found(tmp_path, check("hangs", "subprocess:run", arguments=sleeper, deadline_s=1.0))
        finally:
            del os.environ[MARK]
        assert findings["hangs"].seen == "no end within 1 s"
        assert not marked(environment[MARK])


def test_what_gpu_sharing_leaves_in_dev_shm_goes_with_the_process(tmp_path):
    script = (
        "import os, pathlib; p = os.getppid();"
        "[pathlib.Path('/dev/shm', n).touch() for n in (f'torch_{p}_1_0', f'cuda.shm.{os.getuid()}.{p:x}.1')]"
    )
    before = set(os.listdir("/dev/shm"))
    found(tmp_path, check("leaves", "subprocess:run", arguments={"args": [sys.executable, "-c", script]}))
    left = left_in_shared_memory(before, GONE_S)
    assert not [name for name in left if name.startswith(("torch_", "cuda.shm."))]


# --- single checks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [host.memfd, host.descriptors, host.proc_descriptors, host.shared_folder, host.loopback, host.memory],
    ids=lambda function: function.__name__,
)
def test_the_machine_of_the_tests_is_well(function):
    assert function().status == OK


def refused(*_):
    raise PermissionError(1, "Operation not permitted")


def test_a_memfd_that_is_refused_or_whose_seals_do_not_hold_is_a_failure():
    with pytest.raises(Problem, match="memfd_create is refused"):
        host.memfd(create=refused)
    with pytest.raises(Problem, match="could be resized"):
        host.memfd(seals=0)


def test_a_kernel_that_cannot_seal_memory_against_writers_is_a_warning(monkeypatch):
    assert "every writer but the trainer" in host.memfd().seen
    monkeypatch.setattr(host, "FUTURE_WRITE", 0x4000)  # which this kernel does not know
    assert host.memfd().status == WARN and "against other writers" in host.memfd().seen


def test_a_peer_of_another_user_is_a_failure():
    with pytest.raises(Problem, match="SO_PEERCRED does not say who is there"):
        host.descriptors(user=os.geteuid() + 1)


DIES = "echo no memory >&2; exit 1", "could not .*: no memory"
HANGS = "exec sleep 60", "did not .* within"


@pytest.mark.parametrize(
    "function, script, reason",
    [
        (host.descriptors, *DIES),
        (host.proc_descriptors, *DIES),
        (host.loopback, *DIES),
        (host.loopback, *HANGS),
        pytest.param(host.descriptors, *HANGS, marks=pytest.mark.slow),
        pytest.param(host.proc_descriptors, *HANGS, marks=pytest.mark.slow),
    ],
)
def test_a_second_process_that_dies_or_hangs_is_a_failure(function, script, reason, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(host, "PEER_S", 1.0)
    with pytest.raises(Problem, match=reason):
        function()


def test_memory_of_other_processes_that_is_out_of_reach_is_a_failure(tmp_path):
    with pytest.raises(Problem, match="is not mounted"):
        host.proc_descriptors(proc=str(tmp_path))
    scope = tmp_path / "scope"
    scope.write_text("1\n")
    assert "(ptrace_scope 1)" in host.proc_descriptors(scope=str(scope)).seen


def test_a_small_or_missing_or_slow_dev_shm_is_seen(tmp_path):
    mib = 2**20
    docker = host.shared_folder(space=lambda folder: Space(64, 60, mib))
    assert docker.status == WARN and "docker's default" in docker.seen and "--shm-size" in docker.do
    full = host.shared_folder(space=lambda folder: Space(1024, 3, mib))
    assert full.status == WARN and "3 MiB of 1.0 GiB" in full.seen
    with pytest.raises(Problem, match="is not there"):
        host.shared_folder(folder=str(tmp_path / "shm"))
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda {tmp_path} ext4 rw 0 0\n")
    disk = host.shared_folder(folder=str(tmp_path), mounts=str(mounts))
    assert disk.status == WARN and "it may be a disk" in disk.seen


def test_a_loopback_that_is_slow_or_not_there_is_seen():
    slow = host.loopback(delay_s=0.01)
    assert slow.status == WARN and slow.data["kept_ms"] > 10
    with pytest.raises(OSError):
        host.loopback(host="192.0.2.1")  # an address of no machine (RFC 5737)


def test_limits_and_containers_are_seen(tmp_path):
    assert host.open_files((256, 4096)).status == WARN
    assert host.open_files((65536, 65536)).status == OK
    (tmp_path / "proc/self/ns").mkdir(parents=True)
    (tmp_path / "proc/self/ns/pid").symlink_to(host.FIRST_PIDS)
    assert host.container(str(tmp_path)).status == SKIP
    (tmp_path / ".dockerenv").touch()
    assert "with the host's process numbers" in host.container(str(tmp_path)).seen
    (tmp_path / "proc/self/ns/pid").unlink()
    (tmp_path / "proc/self/ns/pid").symlink_to("pid:[4026532999]")
    assert "a pid namespace of its own" in host.container(str(tmp_path)).seen


def test_the_memory_of_a_container_is_its_limit(tmp_path):
    (tmp_path / "memory.max").write_text("1073741824\n")
    limited = host.memory(limits=str(tmp_path))
    assert "this container may use 1.0 GiB" in limited.seen and limited.data["limit_bytes"] == 2**30
    (tmp_path / "memory.max").write_text("max\n")
    assert host.memory(limits=str(tmp_path)).data["limit_bytes"] is None


def test_packages_that_are_missing_or_of_another_version_are_named():
    assert installed.packages().status == OK
    versions = {name: installed.version_of(name) for name in installed.NEEDED_FOR}
    with pytest.raises(Problem, match=r"missing: safetensors \(for transfer=disk\)") as caught:
        installed.packages((versions | {"safetensors": None}).get)
    assert caught.value.do == "pip install safetensors"
    old = installed.packages((versions | {"numpy": "1.26.4"}).get)
    assert old.status == WARN and "numpy 1.26.4 (supported >=2)" in old.seen
    with pytest.raises(Problem, match=r"Python 3\.9\.1, supported is >=3"):
        installed.python("3.9.1")
    assert installed.ray_installed("2.9.3").status == WARN


@pytest.mark.parametrize(
    "version, wanted, right",
    [
        ("2.13.0+cpu", ">=2.11,<2.14", True),
        ("2.14.0", ">=2.11,<2.14", False),
        ("2.9.1", ">=2.11", False),
        ("2.11.0a0+git1234", ">=2.11", True),
        ("3", "==3.0", True),
        ("3.1", "!=3.1", False),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version, wanted, right):
    assert installed.fits(version, wanted) is right


def test_the_declared_ranges_are_those_of_the_package():
    python, ranges = installed.declared()
    assert python.startswith(">=3.") and ranges["torch"].startswith(">=") and "pytest" not in ranges


def test_torch_and_its_own_sharing_are_checked(tmp_path):
    findings, _ = found(
        tmp_path,
        check("torch", "transfer.doctor.gpus:torch_version", deadline_s=60),
        check("sharing", "transfer.doctor.gpus:shared_tensor", deadline_s=60),
        check("old", "transfer.doctor.gpus:torch_version", arguments={"version": "2.4.0"}),
        deadline_s=90.0,
    )
    assert findings["torch"].status == findings["sharing"].status == OK
    assert findings["old"].status == WARN and "2.4.0 (supported: >=2." in findings["old"].seen


# --- GPUs -------------------------------------------------------------------------------------------------------------

LISTED = "GPU 0: NVIDIA H100 (UUID: GPU-1)\n"
ROW = "0, NVIDIA H100, GPU-1, 81559, 4, Default, Disabled\n"


def nvidia_smi(tmp_path, listed=LISTED, rows=ROW, code=0):
    """A program that answers as nvidia-smi does."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nif [ $1 = -L ]; then printf '{listed}'; else printf '{rows}'; fi\nexit {code}\n")
    program.chmod(0o700)
    return str(program)


def test_the_driver_tells_the_gpus(tmp_path):
    finding = gpus.driver(nvidia_smi(tmp_path), {"CUDA_VISIBLE_DEVICES": "1"})
    assert finding.status == OK and "0: NVIDIA H100, GPU-1" in finding.seen and "VISIBLE_DEVICES='1'" in finding.seen
    assert gpus.driver(str(tmp_path / "none"), {}).status == SKIP


def test_mig_and_exclusive_gpus_are_warned_of(tmp_path):
    exclusive = gpus.driver(nvidia_smi(tmp_path, rows=ROW.replace("Default", "Exclusive_Process")), {})
    assert exclusive.status == WARN and "nvidia-smi -c DEFAULT" in exclusive.do
    mig = LISTED + "  MIG 1g.10gb Device 0: (UUID: MIG-2)\n"
    sliced = gpus.driver(nvidia_smi(tmp_path, listed=mig, rows=ROW.replace("Disabled", "Enabled")), {})
    assert sliced.status == WARN and "1 MIG instances" in sliced.seen


def test_a_driver_that_fails_or_hangs_is_reported(tmp_path, monkeypatch):
    with pytest.raises(Problem, match="GPU 0: NVIDIA H100"):
        gpus.driver(nvidia_smi(tmp_path, code=9), {})
    monkeypatch.setattr(gpus, "SMI_S", 0.2)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(Problem, match=r"did not end within 0\.2 s"):
        gpus.driver(str(tmp_path / "nvidia-smi"), {})


def test_a_gpu_that_torch_does_not_see_is_a_failure(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpus.devices(str(tmp_path / "none")).status == SKIP
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(Problem, match="torch was built without CUDA, and this machine has GPU 0"):
        gpus.devices(nvidia_smi(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(Problem, match="torch sees no GPU"):
        gpus.devices(nvidia_smi(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus.devices(nvidia_smi(tmp_path)).status == SKIP


def test_expandable_segments_are_warned_of():
    assert gpus.allocator({}).status == OK
    for name in gpus.ALLOCATOR:
        warned = gpus.allocator({name: "max_split_size_mb:64,expandable_segments:True"})
        assert warned.status == WARN and "cudaMalloc" in warned.seen
    assert gpus.allocator({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}).status == OK


def test_gpus_that_do_not_reach_each_other_are_warned_of(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: 2 not in (a, b))
    finding = gpus.peer_access()
    assert finding.status == WARN and finding.seen == "direct: 0 to 1; 1 to 0; 2 to none"
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    assert gpus.peer_access().status == OK


@pytest.mark.gpu
@pytest.mark.skipif(subprocess.run(["which", "nvidia-smi"], capture_output=True).returncode, reason="needs a GPU")
def test_cuda_ipc_and_every_backend_work_on_the_gpu():
    code, checks, choice = doctor("--quick")
    names = [name for name in checks if name.endswith("http, cuda:0")]
    assert len(names) == 7 and statuses(checks, "CUDA IPC", *names) == {OK}
    assert code == 0 and "transfer.staging=live" in choice["overrides"]


# --- the choice -------------------------------------------------------------------------------------------------------


def results(works):
    """All checks, of which those whose name `works` accepts are ok."""
    good, bad = Finding(OK, "seen", data={"ms": 1.0}), Finding(FAIL, "broken")
    return [Result(check, good if works(check.name) else bad) for check in catalog.checks()]


def on_cpu(name):
    return "cuda" not in name and name != catalog.DEVICES


CHOICES = {
    "all on a CPU": (on_cpu, "transfer=ipc transfer.staging=arena transfer.take=view transfer/sender=http"),
    "all with GPUs": (lambda n: True, "transfer=ipc transfer.staging=live transfer.take=copy transfer/sender=http"),
    "no views": (
        lambda n: on_cpu(n) and "view" not in n,
        "transfer=ipc transfer.staging=arena transfer.take=copy transfer/sender=http",
    ),
    "no http": (
        lambda n: on_cpu(n) and "http" not in n,
        "transfer=ipc transfer.staging=arena transfer.take=view transfer/sender=ray",
    ),
    "no ipc": (lambda n: on_cpu(n) and "ipc" not in n, "transfer=disk transfer/sender=http"),
    "a GPU that cannot share": (
        lambda n: "ipc" not in n or "cuda" not in n,
        "transfer=disk transfer/sender=http",
    ),
    "a GPU that nothing reaches": (
        lambda n: "cuda" not in n,
        "transfer=ipc transfer.staging=arena transfer.take=view transfer/sender=http",
    ),
    "no files": (
        lambda n: on_cpu(n) and "ipc" not in n and "disk" not in n,
        "transfer=gloo transfer/sender=http",
    ),
    "only local": (lambda n: n in ("torch", "local"), "transfer=local"),
}


@pytest.mark.parametrize("works, expected", CHOICES.values(), ids=CHOICES)
def test_the_choice_is_the_best_way_that_works_and_can_be_configured(works, expected, compose_run):
    choice = choose(results(works))
    assert " ".join(choice.overrides) == expected
    assert choice.moves is (expected != "transfer=local")
    assert compose_run(*choice.overrides).transfer


def test_the_choice_says_what_does_not_work_and_why():
    assert "not ipc arena+view, http; ipc arena+view, ray: broken" in choose(results(CHOICES["no views"][0])).why
    assert any("model.device=cpu" in line for line in choose(results(CHOICES["a GPU that nothing reaches"][0])).why)


def test_where_nothing_works_nothing_is_chosen():
    choice = choose(results(lambda name: False))
    assert not choice.overrides and not choice.moves and "broken" in choice.why[0]
    assert choose([Result(check, Finding(SKIP, "-")) for check in catalog.checks()]).why == (
        "no transfer could be tried",
    )


# --- words ------------------------------------------------------------------------------------------------------------


def test_a_reason_is_one_line_of_readable_length():
    assert failed(RuntimeError("first\nsecond\n\nthird\n")).seen == "RuntimeError: first ... third"
    assert failed(ValueError()).seen == "ValueError"
    assert len(failed(RuntimeError("x" * 9999)).seen) < 420
    try:
        os.memfd_create("x", ~0)
    except OSError as error:
        assert "os.memfd_create" in failed(error).seen


@pytest.mark.parametrize("rich", [True, False])
def test_the_tables_merge_what_is_alike_and_do_without_rich(rich, monkeypatch, capsys):
    if not rich:
        monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    listed = results(on_cpu)
    table.show(listed, choose(listed))
    out = capsys.readouterr().out
    assert "ipc arena+view, http, cuda:0" in out and "and 13 more" in " ".join(out.split())
    assert "FAILS" in out and "Choose here: transfer=ipc" in out and out.count("broken") < 5
    assert ("│" in out) is rich
