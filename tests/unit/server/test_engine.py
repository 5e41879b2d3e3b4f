"""The engine on a real tiny model: caching, fairness, cancelling, failures."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from tests.support.serving import tiny_model
from tests.support.waiting import wait_for
from yuan2_model import load_model
from yuan2_server.engines.builtin.engine import BuiltinEngine
from yuan2_server.engines.builtin.runner import ModelRunner, cached_token_budget
from yuan2_server.engines.builtin.sampler import Sampler
from yuan2_server.engines.builtin.scheduler import Limits
from yuan2_server.protocol import ErrorCode, RequestError
from yuan2_server.sequence import Embedding, SampledToken, SamplingParams, Sequence

VOCABULARY = 420


class Recorder:
    """Remembers what a sequence's sink is told; may want to stop, or fail."""

    def __init__(self, stop_after: int | None = None, log: list[object] | None = None) -> None:
        self.tokens: list[int] = []
        self.reason: str | None = None
        self.error: RequestError | None = None
        self.done = threading.Event()
        self._stop_after = stop_after
        self._log = log if log is not None else []

    def accept(self, token: SampledToken) -> bool:
        self.tokens.append(token.token_id)
        self._log.append(self)
        return len(self.tokens) == self._stop_after

    def finish(self, reason: str) -> None:
        self.reason = reason
        self.done.set()

    def fail(self, error: RequestError) -> None:
        self.error = error
        self.done.set()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    directory: Path = tmp_path_factory.mktemp("model")
    tiny_model(directory, endless=True, context=4096)
    return load_model(directory, dtype=torch.float32).eval()


def engine_of(model, **limits) -> tuple[BuiltinEngine, ModelRunner]:
    runner = ModelRunner(model)
    limits = {"max_sequences": 8, "max_cached_tokens": 100_000, **limits}
    return BuiltinEngine(runner, Sampler(VOCABULARY), Limits(**limits)), runner


def sequence(prompt: list[int], sink: Recorder, count: int = 8, **params) -> Sequence:
    return Sequence(tuple(prompt), SamplingParams(count, **{"temperature": 0, **params}), sink)


def argmax_loop(model, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :VOCABULARY]
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def drain(engine: BuiltinEngine) -> None:
    """Let a fresh engine, which has its commands in order, work until nothing is left."""
    engine.start()
    wait_for("an idle engine", lambda: engine.load == 0, every=0.005)
    engine.close()


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_interleaved_chunked_generation_equals_a_plain_argmax_loop(model, chunk: int):
    engine, runner = engine_of(model, prefill_chunk=chunk)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [300, 301], [17]]
    sinks = [Recorder() for _ in prompts]
    for prompt, sink in zip(prompts, sinks, strict=True):
        engine.submit(sequence(prompt, sink))
    drain(engine)
    assert [sink.tokens for sink in sinks] == [argmax_loop(model, prompt, 8) for prompt in prompts]
    assert {sink.reason for sink in sinks} == {"length"}
    assert (engine.load, runner.cached_sequences) == (0, 0)


def test_requests_take_turns(model):
    engine, _ = engine_of(model)
    log: list[object] = []
    long, short = Recorder(log=log), Recorder(log=log)
    engine.submit(sequence([5, 6], long, count=20))
    engine.submit(sequence([7, 8], short, count=3))
    drain(engine)
    assert log.index(short) <= 1
    assert len([entry for entry in log[: log.index(short) + 6] if entry is short]) == 3


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(model):
    engine, _ = engine_of(model)
    expected = argmax_loop(model, [5, 6], 8)
    stop = expected[3]
    sink = Recorder()
    engine.submit(sequence([5, 6], sink, stop_token_ids=frozenset({stop})))
    drain(engine)
    assert sink.tokens == expected[: expected.index(stop)]
    assert sink.reason == "stop"


def test_a_sink_that_has_enough_ends_the_answer(model):
    engine, _ = engine_of(model)
    sink = Recorder(stop_after=2)
    engine.submit(sequence([5, 6], sink))
    drain(engine)
    assert (len(sink.tokens), sink.reason) == (2, "stop")


