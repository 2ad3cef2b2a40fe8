"""The trainer's half: a session that carries versions to all workers, and the senders that reach them.

    interfaces.py          what a trainer holds, `Transfer`, and what it reaches a worker by, `Sender`
    session.py             the verbs, in order: open, push, withdraw, recover, join, leave, close
    weight_checks.py       what weights must be before a worker is told of them
    version_order.py       which number comes next (the workers' half: agreement/protocol.py)
    publication.py         which versions the backend has written, and still has
    two_phase_commit.py    one version to all workers, or to none: stage, finish, abort
    fencing.py             which of several trainers the workers obey: epochs
    takeover.py            when a session opens, and after a failure: a new epoch, and what each worker serves
    worker_recovery.py     when a worker dies
    membership.py          workers that join a session that is open, and leave it
    withdrawal.py          before the trainer's own memory changes, where workers serve it
    fleet.py               all workers at once: messages in parallel, answers and failures apart
    answers.py             what a worker may answer
    senders/               how a message reaches a worker: a call, HTTP, Ray
    ranks.py               of a trainer of several ranks: the first has the session, the others follow it
    sources.py             weights of trainers that are no plain module
    push_stats.py          what a push moved and took

No bytes of weights move here: backends do that.
"""
