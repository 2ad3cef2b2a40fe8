"""Faults planted in protocol.py and in a session's parts, one at a time: protocol_world.py must notice each of them."""

from collections import Counter
from dataclasses import replace

import hypothesis
import pytest
from protocol_worker import Violation
from protocol_world import run_worlds

from transfer.agreement import protocol
from transfer.agreement.protocol import Do, Event, Init, Refuse, Repeat
from transfer.trainer.fencing import Fence
from transfer.trainer.publication import Publication
from transfer.trainer.takeover import Takeover
from transfer.trainer.two_phase_commit import TwoPhaseCommit
from transfer.trainer.version_order import VersionOrder
from transfer.trainer.withdrawal import Withdrawal

WORLDS = 400
UNTIL_NOTICED = 4000  # worlds at most: the rarest mistake takes about 700
RARE = {  # mistakes that take hundreds of worlds, or long ones
    "a_repeat_does_not_renew_the_lease",
    "after_a_failed_update_the_same_epoch_goes_on",
    "what_a_worker_serves_is_asked_before_it_agrees",
    "a_trainer_that_lost_the_race_for_an_epoch_takes_the_next",
    "a_finish_without_an_answer_counts",
    "a_worker_that_missed_a_finish_stays_behind",
    "a_slot_that_is_served_is_free",
}
MUTANTS = {}


def in_place_of(name, owner=protocol):
    """Plants the decorated function where `owner` has `name`; it gets the genuine one first."""

    def register(mutant):
        MUTANTS[mutant.__name__] = (owner, name, mutant)
        return mutant

    return register


# --- epochs -----------------------------------------------------------------------------------------------------------


@in_place_of("step")
def no_trainer_is_fenced(genuine, state, message, now, lease_s):
    if not isinstance(message, Init):
        message = replace(message, epoch=state.epoch)
    return genuine(state, message, now, lease_s)


@in_place_of("step")
def an_older_trainer_is_not_fenced(genuine, state, message, now, lease_s):
    if not isinstance(message, Init):
        message = replace(message, epoch=max(message.epoch, state.epoch))
    return genuine(state, message, now, lease_s)


@in_place_of("step")
def a_trainer_needs_no_init(genuine, state, message, now, lease_s):
    if isinstance(message, Init) or message.epoch <= state.epoch:
        return genuine(state, message, now, lease_s)
    after, decision = genuine(state, replace(message, epoch=state.epoch), now, lease_s)
    return (after if isinstance(decision, Refuse) else replace(after, epoch=message.epoch)), decision


@in_place_of("_init")
def an_equal_epoch_is_let_in(genuine, state, message):
    return genuine(replace(state, epoch=state.epoch - (message.epoch == state.epoch)), message)


@in_place_of("_init")
def any_epoch_is_let_in(genuine, state, message):
    return genuine(replace(state, epoch=-1), message)


@in_place_of("_init")
def init_keeps_the_stage_of_the_old_trainer(genuine, state, message):
    _, decision = genuine(state, message)
    return (replace(state, epoch=message.epoch) if decision == Do() else state), decision


@in_place_of("_init")
def init_lifts_the_quarantine(genuine, state, message):
    after, decision = genuine(state, message)
    return (replace(after, torn=False) if decision == Do() else after), decision


@in_place_of("_init")
def init_forgets_the_version(genuine, state, message):
    after, decision = genuine(state, message)
    return (replace(after, version=None, digest=None) if decision == Do() else after), decision


# --- versions and digests ---------------------------------------------------------------------------------------------


@in_place_of("_start")
def an_older_version_may_start(genuine, state, message):
    if state.target is None and state.version is not None and message.version < state.version:
        return replace(state, target=message.version, target_digest=message.digest), Do()
    return genuine(state, message)


@in_place_of("_start")
def a_second_update_may_start_before_the_first_has_ended(genuine, state, message):
    after, decision = genuine(protocol._dropped(state), message)
    return (after, decision) if message.version != state.target and decision == Do() else genuine(state, message)


@in_place_of("_start")
def the_live_version_is_staged_again(genuine, state, message):
    after, decision = genuine(state, message)
    if decision == Repeat() and state.target is None:
        return replace(state, target=message.version, target_digest=message.digest), Do()
    return after, decision


@in_place_of("_start")
def a_torn_version_may_come_again_with_another_digest(genuine, state, message):
    if not state.torn or message.version != state.version:
        return genuine(state, message)
    after, decision = genuine(replace(state, digest=message.digest), message)
    return replace(after, digest=state.digest), decision


@in_place_of("_start")
def a_repeated_start_forgets_what_was_staged(genuine, state, message):
    after, decision = genuine(state, message)
    return (replace(after, staged=False) if decision == Repeat() else after), decision


@in_place_of("_repeat_if")
def the_digest_of_a_repeat_is_ignored(genuine, same, version):
    return genuine(True, version)


@in_place_of("_rename")
def an_update_may_be_renamed_to_an_older_version(genuine, state, message):
    after, decision = genuine(replace(state, version=None), message)
    return replace(after, version=state.version), decision


