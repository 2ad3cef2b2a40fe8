from collections import Counter

import pytest
from protocol_world import run_worlds

from transfer.agreement.protocol import (
    Abort,
    Do,
    Event,
    Finish,
    Init,
    Phase,
    Refuse,
    Rename,
    Repeat,
    Start,
    State,
    Update,
    Withdraw,
    expired,
    reported,
    step,
)

LEASE_S = 10.0


def after(*messages, state=None, now=0.0):
    """The state after messages that must all be carried out, finish included."""
    state = state or State()
    for message in messages:
        state, decision = step(state, message, now, LEASE_S)
        assert decision == Do(), (message, decision)
        if isinstance(message, Finish):
            state = reported(reported(state, Event.WRITING), Event.FLIPPED)
    return state


def update(epoch, version, digest=None):
    return Start(epoch, version, digest), Update(epoch, version), Finish(epoch, version)


def refused(state, message, match, now=0.0):
    then, decision = step(state, message, now, LEASE_S)
    assert isinstance(decision, Refuse) and match in decision.reason, decision
    assert then == state


def repeated(state, message):
    then, decision = step(state, message, 0.0, LEASE_S)
    assert decision == Repeat() and then == state


READY = after(Init(1, "t"), *update(1, 0, "x"))
STAGED = after(Start(1, 1, "y"), Update(1, 1), state=READY)


def test_a_new_worker_serves_nothing_until_its_first_finish():
    state = after(Init(1, "t"), Start(1, 0), Update(1, 0))
    assert (State().phase, state.phase, state.serves) == (Phase.EMPTY, Phase.STAGING, None)
    assert (READY.phase, READY.serves) == (Phase.READY, 0)


def test_while_staging_the_old_version_is_served():
    assert (STAGED.phase, STAGED.serves) == (Phase.STAGING, 0)


def test_finish_without_staged_weights_is_refused():
    refused(after(Start(1, 1), state=READY), Finish(1, 1), "none of its weights were staged")


def test_finish_of_another_version_than_the_staged_one_is_refused():
    refused(STAGED, Finish(1, 2), "the update to 1 is under way")


@pytest.mark.parametrize(
    "message",
    [
        *(Start(1, 1), Update(1, 1), Finish(1, 1), Abort(1, 1), Rename(1, 5), Withdraw(1, 1)),
        *(Init(1, "t"), Init(2, "u")),
    ],
)
def test_an_older_trainer_is_refused_whatever_it_says(message):
    refused(after(Init(2, "t"), state=STAGED), message, "epoch")


@pytest.mark.parametrize("message", [Start(2, 1), Update(2, 1), Finish(2, 1), Abort(2, 1), Withdraw(2, 1)])
def test_a_trainer_that_did_not_initialise_is_refused(message):
    refused(STAGED, message, "epoch 2 is not initialised here")


def test_two_trainers_cannot_take_the_same_epoch():
    refused(READY, Init(1, "u"), "epoch 1 is taken; the next trainer's is at least 2")


def test_a_trainer_that_says_twice_that_it_takes_over_is_answered_twice():
    repeated(STAGED, Init(1, "t"))


def test_a_new_trainer_drops_the_stage_of_the_old_one():
    state = after(Init(2, "t"), state=STAGED)
    assert (state.phase, state.serves, state.target) == (Phase.READY, 0, None)


def test_versions_never_go_back():
    state = after(*update(1, 5), state=READY)
    refused(state, Start(1, 4), "version 4 is older than 5")


def test_versions_may_leave_numbers_out():
    assert after(*update(1, 7), state=READY).serves == 7


@pytest.mark.parametrize("message", [Start(1, 0, "x"), Update(1, 0), Finish(1, 0)])
def test_a_message_about_the_live_version_is_a_repeat(message):
    repeated(READY, message)


def test_the_live_version_with_another_digest_is_a_conflict():
    refused(READY, Start(1, 0, "z"), "another digest")
    refused(READY, Start(1, 0), "another digest")