def test_a_cancelled_sequence_is_gone_within_a_step(model):
    engine, runner = engine_of(model)
    sink = Recorder()
    one = sequence([5, 6], sink, count=4000)
    engine.start()
    engine.submit(one)
    wait_for("a first token", lambda: sink.tokens, every=0.001)
    engine.cancel(one)
    wait_for("an empty engine", lambda: engine.load == 0, every=0.001)
    # Whatever comes next, its step is the first one without the cancelled sequence.
    seen, next_one = len(sink.tokens), Recorder()
    engine.submit(sequence([7], next_one, count=3))
    assert next_one.done.wait(30)
    assert len(sink.tokens) == seen
    assert not sink.done.is_set()
    wait_for("an empty engine", lambda: engine.load == 0, every=0.001)
    assert runner.cached_sequences == 0
    engine.close()


def test_one_more_than_the_queue_takes_is_refused_at_once(model):
    engine, _ = engine_of(model, max_sequences=1)
    engine.submit(sequence([5], Recorder()))
    with pytest.raises(RequestError) as raised:
        engine.submit(sequence([5], Recorder()))
    assert raised.value.code == ErrorCode.RATE_LIMIT
    drain(engine)


def test_a_failing_request_does_not_end_the_others(model):
    class Broken(Recorder):
        def accept(self, token: SampledToken) -> bool:
            raise ZeroDivisionError

    engine, runner = engine_of(model)
    broken, fine = Broken(), Recorder()
    engine.submit(sequence([5, 6], broken))
    engine.submit(sequence([5, 6], fine))
    drain(engine)
    assert broken.error is not None
    assert broken.error.code == ErrorCode.INTERNAL_ERROR
    assert "ZeroDivisionError" in broken.error.message
    assert fine.tokens == argmax_loop(model, [5, 6], 8)
    assert (engine.load, runner.cached_sequences) == (0, 0)


def test_running_out_of_memory_is_told_as_that(model, monkeypatch: pytest.MonkeyPatch):
    runner = ModelRunner(model)
    engine = BuiltinEngine(runner, Sampler(VOCABULARY), Limits(8, 1000))
    real = model.model.forward

    def forward(*, input_ids, **others):
        if input_ids.shape[1] > 100:
            raise torch.cuda.OutOfMemoryError
        return real(input_ids=input_ids, **others)

    monkeypatch.setattr(model.model, "forward", forward)
    large, small = Recorder(), Recorder()
    engine.submit(sequence([5] * 200, large))
    engine.submit(sequence([5], small))
    drain(engine)
    assert large.error is not None
    assert large.error.code == ErrorCode.CUDA_OUT_OF_MEMORY
    assert small.reason == "length"


def test_closing_fails_what_is_unfinished(model):
    engine, _ = engine_of(model)
    engine.start()
    sink = Recorder()
    engine.submit(sequence([5], sink, count=4000))
    engine.close()
    assert sink.error is not None
    assert sink.error.code == ErrorCode.ENGINE_OVERLOADED
    assert engine.problem == "the engine has stopped"
    with pytest.raises(RequestError):
        engine.submit(sequence([5], Recorder()))


def test_caches_that_grow_into_the_limit_cost_the_youngest_its_turn_and_no_token(model):
    """Without a limit of their own, three answers start at once; there is room for one and a half."""
    engine, runner = engine_of(model, max_cached_tokens=150)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [300, 301], [17]]
    sinks = [Recorder() for _ in prompts]
    for prompt, sink in zip(prompts, sinks, strict=True):
        engine.submit(sequence(prompt, sink, count=120))
    drain(engine)
    assert [sink.tokens for sink in sinks] == [argmax_loop(model, prompt, 120) for prompt in prompts]
    assert runner.cached_sequences == 0


class Vectors:
    """Remembers what an embedding's sink is told."""

    def __init__(self, log: list[object] | None = None) -> None:
        self.vectors: list[list[float]] | None = None
        self.error: RequestError | None = None
        self._log = log if log is not None else []

    def finish(self, vectors: list[list[float]]) -> None:
        self.vectors = vectors
        self._log.append(self)

    def fail(self, error: RequestError) -> None:
        self.error = error