@in_place_of("_rename")
def a_renamed_update_keeps_its_name(genuine, state, message):
    return state, genuine(state, message)[1]


# --- staging and finishing --------------------------------------------------------------------------------------------


@in_place_of("_update")
def update_needs_no_start(genuine, state, message):
    if state.target is None:
        state = replace(state, target=message.version)
    return genuine(state, message)


@in_place_of("_update")
def update_of_another_version_than_was_started(genuine, state, message):
    return genuine(state, message if state.target is None else replace(message, version=state.target))


@in_place_of("_finish")
def finish_when_nothing_was_staged(genuine, state, message):
    return state, genuine(replace(state, staged=True), message)[1]


@in_place_of("_finish")
def finish_of_another_version_than_was_staged(genuine, state, message):
    return genuine(state, message if state.target is None else replace(message, version=state.target))


@in_place_of("_not_under_way")
def a_finish_that_comes_too_late_is_acknowledged(genuine, state, version, verb):
    return Repeat()


@in_place_of("_not_under_way")
def a_repeated_finish_is_refused(genuine, state, version, verb):
    return Refuse("no update is under way")


@in_place_of("reported")
def a_repeated_finish_is_done_again(genuine, state, event):
    after = genuine(state, event)
    if event is Event.FLIPPED:
        after = replace(state, version=after.version, digest=after.digest, torn=False)
    return after


@in_place_of("reported")
def the_label_changes_before_the_weights(genuine, state, event):
    if event is Event.WRITING:
        return replace(state, version=state.target, digest=state.target_digest)
    return genuine(replace(state, torn=True), event)


@in_place_of("reported")
def a_finish_forgets_the_epoch(genuine, state, event):
    after = genuine(state, event)
    return replace(after, epoch=0) if event is Event.FLIPPED else after


@in_place_of("reported")
def a_finish_forgets_the_digest(genuine, state, event):
    after = genuine(state, event)
    return replace(after, digest=None) if event is Event.FLIPPED else after


# --- abort, failure, quarantine ---------------------------------------------------------------------------------------


@in_place_of("_abort")
def the_abort_of_the_live_version_is_confirmed(genuine, state, message):
    after, decision = genuine(state, message)
    return after, Repeat() if isinstance(decision, Refuse) else decision


@in_place_of("_abort")
def abort_drops_another_version(genuine, state, message):
    return genuine(state, message if state.target is None else replace(message, version=state.target))


@in_place_of("_abort")
def abort_leaves_the_stage(genuine, state, message):
    return state, genuine(state, message)[1]


@in_place_of("_abort")
def abort_lifts_the_quarantine(genuine, state, message):
    after, decision = genuine(state, message)
    return (replace(after, torn=False) if decision == Do() else after), decision


@in_place_of("_dropped")
def a_stage_that_ends_lifts_the_quarantine(genuine, state):
    return replace(genuine(state), torn=False)


@in_place_of("reported")
def a_failure_while_weights_are_replaced_goes_back_to_ready(genuine, state, event):
    after = genuine(state, event)
    return replace(after, torn=False) if event is Event.FAILED else after


@in_place_of("reported")
def a_failure_leaves_the_stage(genuine, state, event):
    return state if event is Event.FAILED else genuine(state, event)


@in_place_of("_is_live")
def a_torn_version_counts_as_live(genuine, state, version):
    return state.version == version


# --- withdrawal -------------------------------------------------------------------------------------------------------


@in_place_of("_withdraw")
def a_withdrawn_version_is_served_on(genuine, state, message):
    return state, genuine(state, message)[1]


@in_place_of("_withdraw")
def a_late_withdrawal_hurts_a_newer_version(genuine, state, message):
    if state.version is not None:
        message = replace(message, version=max(message.version, state.version))
    return genuine(state, message)


@in_place_of("_withdraw")
def a_withdrawal_leaves_what_is_staged(genuine, state, message):
    after, decision = genuine(state, message)
    return replace(state, torn=after.torn, withdrawn=after.withdrawn), decision


@in_place_of("_withdraw")
def a_worker_without_weights_forgets_a_withdrawal(genuine, state, message):
    return (state, Repeat()) if state.version is None else genuine(state, message)


@in_place_of("_start")
def a_withdrawn_version_may_come_again(genuine, state, message):
    after, decision = genuine(replace(state, withdrawn=None), message)
    return replace(after, withdrawn=state.withdrawn), decision


@in_place_of("_init")
def a_withdrawal_outlives_its_trainer(genuine, state, message):
    after, decision = genuine(state, message)
    return replace(after, withdrawn=state.withdrawn), decision


@in_place_of("_init")
def init_makes_withdrawn_weights_whole(genuine, state, message):
    after, decision = genuine(state, message)
    return (replace(after, torn=state.torn and state.withdrawn is None) if decision == Do() else after), decision


# --- leases -----------------------------------------------------------------------------------------------------------


@in_place_of("expired")
def a_lease_never_ends(genuine, state, now):
    return state


@in_place_of("expired")
def a_lease_ends_a_moment_late(genuine, state, now):
    return genuine(state, now - 0.001)