def test_a_repeated_start_is_a_repeat_only_with_its_own_digest():
    assert step(STAGED, Start(1, 1, "y"), 0.0, LEASE_S) == (STAGED, Repeat())
    refused(STAGED, Start(1, 1, "z"), "another digest")


def test_a_second_update_cannot_start_before_the_first_has_ended():
    refused(STAGED, Start(1, 2), "abort it before starting 2")


def test_a_repeated_update_stages_again():
    assert after(Update(1, 1), state=STAGED) == STAGED


def test_abort_goes_back_to_the_old_version_and_may_be_repeated():
    state = after(Abort(1, 1), state=STAGED)
    assert state == READY
    repeated(state, Abort(1, 1))


def test_abort_of_the_live_version_is_refused():
    refused(READY, Abort(1, 0), "live already")


def test_abort_of_another_version_leaves_the_stage_alone():
    assert step(STAGED, Abort(1, 9), 0.0, LEASE_S) == (STAGED, Repeat())


def test_after_abort_the_finish_that_was_on_its_way_is_refused():
    refused(after(Abort(1, 1), state=STAGED), Finish(1, 1), "no update is under way")


def test_a_stage_ends_with_its_lease_and_every_message_renews_it():
    state = after(Start(1, 1), state=READY, now=0.0)
    assert expired(state, 9.9).target == 1
    state = after(Update(1, 1), state=state, now=9.0)
    assert expired(state, 18.9).target == 1
    assert expired(state, 19.0) == READY
    _, decision = step(state, Finish(1, 1), 19.0, LEASE_S)
    assert isinstance(decision, Refuse)


def test_a_failure_while_staging_leaves_the_old_version():
    assert reported(STAGED, Event.FAILED) == READY


def test_a_failure_while_weights_are_replaced_quarantines_until_a_verified_finish():
    torn = reported(reported(STAGED, Event.WRITING), Event.FAILED)
    assert (torn.phase, torn.serves) == (Phase.QUARANTINED, None)
    restaged = after(Start(1, 1), Update(1, 1), state=torn)
    assert (restaged.phase, restaged.serves) == (Phase.QUARANTINED, None)
    assert after(Finish(1, 1), state=restaged).serves == 1
    assert after(*update(1, 0, "x"), state=torn).serves == 0, "the version that was torn may come again"
    refused(torn, Start(1, 0, "z"), "another digest")


def test_a_quarantined_worker_stays_so_when_its_next_update_is_aborted():
    torn = reported(reported(STAGED, Event.WRITING), Event.FAILED)
    assert after(Start(1, 2), Update(1, 2), Abort(1, 2), state=torn).phase is Phase.QUARANTINED


WITHDRAWN = after(Withdraw(1, 0), state=READY)


def test_a_version_that_is_withdrawn_is_served_no_more_and_only_a_newer_one_comes_after_it():
    assert (WITHDRAWN.phase, WITHDRAWN.serves, WITHDRAWN.version) == (Phase.QUARANTINED, None, 0)
    repeated(WITHDRAWN, Withdraw(1, 0))
    assert after(*update(1, 1), state=WITHDRAWN).serves == 1


@pytest.mark.parametrize("digest", ["x", None])
def test_a_version_that_was_withdrawn_does_not_come_again_though_its_digest_is_the_same(digest):
    state = after(Init(1, "t"), *update(1, 0, digest), Withdraw(1, 0))
    refused(state, Start(1, 0, digest), "version 0 was withdrawn: its memory has changed")
    assert after(Init(2, "u"), state=state).serves is None


@pytest.mark.parametrize("message", [Update(1, 0), Finish(1, 0)])
def test_late_messages_about_a_withdrawn_version_are_no_repeats(message):
    refused(WITHDRAWN, message, "no update is under way")


def test_a_withdrawal_drops_what_is_staged_of_its_version_and_leaves_what_is_newer():
    assert after(Withdraw(1, 1), state=STAGED).target is None
    kept = after(Withdraw(1, 0), state=STAGED)
    assert (kept.target, kept.staged, kept.serves) == (1, True, None)
    assert after(Finish(1, 1), state=kept).serves == 1


