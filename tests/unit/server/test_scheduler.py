"""Which sequence runs next: order of arrival, turns, room in the caches."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from yuan2_server.engines.builtin.scheduler import HEADROOM, Limits, Scheduler
from yuan2_server.sequence import SampledToken, SamplingParams, Sequence


class Sink:
    """Takes tokens and wants more."""

    def accept(self, token: SampledToken) -> bool:
        return False

    def finish(self, reason: str) -> None:
        pass

    def fail(self, error: Exception) -> None:
        pass


def sequence(prompt: int = 4, longest_answer: int = 4) -> Sequence:
    return Sequence(tuple(range(prompt)), SamplingParams(max_new_tokens=longest_answer), Sink())


def run(scheduler: Scheduler) -> list[tuple[Sequence, int, int]]:
    """One step, as the engine does it, with token 1 for an answer."""
    scheduler.evict()
    work = scheduler.schedule()
    for piece in work:
        samples = piece.is_last
        piece.sequence.computed = piece.end
        if samples and piece.sequence.append(SampledToken(1)):
            scheduler.remove(piece.sequence)
    return [(piece.sequence, piece.start, piece.end) for piece in work]


def test_nothing_to_do_is_no_work():
    assert Scheduler(Limits(4, 100)).schedule() == ()


def test_a_prompt_is_run_in_chunks_and_only_its_end_is_sampled():
    scheduler = Scheduler(Limits(4, 100, prefill_chunk=4))
    one = sequence(prompt=10, longest_answer=2)
    scheduler.add(one)
    assert [run(scheduler) for _ in range(4)] == [
        [(one, 0, 4)],
        [(one, 4, 8)],
        [(one, 8, 10)],
        [(one, 10, 11)],
    ]
    assert one.output_ids == [1, 1]
    assert len(scheduler) == 0


def test_running_sequences_take_turns_and_a_newcomer_is_next():
    scheduler = Scheduler(Limits(4, 100))
    one, two, three = sequence(), sequence(), sequence()
    scheduler.add(one)
    assert run(scheduler)[0][0] is one
    scheduler.add(two)
    order = [run(scheduler)[0][0] for _ in range(4)]
    assert order == [two, one, two, one]
    scheduler.add(three)
    assert run(scheduler)[0][0] is three


def test_a_sequence_waits_until_its_cache_fits_and_one_always_runs():
    scheduler = Scheduler(Limits(4, max_cached_tokens=10))
    one, two = sequence(4, 20), sequence(4, 4)
    scheduler.add(one)
    scheduler.add(two)
    assert {run(scheduler)[0][0] for _ in range(3)} == {one}
    scheduler.remove(one)
    assert run(scheduler)[0][0] is two


def test_caches_that_fit_to_the_token_run_together():
    scheduler = Scheduler(Limits(4, max_cached_tokens=20))
    one, two, three = sequence(4, 6), sequence(4, 6), sequence(1, 1)
    for arrival in (one, two, three):
        scheduler.add(arrival)
    run(scheduler)
    assert (scheduler.running, scheduler.cached_tokens) == ((two, one), 20)


def test_a_sequence_that_outgrows_all_caches_alone_keeps_its_own():
    scheduler = Scheduler(Limits(4, max_cached_tokens=10))
    one = sequence(20, 20)
    scheduler.add(one)
    run(scheduler)
    assert scheduler.evict() == []
    assert one.computed == 20


def test_newcomers_run_in_the_order_of_their_arrival():
    scheduler = Scheduler(Limits(4, 100))
    arrivals = [sequence() for _ in range(3)]
    for one in arrivals:
        scheduler.add(one)
    assert [run(scheduler)[0][0] for _ in range(3)] == arrivals


def test_an_answer_without_a_limit_reserves_what_it_has_and_a_little_more():
    scheduler = Scheduler(Limits(4, max_cached_tokens=4000))
    one, two = sequence(10, 4000), sequence(10, 4000)
    scheduler.add(one)
    scheduler.add(two)
    assert {run(scheduler)[0][0] for _ in range(2)} == {one, two}
    assert scheduler.cached_tokens == 2 * (10 + HEADROOM + 1)


def test_when_caches_have_grown_the_youngest_waits_and_runs_again_from_its_beginning():
    scheduler = Scheduler(Limits(4, max_cached_tokens=200))
    old, young = sequence(10, 400), sequence(10, 400)
    scheduler.add(old)
    scheduler.add(young)
    while not (evicted := scheduler.evict()):
        run(scheduler)
    assert evicted == [young]
    assert (young.computed, len(young.output_ids) > 0) == (0, True)
    assert {run(scheduler)[0][0] for _ in range(5)} == {old}
    scheduler.remove(old)
    assert run(scheduler) == [(young, 0, young.length - 1)]


def test_slices_cross_the_border_of_prompt_and_answer():
    one = sequence(prompt=3)
    one.output_ids += [7, 8]
    assert one.tokens(1, 5) == [1, 2, 7, 8]
    assert one.tokens(0, 2) == [0, 1]
    assert one.tokens(4, 5) == [8]


class Life(RuleBasedStateMachine):
    """Sequences come, run and leave in any order; nothing is lost, overtaken or run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(Limits(6, max_cached_tokens=30, prefill_chunk=3))
        self.alive: list[Sequence] = []

    @precondition(lambda self: len(self.alive) < 6)
    @rule(prompt=st.integers(1, 12), answer=st.integers(1, 12))
    def arrive(self, prompt: int, answer: int) -> None:
        one = sequence(prompt, answer)
        self.scheduler.add(one)
        self.alive.append(one)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.alive))
        assert self.scheduler.remove(one)
        assert not self.scheduler.remove(one)
        self.alive.remove(one)

    @precondition(lambda self: self.alive)
    @rule()
    def step(self) -> None:
        [(one, start, end)] = run(self.scheduler)
        assert one in self.alive
        assert start < end <= start + 3
        if len(one.output_ids) == one.params.max_new_tokens:
            self.alive.remove(one)

    @precondition(lambda self: self.alive)
    @rule()
    def everybody_runs_within_a_round(self) -> None:
        running = self.scheduler.running
        ran = {piece[0] for _ in range(len(running) + len(self.alive)) for piece in run(self.scheduler)}
        assert set(running) <= ran
        self.alive = [one for one in self.alive if len(one.output_ids) < one.params.max_new_tokens]

    @invariant()
    def all_are_there_and_caches_fit(self) -> None:
        assert set(self.scheduler.all()) == set(self.alive)
        assert len(self.scheduler) == len(self.alive)
        # One step may go beyond, by a token; the next one evicts first.
        assert len(self.scheduler.running) <= 1 or self.scheduler.cached_tokens <= 31
        waiting = [one for one in self.scheduler.all() if one not in self.scheduler.running]
        assert [one.id for one in waiting] == sorted(one.id for one in waiting)
        oldest = min((one.id for one in self.alive), default=0)
        assert not self.scheduler.running or oldest in [one.id for one in self.scheduler.running]
        assert not any(one.computed for one in waiting)


Life.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestLife = Life.TestCase