@pytest.mark.parametrize("chunk", [2, 512])
def test_embeddings_are_the_means_of_the_last_hidden_states(model, chunk: int):
    texts = [[5, 6, 7], [300, 301, 302, 303, 9], [17]]
    engine, runner = engine_of(model, prefill_chunk=chunk)
    sink = Vectors()
    engine.submit(Embedding(tuple(map(tuple, texts)), sink))
    drain(engine)
    for ids, vector in zip(texts, sink.vectors, strict=True):
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        assert torch.allclose(torch.tensor(vector), expected, atol=1e-6)
    assert runner.cached_sequences == 0


def test_embeddings_take_turns_with_answers_and_count_in_the_queue(model):
    engine, _ = engine_of(model, prefill_chunk=4, max_sequences=3)
    log: list[object] = []
    answer = Recorder(log=log)
    bulks = [Vectors(log), Vectors(log)]
    engine.submit(sequence([5, 6], answer, count=20))
    for bulk in bulks:
        engine.submit(Embedding(tuple((7,) * 40 for _ in range(10)), bulk))
    with pytest.raises(RequestError) as raised:
        engine.submit(sequence([5], Recorder()))
    assert raised.value.code == ErrorCode.RATE_LIMIT
    drain(engine)
    # 200 chunks of texts and 20 tokens in turns: the answer is complete long before the vectors are.
    assert log == [answer] * 20 + bulks


def test_an_embedding_that_is_given_up_is_gone(model):
    engine, runner = engine_of(model, prefill_chunk=1)
    job, sink = Embedding(((5,) * 4000,), Vectors()), Recorder()
    engine.start()
    engine.submit(job)
    engine.submit(sequence([7], sink, count=3))
    assert sink.done.wait(30)
    engine.cancel(job)
    wait_for("an empty engine", lambda: engine.load == 0, every=0.001)
    assert runner.cached_sequences == 0
    engine.close()


def test_an_error_that_sticks_ends_the_engine_with_its_reason(model, monkeypatch: pytest.MonkeyPatch):
    engine, _ = engine_of(model)
    engine.start()
    first = Recorder()
    engine.submit(sequence([5], first))
    assert first.done.wait(30)
    assert engine.problem == ""

    def forward(**_):
        raise RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(model.model, "forward", forward)
    failed = Recorder()
    engine.submit(sequence([5, 6], failed))
    assert failed.done.wait(30)
    wait_for("the engine's end", lambda: engine.problem, every=0.005)
    assert engine.problem == (
        "the model fails even for a single token: RuntimeError: CUDA error: device-side assert triggered"
    )
    with pytest.raises(RequestError) as raised:
        engine.submit(sequence([5], Recorder()))
    assert raised.value.code == ErrorCode.ENGINE_OVERLOADED
    engine.close()


def test_a_step_that_hangs_is_noticed(model, monkeypatch: pytest.MonkeyPatch):
    now, release = [0.0], threading.Event()
    engine = BuiltinEngine(ModelRunner(model), Sampler(VOCABULARY), Limits(8, 1000), 60.0, lambda: now[0])
    entered = threading.Event()
    real = model.model.forward

    def forward(**arguments):
        entered.set()
        release.wait(60)
        return real(**arguments)

    monkeypatch.setattr(model.model, "forward", forward)
    engine.start()
    sink = Recorder()
    engine.submit(sequence([5, 6], sink, count=2))
    assert entered.wait(30)
    now[0] = 59.0
    assert engine.problem == ""
    now[0] = 61.0
    assert engine.problem == "a step has been running for 61 s: it hangs"
    with pytest.raises(RequestError):
        engine.submit(sequence([5], Recorder()))
    release.set()
    assert sink.done.wait(30)
    wait_for("an idle engine", lambda: engine.problem == "", every=0.005)
    engine.close()


def test_the_budget_of_the_caches_follows_the_free_memory(model):
    # 2 layers, hidden size 32, fp32: 512 bytes a token.
    assert cached_token_budget(model, "cpu") > 1_000_000
