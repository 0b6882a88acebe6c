"""The judge is judged: histories that are right pass, and each kind of wrong one is found out."""

import unittest

from faults.history import Call, Restart, check
from faults.model import Model


class Recorder:
    """Makes the history that a right server would give: one call after another, 10 ns each."""

    def __init__(self):
        self.model = Model()
        self.calls = []
        self.now = 0

    def call(self, kind, seed=0, **fields):
        answer = (self.model.apply(kind, seed) if kind not in ("get_state", "eval")
                  else self.model.read(kind, seed))
        call = Call(kind=kind, begin=self.now, end=self.now + 5, version=self.model.version,
                    seed=seed, answer=answer)
        for name, value in fields.items():
            setattr(call, name, value)
        self.now += 10
        self.calls.append(call)
        return call

    def restart(self):
        return Restart(killed_at=self.now, version=self.model.version, state=dict(self.model.state))


class Judged(unittest.TestCase):
    def setUp(self):
        self.right = Recorder()

    def passes(self, restarts=(), **arguments):
        self.assertEqual(check(Model(), self.right.calls, restarts, **arguments), [])

    def fails(self, *words, restarts=(), **arguments):
        problems = check(Model(), self.right.calls, restarts, **arguments)
        self.assertTrue(any(all(word in problem for word in words) for problem in problems),
                        f"{words} not in {problems}")


class Right(Judged):
    def test_one_call_after_another(self):
        for seed in range(20):
            self.right.call("forward", seed)
            self.right.call("eval", seed)
            self.right.call("get_state")
        self.right.call("set_state", 3)
        self.right.call("reset_running_stats")
        self.right.call("forward", 4)
        self.right.call("reset_parameters")
        self.passes()

    def test_calls_at_once_may_come_in_either_order(self):
        first, second = self.right.call("forward", 1), self.right.call("forward", 2)
        first.end = second.end + 10  # version 2 was answered last
        self.passes()
        first.begin, second.begin = second.begin, first.begin
        self.passes()

    def test_a_call_without_an_answer_may_have_happened(self):
        self.right.call("forward", 1)
        self.right.call("forward", 2, end=None, version=None)
        self.right.call("forward", 3)
        self.right.call("set_state", 4, end=None, version=None)
        self.right.call("get_state")
        self.passes()

    def test_a_call_without_an_answer_may_not_have_happened(self):
        self.right.call("forward", 1)
        self.right.calls.append(Call("forward", begin=self.right.now, end=None, version=None, seed=9))
        self.right.call("get_state")
        self.passes()

    def test_a_restart_keeps_all_and_answers_a_retry(self):
        self.right.call("forward", 1)
        made = self.right.call("forward", 2)
        restart = self.right.restart()
        made.end, made.epoch, made.replayed = self.right.now + 3, 1, True
        self.right.call("forward", 3, epoch=1)
        self.passes([restart])

    def test_with_an_interval_the_newest_may_be_lost(self):
        self.right.call("forward", 1)
        restart = self.right.restart()
        kept = self.right.model.copy()
        self.right.call("forward", 2)
        self.right.call("get_state")
        restart.killed_at = self.right.now
        self.right.model = kept
        self.right.call("forward", 3, epoch=1)
        self.passes([restart], may_lose_ns=20)
        self.fails("lost", restarts=[restart], may_lose_ns=5)


