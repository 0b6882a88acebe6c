"""Whether a recorded history of one instance is linearizable and nothing of it was lost.

The version in each answer tells the order of the changes, so no search is needed: replaying them
in that order from the initial state must reproduce every answer, every read and the state found
after every restart; and a call that ended before another began must not come after it.
"""

import dataclasses
import math

from faults.model import difference

READS = ("get_state", "eval")


@dataclasses.dataclass
class Call:
    """One call with all its retries. Times are of one clock, in nanoseconds."""

    kind: str                # a change (Model.apply), or one of READS
    begin: int               # when it was first sent
    end: int | None          # when it was answered; None: never, it may have happened or not
    version: int | None      # that the answer told
    seed: int = 0            # of what was sent
    answer: dict = dataclasses.field(default_factory=dict)
    epoch: int = 0           # which life of the server answered
    replayed: bool = False

    @property
    def changes(self):
        return self.kind not in READS

    def __str__(self):
        return (f"{self.kind}(seed {self.seed}) of [{self.begin}, {self.end}] in life {self.epoch}, "
                f"version {self.version}{', replayed' if self.replayed else ''}")


@dataclasses.dataclass
class Restart:
    """The end of one life of the server, and what the next one began with."""

    killed_at: int
    version: int
    state: dict


def check(initial, calls, restarts=(), may_lose_ns=0):
    """What is wrong with the history, a line each; an empty list: nothing.

    initial      the Model before the first call
    calls        all of them, in any order
    restarts     in order; the i-th ends epoch i
    may_lose_ns  a change acknowledged longer than this before a kill must have survived it
    """
    problems = []
    begins = [initial.version] + [restart.version for restart in restarts]
    ends = [restart.version for restart in restarts] + [math.inf]
    for earlier, later in zip(begins, begins[1:]):
        if later < earlier:
            problems.append(f"a restart went back from version {earlier} to {later}")

    answered = [call for call in calls if call.end is not None]
    pending = [call for call in calls if call.end is None and call.changes]
    for call in answered:
        if call.changes and call.version <= begins[call.epoch] and not call.replayed:
            problems.append(f"{call} made a version that was there before")
        if call.version > ends[call.epoch] and call.changes:
            age = restarts[call.epoch].killed_at - call.end
            if age > may_lose_ns:
                problems.append(f"{call} is lost, acknowledged {age / 1e6:.1f} ms before the kill")

    survived = [call for call in answered if call.version <= ends[call.epoch]]
    problems += _order(survived)
    found = [(restart.version, "get_state", 0, restart.state, f"after restart {index + 1}")
             for index, restart in enumerate(restarts)]
    problems += _replay(initial, survived, pending, found)
    return problems


def age_of_lost(calls, restarts):
    """How long before its kill the oldest of the changes that are lost was acknowledged, in ns."""
    return max((restarts[call.epoch].killed_at - call.end for call in calls
                if call.end is not None and call.changes and call.epoch < len(restarts)
                and call.version > restarts[call.epoch].version), default=0)


def _order(calls):
    """Real time: what ended before another began comes before it."""
    problems = []

    def place(call):  # a read of a version comes between its change and the next
        return 2 * call.version + (0 if call.changes else 1)
    by_end = sorted(calls, key=lambda call: call.end)
    latest, ended = None, 0
    for call in sorted(calls, key=lambda call: call.begin):
        while by_end[ended].end < call.begin:
            if latest is None or place(by_end[ended]) > place(latest):
                latest = by_end[ended]
            ended += 1
        if latest is None:
            continue
        if place(call) < place(latest) or (call.changes and place(call) == place(latest)):
            problems.append(f"{call} began after {latest} had ended, and comes before it")
    return problems


def _replay(initial, calls, pending, found):
    problems = []
    changes = {}
    reads = {}
    for call in calls:
        if not call.changes:
            reads.setdefault(call.version, []).append(
                (call.kind, call.seed, call.answer, str(call)))
        elif call.version in changes:
            problems.append(f"{call} and {changes[call.version]} made the same version")
        else:
            changes[call.version] = call
    for version, kind, seed, answer, what in found:
        reads.setdefault(version, []).append((kind, seed, answer, what))
    last = max([initial.version, *changes, *reads])
    problems += _from(initial.copy(), changes, reads, last, pending)
    return problems


def _from(model, changes, reads, last, pending):
    """Replays from `model` to version `last`. Where no answer tells what made a version, one of
    the calls that were never answered did: each is tried."""
    problems = []
    while True:
        for kind, seed, answer, what in reads.get(model.version, ()):
            wrong = difference(answer, model.read(kind, seed))
            if wrong:
                problems.append(f"{what} at version {model.version}: {wrong}")
        if model.version >= last:
            return problems
        call = changes.get(model.version + 1)
        if call is None:
            break
        due = model.apply(call.kind, call.seed, call.answer.get("statistics"))
        wrong = difference(call.answer, due)
        if wrong:
            problems.append(f"{call}: {wrong}")
    if not pending:
        return problems + [f"nobody made version {model.version + 1}"]
    branches = []
    for index, call in enumerate(pending):
        branch = model.copy()
        branch.apply(call.kind, call.seed)
        branches.append(_from(branch, changes, reads, last, pending[:index] + pending[index + 1:]))
        if not branches[-1]:
            break
    return problems + min(branches, key=len)
