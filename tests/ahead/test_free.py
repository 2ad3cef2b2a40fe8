"""The queue of `rollout.ahead.order=free`: who is asked for what, what is learned from when, and what survives."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from rlhf.ahead import exact, kept
from rlhf.ahead.free import Free, Load
from rlhf.ahead.in_turn import RewardInTurn
from rlhf.ahead.slots import Slots
from rlhf.ahead.stream import Stream
from rlhf.gather import Gather
from rlhf.rollout.sampling import seed_of
from rlhf.shell.ending import RunError
from rlhf.types import Completion, Prompt, RewardReport, Rollouts
from transfer.agreement.wire import RemoteError

FREE = (
    *("experiment=smoke", "rollout.ahead.lag=1", "rollout.ahead.order=free", "algo.correction=tis"),
    *("prompts_per_step=4", "samples_per_prompt=2", "rollout.workers=2"),
)
PROMPTS = [Prompt(str(number), (number,)) for number in range(8)]
WAIT_S = 20.0


class Record:
    """What a recorder hears of."""

    sampled, sampling_s = 0, None

    def __init__(self):
        self.reports, self.ahead = [], {}

    def time(self, phase):
        return threading.Lock()

    def rewarded(self, report):
        self.reports.append(report)


class House:
    """Workers whose answers have the version that is live; each answers while its `may` is set, or fails."""

    def __init__(self, names="ab"):
        self.senders, self.version = list(names), 0
        self.may = {name: threading.Event() for name in names}
        self.fails: dict[str, BaseException] = {}
        self.asked: list[tuple[str, list[int]]] = []
        self.recovered: list[str] = []
        self.heals, self.elsewhere = True, 0
        for event in self.may.values():
            event.set()

    def recover(self, sender):
        self.recovered.append(sender)
        if self.heals:
            self.fails.pop(sender, None)
        return self.heals

    def recoveries(self, sender):
        return self.recovered.count(sender) if self.heals else self.elsewhere

    def sampler(self, name):
        house = self

        class Sampler:
            def sample_seeded(self, prompts, seeds, n, temperature, firsts):
                house.asked.append((name, [prompt.ids[0] for prompt in prompts]))
                version = house.version
                assert house.may[name].wait(WAIT_S)
                if name in house.fails:
                    raise house.fails[name]
                rows = [Completion([7], [-0.5], [version], "stop") for _ in prompts for _ in range(n)]
                return Rollouts(list(prompts), rows, [p.text for p in prompts for _ in range(n)], seeds, n)

        return Sampler()


def until(holds):
    """Wait for what threads bring about."""
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def make(compose_run):
    """`make(house, "more=overrides", reward=...)`: a queue of eight prompts, four a step, and its recorder."""
    made = []

    def free(house, *overrides, reward=lambda prompts, answers: [1.0] * len(answers), slots=None):
        config, record = compose_run(*FREE, *overrides), Record()
        stream = Stream(PROMPTS, config.prompts_per_step, config.seed)
        slots = slots or Slots(stream.size, config.rollout.ahead.lag, config.steps * stream.size)
        gather = Gather(None, RewardInTurn(reward), config, record)
        made.append((Free(gather, record, house, house.sampler, stream, slots), house))
        return made[-1][0], record

    yield free
    for queue, house in made:
        queue.close()
        for event in house.may.values():
            event.set()


def step(queue, house, number):
    """One step: what it has learned from."""
    scored = queue(PROMPTS, [], number)
    queue.settle()
    house.version += 1
    queue.release()
    return scored


def test_steps_have_the_prompts_and_seeds_of_their_numbers_and_groups_no_older_than_the_lag(make):
    house = House()
    queue, record = make(house)
    stream = Stream(PROMPTS, 4, queue._gather.config.seed)
    for number in range(1, 6):
        rollouts, rewards = queue(PROMPTS, [], number)
        expected = [stream[index] for index in range(4 * number - 4, 4 * number)]
        assert list(zip(rollouts.prompts, rollouts.seeds, strict=True)) == expected and rewards == [1.0] * 8
        assert rollouts.seeds == [seed_of(queue._gather.config.seed + number, place) for place in range(4)]
        assert rollouts.lags(house.version).max() <= 1
        until(lambda: record.ahead["rollout/queue"] + record.ahead["rollout/running"] <= 4)
        house.version += 1
        queue.release()
    for name, _ in Counter(name for name, _ in house.asked).items():
        assert name in "ab"


def test_a_worker_that_is_slow_gets_less_and_nobody_is_asked_for_more_than_there_are_slots(make):
    house = House()
    house.may["b"].clear()
    queue, _ = make(house, "rollout.ahead.window=4", slots=Slots(4, 1, 400, window=4))
    for number in (1, 2):
        queue(PROMPTS, [], number)
        queue.release()
        if number == 1:
            until(lambda: queue._slots.running == 2 and queue._slots.whole + 2 == len(queue._slots.held))
            house.may["b"].set()
    asked = Counter(name for name, _ in house.asked[:6])
    assert asked["b"] < asked["a"]


def test_engines_whose_rows_come_and_go_are_asked_for_single_prompts(compose_run):
    assert Load.of(compose_run(*FREE, "prompts_per_step=7"), 2) == Load(1, 4)
    vllm = compose_run(*FREE, "rollout=vllm", "transfer.take=copy")
    assert Load.of(vllm, 2) == Load(48, 1)
    many = compose_run(*FREE, "rollout=vllm", "transfer.take=copy", "prompts_per_step=512")
    assert Load.of(many, 2) == Load(48, 6)


def test_what_a_worker_was_asked_for_when_it_died_is_asked_again_and_in_the_thread_that_waits(make):
    house = House("a")
    queue, _ = make(house)
    house.fails["a"] = RemoteError("a", "completions", 0, "the connection broke")
    rollouts, _ = step(queue, house, 1)
    assert len(rollouts.prompts) == 4 and house.recovered == ["a"]
    until(lambda: queue._slots.whole == 8)
    queue(PROMPTS, [], 2)
    house.fails["a"] = RemoteError("a", "completions", 0, "the connection broke")
    queue.release()
    until(lambda: queue._desks["a"].lost is not None)
    assert house.recovered == ["a"], "no other thread starts processes"
    queue.settle()
    assert house.recovered == ["a", "a"] and queue._desks["a"].lost is None


def test_a_worker_that_the_push_has_brought_back_is_not_taken_for_one_that_cannot_be(make):
    house = House("a")
    queue, _ = make(house, "rollout.in_flight=keep")
    step(queue, house, 1)
    until(lambda: queue._slots.whole == 8)
    house.may["a"].clear()
    step(queue, house, 2)  # four are asked for, and stay away
    house.fails["a"], house.heals = RemoteError("a", "completions", 0, "the connection broke"), False
    step(queue, house, 3)  # whose push found it dead
    house.may["a"].set()
    until(lambda: queue._desks["a"].lost is not None)
    house.fails.clear()
    assert len(queue(PROMPTS, [], 4)[0].prompts) == 4 and house.recovered == ["a"]


@pytest.mark.parametrize("error", [RemoteError("a", "completions", 503, "asleep"), RunError("nonsense"), OSError(5)])
def test_what_cannot_be_mended_ends_the_run(make, error):
    house = House("a")
    house.fails["a"], house.heals = error, False
    queue, _ = make(house)
    with pytest.raises(type(error)) as caught:
        queue(PROMPTS, [], 1)
    assert caught.value is error


def test_a_push_waits_for_what_runs_and_nothing_is_begun_meanwhile_unless_updates_go_in_between(make):
    for in_flight, waits in (("wait", True), ("keep", False)):
        house = House("a")
        queue, _ = make(house, f"rollout.in_flight={in_flight}")
        step(queue, house, 1)
        until(lambda queue=queue: queue._slots.whole == 8)
        house.may["a"].clear()
        step(queue, house, 2)  # four are asked for
        until(lambda house=house: len(house.asked) == 4)
        queue(PROMPTS, [], 3)
        thread = threading.Thread(target=queue.settle)
        thread.start()
        thread.join(0.1)
        assert thread.is_alive() == waits
        house.may["a"].set()
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert len(house.asked) == 4
        queue.release()
        until(lambda queue=queue: queue._slots.whole == 8)
        assert len(house.asked) == 5


def test_a_worker_that_leaves_hands_its_prompts_back_and_one_that_comes_gets_some(make):
    house = House()
    house.may["a"].clear()
    queue, _ = make(house)
    thread = threading.Thread(target=lambda: step(queue, house, 1))
    thread.start()
    until(lambda: len(house.asked) >= 2)
    house.fails["a"] = RemoteError("a", "completions", 0, "it has left")
    house.may["c"] = threading.Event()
    house.may["c"].set()
    house.senders = ["b", "c"]
    house.may["a"].set()
    thread.join(WAIT_S)
    assert not thread.is_alive() and not house.recovered and "a" not in queue._desks
    step(queue, house, 2)
    assert {"b", "c"} <= {name for name, _ in house.asked}


def test_rewards_are_asked_one_after_the_other_and_an_error_in_one_ends_the_run(make):
    inside, most = [], []

    def reward(prompts, answers):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return [1.0] * len(answers)

    house = House()
    queue, _ = make(house, reward=reward)
    for number in (1, 2):
        step(queue, house, number)
    assert max(most) == 1
    queue, _ = make(House(), reward=lambda prompts, answers: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        queue(PROMPTS, [], 1)


def test_too_many_missing_rewards_of_a_step_end_the_run_and_reports_are_of_its_own_groups(make):
    class Failing:
        report = RewardReport(errors=1, error="no answer")

        def __call__(self, prompts, answers):
            return [None, *[1.0] * (len(answers) - 1)]

    queue, record = make(House(), "reward.max_failed=0.5", reward=Failing())
    assert queue(PROMPTS, [], 1)[1].count(None) == 2 and len(record.reports) == 2
    queue, record = make(House(), "reward.max_failed=0.1", reward=Failing())
    with pytest.raises(RunError, match=r"reward.max_failed\): no answer"):
        queue(PROMPTS, [], 1)


def test_groups_without_a_signal_give_their_slots_back_and_too_many_of_them_end_the_run(make):
    house, turns = House(), {text: turn for turn, text in enumerate(map(str, range(8)))}
    odd = lambda prompts, answers: [float(turns[p.text] % 2 and b % 2) for b, p in enumerate(prompts)]  # noqa: E731
    queue, _ = make(house, "algo.dynamic_sampling=3", reward=odd)
    for number in (1, 2, 3):
        rollouts, _ = step(queue, house, number)
        assert all(int(prompt.text) % 2 for prompt in rollouts.prompts) and len(rollouts.prompts) == 4
    queue, _ = make(House(), "algo.dynamic_sampling=3")
    with pytest.raises(RunError, match=r"step 1: of (1[3-9]|2\d) prompts all samples have one reward"):
        queue(PROMPTS, [], 1)


def test_a_checkpoint_has_all_groups_that_are_not_learned_from_and_what_was_being_drawn_is_drawn_again(make, tmp_path):
    house = House("a")
    queue, _ = make(house)
    step(queue, house, 1)
    until(lambda: queue._slots.whole == 8)
    expected = queue(PROMPTS, [], 2)  # those that a step has taken and not released, too
    house.may["a"].clear()
    queue.write(tmp_path, 1)
    slots = Slots(4, 1, queue._slots.total)
    kept.read(tmp_path, True, lambda said: kept.heard_slots(said, slots, PROMPTS))
    assert slots.learned == 4 and [slot.index for slot in slots.held] == list(range(4, 12))
    slots.held[-1].group, slots.held[-1].asked = None, False
    again = House("a")
    other, _ = make(again, slots=slots)
    assert other(PROMPTS, [], 2) == expected
    until(lambda: slots.whole == 4)
    assert again.asked == [("a", [other._stream[11][0].ids[0]])]


@pytest.mark.parametrize("content", [b"", b"\x08" + bytes(15), b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 40])
def test_a_queue_of_a_checkpoint_that_is_none_is_told_in_one_line(tmp_path, content):
    (tmp_path / kept.FILE).write_bytes(content)
    with pytest.raises(RunError, match="has no samples as a run has them") as caught:
        kept.read(tmp_path, True, lambda said: kept.heard_slots(said, Slots(4, 1, 8), PROMPTS))
    assert "\n" not in str(caught.value)


# --- who else brings workers back, and what else goes wrong -----------------------------------------------------------


def test_a_worker_that_an_evaluation_has_brought_back_is_not_taken_for_one_that_cannot_be(make):
    house = House("a")
    queue, _ = make(house, "rollout.in_flight=keep")
    step(queue, house, 1)
    until(lambda: queue._slots.whole == 8)
    house.may["a"].clear()
    step(queue, house, 2)  # four are asked for, and stay away
    house.fails["a"], house.heals = RemoteError("a", "completions", 0, "the connection broke"), False
    house.may["a"].set()
    until(lambda: queue._desks["a"].lost is not None)
    house.elsewhere += 1  # held-out prompts have found it dead, too
    house.fails.clear()
    for number in (3, 4):
        assert len(step(queue, house, number)[0].prompts) == 4
    assert house.recovered == []


def test_after_an_error_nobody_is_asked_for_more(make):
    house, calls = House("a"), []

    def reward(prompts, answers):
        calls.append(1)
        raise OSError("the judge is gone")

    queue, _ = make(house, reward=reward)
    with queue._changed:
        queue._slots.admit()
        queue._feed()
    until(lambda: queue._error is not None)
    time.sleep(0.2)  # the trainer learns meanwhile
    assert len(calls) <= 2 and len(house.asked) <= 2
    with pytest.raises(OSError, match="the judge is gone"):
        queue(PROMPTS, [], 1)


def test_where_no_thread_can_be_had_the_run_ends_and_says_so(make, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    senders = [type("Sender", (), {"name": "worker 0"})()]
    house = House("")
    house.senders = senders
    queue, _ = make(house)
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RunError, match=r"worker 0: no thread for a further request .can't start new thread.: raise"):
        queue(PROMPTS, [], 1)


def test_a_reward_that_fails_is_named_where_groups_without_a_signal_are_left_out(make):
    class Failing:
        report = RewardReport(errors=2, error="the judge does not answer")

        def __call__(self, prompts, answers):
            return [None] * len(answers)

    queue, _ = make(House(), "algo.dynamic_sampling=3", reward=Failing())
    with pytest.raises(RunError, match=r"have no reward .*: the judge does not answer"):
        queue(PROMPTS, [], 1)

    class Sometimes(Failing):
        def __call__(self, prompts, answers):
            return [float(b % 2) if int(prompt.text) % 2 else None for b, prompt in enumerate(prompts)]

    queue, record = make(House(), "algo.dynamic_sampling=3", "reward.max_failed=0.2", reward=Sometimes())
    with pytest.raises(RunError, match=r"have no reward .*: the judge does not answer"):
        queue(PROMPTS, [], 1)
    assert record.reports, "they are counted"


def test_a_long_queue_that_fills_is_no_step_that_leaves_out_too_many(make):
    house = House()
    odd = lambda prompts, answers: [float(int(p.text) % 2 and b % 2) for b, p in enumerate(prompts)]  # noqa: E731
    house.may["a"].clear()  # has the oldest
    queue, _ = make(house, "algo.dynamic_sampling=2", "rollout.ahead.lag=8", "steps=50", reward=odd)
    taken = []
    thread = threading.Thread(target=lambda: taken.append(queue(PROMPTS, [], 1)))
    thread.start()
    until(lambda: queue._slots.whole >= 30)
    assert queue._since.left_out > 8 and queue._error is None
    time.sleep(1.2)  # it looks again
    assert thread.is_alive()
    house.may["a"].set()
    thread.join(WAIT_S)
    assert taken


# --- a run that goes on with other dials ------------------------------------------------------------------------------


def test_with_a_lower_lag_or_other_samples_a_prompt_what_no_longer_fits_is_drawn_anew_in_its_order(make, tmp_path):
    house = House("a")
    queue, _ = make(house, "rollout.ahead.lag=3")
    for number in (1, 2):
        step(queue, house, number)
        until(lambda: queue._slots.whole == 16)
    queue.write(tmp_path, 2)

    def read(lag, samples=2, later=0):
        slots = Slots(4, lag, 400)
        kept.read(tmp_path, True, lambda said: kept.heard_slots(said, slots, PROMPTS, later))
        slots.draw_anew(2 + later, samples)
        return slots

    same, other_numbers, lower, others = read(3), read(3, later=40), read(1), read(3, samples=4)
    assert same.whole == other_numbers.whole == 16 and others.whole == 0
    versions = [[c.versions[0] for slot in each.held for c in slot.group.completions] for each in (same, other_numbers)]
    assert versions[1] == [version + 40 for version in versions[0]] and max(versions[0]) <= 2
    assert [slot.index for slot in lower.held] == list(range(8, 24)) and lower.whole < 16
    assert {slot.index for slot in lower.waiting()} <= set(range(8, 16)), "no more than two steps have slots"
    again = House("a")
    again.version = 2
    goes_on, _ = make(again, slots=lower)
    for number in range(3, 9):
        rollouts, _ = goes_on(PROMPTS, [], number)
        assert rollouts.seeds == [goes_on._stream[index][1] for index in range(4 * number - 4, 4 * number)]
        assert rollouts.lags(again.version).max() <= 1
        again.version += 1
        goes_on.release()


def test_what_the_other_order_has_kept_is_drawn_anew(make, tmp_path):
    house = House("a")
    queue, _ = make(house)
    step(queue, house, 1)
    until(lambda: queue._slots.whole == 8)
    queue.write(tmp_path, 1)
    assert exact.read(tmp_path, PROMPTS) is None
    rollouts, rewards = queue(PROMPTS, [], 2)
    kept.written(tmp_path, kept.told((rollouts, rewards), {id(prompt): place for place, prompt in enumerate(PROMPTS)}))
    assert kept.read(tmp_path, True, lambda said: pytest.fail("it is none of a queue")) is None