class Wrong(Judged):
    def test_a_lost_update(self):
        self.right.call("forward", 1)
        before = self.right.model.copy()
        self.right.call("forward", 2)
        self.right.model.state = before.state  # overwritten by who had read it before
        self.right.call("forward", 3)
        self.fails("forward(seed 3)", "num_batches_tracked")

    def test_two_changes_of_one_version(self):
        self.right.call("forward", 1)
        self.right.model.version -= 1
        self.right.call("forward", 2)
        self.fails("made the same version")

    def test_an_update_lost_from_the_state_alone(self):
        self.right.call("forward", 1)
        read = self.right.call("get_state")
        read.answer = Model().read("get_state", 0)
        self.fails("get_state", "running_mean")

    def test_a_stale_read(self):
        stale = self.right.call("get_state")
        self.right.call("forward", 1)
        stale.begin, stale.end = self.right.now, self.right.now + 5
        self.fails("get_state", "comes before it")

    def test_a_read_that_goes_back_behind_another(self):
        self.right.call("forward", 1, end=1000)
        self.right.call("get_state")
        earlier = Model().read("get_state", 0)
        self.right.calls.append(Call("get_state", self.right.now, self.right.now + 5, 1,
                                     answer=earlier))
        self.fails("get_state", "comes before it")

    def test_a_swapped_order(self):
        first, second = self.right.call("forward", 1), self.right.call("forward", 2)
        first.begin, second.begin = second.begin, first.begin
        first.end, second.end = second.end, first.end
        self.fails("forward", "comes before it")

    def test_a_swapped_order_under_the_right_versions(self):
        first, second = self.right.call("forward", 1), self.right.call("set_state", 2)
        first.version, second.version = second.version, first.version
        self.right.call("get_state")
        self.assertNotEqual(check(Model(), self.right.calls), [])

    def test_a_batch_counted_twice(self):
        self.right.call("forward", 1)
        self.right.model.apply("forward", 1)
        self.right.model.version -= 1
        self.right.call("get_state")
        self.fails("num_batches_tracked")

    def test_a_change_that_nobody_made(self):
        self.right.call("forward", 1)
        self.right.model.apply("forward", 2)
        self.right.call("forward", 3)
        self.fails("nobody made version 3")

    def test_a_call_without_an_answer_that_explains_nothing(self):
        self.right.call("forward", 1)
        self.right.calls.append(Call("forward", begin=self.right.now, end=None, version=None, seed=9))
        self.right.model.apply("forward", 2)
        self.right.call("get_state")
        self.fails("get_state", "running_mean")

    def test_statistics_that_are_not_the_batch_s(self):
        statistics = self.right.call("forward", 1).answer["statistics"]
        statistics["var"] = statistics["var"] * (1 + 1e-9)
        self.fails("var of the batch")

    def test_a_wrong_output(self):
        self.right.call("forward", 1).answer["output"][0, 0, 0, 0] += 1e-3
        self.fails("output is off by")

    def test_an_acknowledged_change_lost_in_a_restart(self):
        self.right.call("forward", 1)
        restart = self.right.restart()
        self.right.call("forward", 2)
        restart.killed_at = self.right.now
        self.fails("is lost", restarts=[restart])

    def test_a_retry_that_is_applied_again_after_a_restart(self):
        made = self.right.call("forward", 1, end=None, version=None)
        restart = self.right.restart()
        self.right.call("forward", 1, epoch=1, begin=made.begin)
        self.right.calls.remove(made)
        self.fails("nobody made version 2", restarts=[restart])

    def test_half_of_one_version_and_half_of_another(self):
        self.right.call("forward", 1)
        before = dict(self.right.model.state)
        self.right.call("forward", 2)
        restart = self.right.restart()
        restart.state["running_var"] = before["running_var"]
        self.fails("after restart 1", "running_var", restarts=[restart])

    def test_a_restart_with_one_bit_off(self):
        self.right.call("forward", 1)
        restart = self.right.restart()
        mean = restart.state["running_mean"].copy()
        mean.view("<u4")[2] ^= 1
        restart.state["running_mean"] = mean
        self.fails("after restart 1", "running_mean", restarts=[restart])

    def test_restarts_that_go_back(self):
        self.right.call("forward", 1)
        old = self.right.restart()
        self.right.call("forward", 2, epoch=0)
        new = self.right.restart()
        self.fails("went back", restarts=[new, old])


if __name__ == "__main__":
    unittest.main()