@in_place_of("step")
def no_message_renews_the_lease(genuine, state, message, now, lease_s):
    after, decision = genuine(state, message, now, lease_s)
    renewed = state.target is not None and after.target is not None
    return (replace(after, deadline=state.deadline) if renewed else after), decision


@in_place_of("step")
def a_repeat_does_not_renew_the_lease(genuine, state, message, now, lease_s):
    after, decision = genuine(state, message, now, lease_s)
    return (replace(after, deadline=state.deadline) if decision == Repeat() else after), decision


@in_place_of("step")
def a_refused_message_renews_the_lease(genuine, state, message, now, lease_s):
    after, decision = genuine(state, message, now, lease_s)
    return (after if after.target is None else replace(after, deadline=now + lease_s)), decision


@in_place_of("step")
def a_message_after_the_lease_still_finds_the_stage(genuine, state, message, now, lease_s):
    after, decision = genuine(replace(state, deadline=float("inf")), message, now, lease_s)
    return (replace(after, deadline=state.deadline) if isinstance(decision, Refuse) else after), decision


# --- sessions ---------------------------------------------------------------------------------------------------------


@in_place_of("run", TwoPhaseCommit)
def after_a_failed_update_the_same_epoch_goes_on(genuine, commit, members, written):
    try:
        genuine(commit, members, written)
    finally:
        commit.unsure = False


@in_place_of("agree", Fence)
def what_a_worker_serves_is_asked_before_it_agrees(genuine, fence, members):
    status, _ = fence._fleet.ask(members, "status", {})
    failures = genuine(fence, members)
    for member, answer in status.items():
        member.serves, member.newest = answer["version"], answer["newest"]
    return failures


@in_place_of("agree", Fence)
def a_torn_version_is_forgotten(genuine, fence, members):
    failures = genuine(fence, members)
    for member in members:
        member.newest = member.serves
    return failures


@in_place_of("take", Takeover)
def a_replaced_trainer_takes_its_workers_back(genuine, takeover, opening=False):
    fence, fleet = takeover._fence, takeover._fleet
    status, _ = fleet.ask(fleet.members, "status", {})
    fence.epoch = max([fence.epoch, *(answer["epoch"] for answer in status.values())])
    genuine(takeover, opening=True)


@in_place_of("take", Takeover)
def a_trainer_that_lost_the_race_for_an_epoch_takes_the_next(genuine, takeover, opening=False):
    takeover._fence.replaced = False
    genuine(takeover, opening)


@in_place_of("_init")
def any_trainer_is_let_in_with_an_equal_epoch(genuine, state, message):
    return (state, Repeat()) if message.epoch == state.epoch else genuine(state, message)


@in_place_of("_finished_unheard", TwoPhaseCommit)
def a_finish_without_an_answer_counts(genuine, commit, members, version):
    return list(members)


@in_place_of("_catch_up", Takeover)
def a_worker_that_missed_a_finish_stays_behind(genuine, takeover):
    pass


@in_place_of("_tell", Withdrawal)
def a_withdrawal_without_an_answer_counts(genuine, withdrawal, members, version):
    genuine(withdrawal, members, version)
    withdrawal.viewers.clear()
    return {}


@in_place_of("use_up", VersionOrder)
def the_number_of_an_update_that_failed_is_given_again(genuine, versions, version):
    pass


@in_place_of("learn", VersionOrder)
def what_an_earlier_trainer_has_finished_is_not_asked_for(genuine, versions, members):
    pass


@in_place_of("take_back", Publication)
def a_withdrawn_version_is_offered_again(genuine, publication):
    kept = dict(publication._written)
    genuine(publication)
    publication._written = kept


@in_place_of("write", Publication)
def a_slot_that_is_served_is_free(genuine, publication, weights, version, epoch, *told):
    _served, with_digest = told
    return genuine(publication, weights, version, epoch, (), with_digest)


# --- all of them ------------------------------------------------------------------------------------------------------


def run(tally, worlds):
    run_worlds(worlds, tally, derandomize=True, phases=[hypothesis.Phase.generate])


@pytest.mark.slow
def test_the_protocol_as_it_is_survives_the_same_worlds():
    tally = Counter()
    run(tally, WORLDS)
    print(f"{tally['transitions']} transitions")


def test_every_mistake_that_is_called_rare_is_one():
    assert set(MUTANTS) > RARE


@pytest.mark.parametrize(
    "mutant", [pytest.param(name, marks=pytest.mark.slow) if name in RARE else name for name in MUTANTS]
)
def test_the_world_notices(mutant, monkeypatch):
    tally = Counter()
    owner, name, planted = MUTANTS[mutant]
    genuine = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments, **named: planted(genuine, *arguments, **named))
    with pytest.raises(Violation) as noticed:
        run(tally, UNTIL_NOTICED)
    broken = TypeError, AttributeError, NameError
    assert not isinstance(noticed.value.__cause__, broken), "the mutant cannot be called, so that nothing is proved"
    print(f"after {tally['transitions']} transitions: {str(noticed.value).splitlines()[0]}")
