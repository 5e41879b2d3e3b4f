"""vLLM with the plugin against our own model, token for token in fp32, however requests are scheduled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vllm.engines import ROOT, Answer, Tiny, batch, engine, read_answers, reference, staged, wrong

GOLDEN = ROOT / "tests/golden/yuan2-tiny"


@pytest.fixture(scope="module")
def whole(tiny: Tiny) -> Any:
    """Prefill in one piece, no prefix caching."""
    return engine(tiny.directory)


@pytest.fixture(scope="module")
def chunked(tiny: Tiny) -> Any:
    """Prefill in chunks that end anywhere, prefixes cached."""
    return engine(tiny.directory, max_num_batched_tokens=37, enable_prefix_caching=True)


def test_alone(tiny: Tiny, whole: Any) -> None:
    assert not wrong([batch(whole, [prompt])[0] for prompt in tiny.prompts], tiny.answers)


def test_in_a_batch_of_long_and_short_prompts(tiny: Tiny, whole: Any) -> None:
    assert not wrong(batch(whole, tiny.prompts), tiny.answers)


@pytest.mark.parametrize("caching", [False, True], ids=["no prefixes", "prefixes"])
@pytest.mark.parametrize("chunk", [16, 37, 96])
def test_prefill_in_chunks(tiny: Tiny, chunk: int, caching: bool) -> None:
    llm = engine(tiny.directory, max_num_batched_tokens=chunk, enable_prefix_caching=caching)
    assert not wrong(batch(llm, tiny.prompts), tiny.answers)
    if caching:
        assert not wrong(batch(llm, tiny.prompts), tiny.answers)


def test_a_cached_beginning_is_used_and_changes_nothing(tiny: Tiny) -> None:
    llm = engine(tiny.directory, enable_prefix_caching=True, disable_log_stats=False)
    batch(llm, tiny.prompts[-1:])
    assert not wrong(batch(llm, tiny.prompts), tiny.answers)
    hits = {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if "prefix_cache" in metric.name and hasattr(metric, "value")
    }
    assert hits["vllm:prefix_cache_hits"] > 100


def test_requests_that_arrive_while_others_run(tiny: Tiny, whole: Any, chunked: Any) -> None:
    arrivals = {2 * index: [index] for index in range(len(tiny.prompts))}
    for llm in (whole, chunked):
        found = staged(llm, arrivals, tiny.prompts)
        assert len(found) == len(tiny.prompts)
        assert not wrong(found, tiny.answers)


def test_requests_that_are_preempted_and_computed_again(tiny: Tiny) -> None:
    options = {"num_gpu_blocks_override": 40, "disable_log_stats": False}
    llm = engine(tiny.directory, **options)
    assert not wrong(batch(llm, tiny.prompts), tiny.answers)
    preemptions = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert preemptions[0] > 0


def test_cancelled_requests_leave_the_others_right(tiny: Tiny, chunked: Any) -> None:
    everyone = range(len(tiny.prompts))
    found = staged(chunked, {0: everyone}, tiny.prompts, {3: [0, 4, 12], 9: [2, 8, 16]})
    assert not wrong(found, tiny.answers)
    assert {1, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15} <= found.keys()


@settings(max_examples=12, derandomize=True, deadline=None)
@given(data=st.data())
def test_any_schedule_gives_the_same_answers(tiny: Tiny, chunked: Any, data: st.DataObject) -> None:
    """Arrivals, lengths (the prompts differ in them) and cancellations as drawn; slots are used again and
    again."""
    count = len(tiny.prompts)
    steps = st.integers(0, 40)
    plan = data.draw(
        st.dictionaries(st.integers(0, count - 1), st.tuples(steps, st.none() | steps), min_size=1)
    )
    arrivals: dict[int, list[int]] = {}
    cancelled: dict[int, list[int]] = {}
    for index, (arrives, lives) in plan.items():
        arrivals.setdefault(arrives, []).append(index)
        if lives is not None:
            cancelled.setdefault(arrives + 1 + lives, []).append(index)
    found = staged(chunked, arrivals, tiny.prompts, cancelled)
    assert {index for index, (_, lives) in plan.items() if lives is None} <= found.keys()
    assert not wrong(found, tiny.answers)


def test_a_filter_without_its_state_is_found_out(
    tiny: Tiny, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sabotage: were the state zero at each step, these tests would say so."""
    from yuan2_vllm import filter as yuan2_filter

    def forget(x: Any, out: Any, state: Any, slots: Any) -> None:
        out.zero_()

    monkeypatch.setattr(yuan2_filter, "_previous_of_decodes", forget)
    assert len(wrong(batch(whole, tiny.prompts), tiny.answers)) > len(tiny.prompts) // 2


def test_the_published_layout_of_the_golden_model(tmp_path: Path) -> None:
    """Heads of 16, padded; no tokenizer in the directory; weights of the reference implementation."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(GOLDEN / name)
    prompts = [[5, 9, 7], [17] * 40, list(range(100, 229))]
    request = {"model": str(GOLDEN), "prompts": prompts, "length": 16, "tokens": 320}
    expected = read_answers(reference(("answer", request))[0])
    llm = engine(tmp_path, skip_tokenizer_init=True, max_model_len=256)
    assert not wrong(batch(llm, prompts), expected)


def test_rows_without_text_are_never_sampled(tiny: Tiny, whole: Any) -> None:
    from vllm import SamplingParams

    hot = SamplingParams(temperature=2.0, max_tokens=100, ignore_eos=True, seed=3)
    output = whole.generate([{"prompt_token_ids": [300]}], hot, use_tqdm=False)[0].outputs[0]
    assert max(output.token_ids) < tiny.tokens
    assert len(set(output.token_ids)) > 40


def test_answers_differ_between_prompts(tiny: Tiny) -> None:
    """Else equality would prove little."""
    assert len({answer.ids for answer in tiny.answers}) > len(tiny.answers) - 3
    assert all(isinstance(answer, Answer) for answer in tiny.answers)


def test_a_tensor_that_no_yuan_2_has_is_named(whole: Any) -> None:
    def load(model: Any) -> None:
        model.load_weights([("model.layers.0.self_attn.lf_gate.conv3.weight", model.lm_head.weight)])

    with pytest.raises(ValueError, match=r"lf_gate\.conv3\.weight: no such tensor in the Yuan 2.0"):
        whole.apply_model(load)