def test_a_withdrawal_that_comes_late_changes_nothing_in_a_newer_version():
    state = after(*update(1, 1), state=WITHDRAWN)
    repeated(state, Withdraw(1, 0))
    staging = after(Start(1, 2), Update(1, 2), state=state)
    assert step(staging, Withdraw(1, 0), 0.0, LEASE_S) == (staging, Repeat())


def test_a_worker_that_holds_nothing_yet_takes_no_withdrawn_version_from_a_late_message():
    state = after(Init(1, "t"), Withdraw(1, 3))
    assert (state.phase, state.serves) == (Phase.EMPTY, None)
    refused(state, Start(1, 3), "version 3 was withdrawn")
    assert after(*update(1, 4), state=state).serves == 4
    assert after(Init(2, "u"), *update(2, 0), state=state).serves == 0, "of another trainer's memory"


def test_torn_weights_that_are_withdrawn_do_not_come_again_either():
    torn = reported(reported(STAGED, Event.WRITING), Event.FAILED)
    assert after(Start(1, 0, "x"), state=torn).target == 0
    refused(after(Withdraw(1, 0), state=torn), Start(1, 0, "x"), "version 0 was withdrawn")


def test_a_one_shot_update_may_be_named_when_it_finishes():
    state = after(Start(0, 0), Update(0, 0), Rename(0, 42), Finish(0, 42))
    assert state.serves == 42
    refused(after(Start(0, 43), state=state), Rename(0, 42), "not newer than 42")
    refused(state, Rename(0, 50), "no update is under way")


# --- any history: protocol_world.py -----------------------------------------------------------------------------------

ANSWERS = {  # what each message meets in each phase, a wrong epoch left out
    "empty": {
        Init: [Do, Repeat, Refuse],
        Start: [Do, Refuse],
        Update: [Refuse],
        Finish: [Refuse],
        Abort: [Repeat],
        Rename: [Refuse],
        Withdraw: [Do, Repeat],
    },
    "staging": {
        Init: [Do, Repeat, Refuse],
        Start: [Repeat, Refuse],
        Update: [Do, Refuse],
        Finish: [Do, Refuse],
        Abort: [Do, Repeat, Refuse],
        Rename: [Do, Refuse],
        Withdraw: [Do, Repeat],
    },
    "ready": {
        Init: [Do, Repeat, Refuse],
        Start: [Do, Repeat, Refuse],
        Update: [Repeat, Refuse],
        Finish: [Repeat, Refuse],
        Abort: [Repeat, Refuse],
        Rename: [Repeat, Refuse],
        Withdraw: [Do, Repeat],
    },
    "quarantined": {
        Init: [Do, Repeat, Refuse],
        Start: [Do, Repeat, Refuse],
        Update: [Do, Refuse],
        Finish: [Do, Refuse],
        Abort: [Do, Repeat],
        Rename: [Do, Refuse],
        Withdraw: [Do, Repeat],
    },
}
HAPPENED = ("pushed", "failed", "rejoin", "finished unheard", "lease ended", "torn", "withdraw", "changed")


def test_in_any_history_no_worker_serves_what_it_must_not():
    tally = Counter()
    run_worlds(120, tally)
    print(f"{tally['transitions']} checked transitions")
    assert tally["transitions"] >= 20_000


@pytest.mark.slow
@pytest.mark.timeout(600)  # for hypothesis to shorten the story of a failure
def test_in_200_000_transitions_no_worker_serves_what_it_must_not():
    tally = Counter()
    run_worlds(900, tally, derandomize=True)
    print(f"{tally['transitions']} checked transitions")
    assert tally["transitions"] >= 200_000
    expected = {
        (phase, message.__name__, answer)
        for phase, answers in ANSWERS.items()
        for message, decisions in answers.items()
        for answer in ["fenced"] * (message is not Init) + [decision.__name__ for decision in decisions]
    }
    assert {met for met in tally if isinstance(met, tuple) and met[2]} == expected
    for what in [*expected, *HAPPENED]:
        assert tally[what] >= 20, what
