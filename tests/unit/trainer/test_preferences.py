"""DPO, ORPO and KTO: data, losses and gradients, against the papers' formulae over whole logits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.support.preferences import dpo_of_the_paper, kto_of_the_paper, orpo_of_the_paper, pairs
from tests.support.training import write_model
from yuan2_core.contract import DatasetLocation
from yuan2_core.errors import DatasetError
from yuan2_core.preferences import CHOSEN, REJECTED
from yuan2_core.sections import DPO, KTO, ORPO, Objective, Training
from yuan2_core.tokenizer import Yuan2Tokenizer
from yuan2_model import Yuan2ForCausalLM, load_model
from yuan2_trainer.data.comparisons import MISMATCHED
from yuan2_trainer.data.prepare import prepare
from yuan2_trainer.data.store import SampleStore
from yuan2_trainer.train.preferences import PreferenceStepper

COUNT = 6
PAGE = Path(__file__).resolve().parents[3] / "docs/preference-training.md"
EXAMPLES = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith('{"')]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Yuan2Tokenizer:
    return Yuan2Tokenizer.from_pretrained(directory)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def store_of(
    records: list[dict[str, Any]], objective: Objective, tokenizer: Yuan2Tokenizer, root: Path, **fields: Any
) -> SampleStore:
    path = root / "data.json"
    path.write_text(json.dumps(records), "utf-8")
    location = DatasetLocation.model_validate({"path": str(path), **fields})
    prepare(location, Training(max_length=96), tokenizer, root / "store", lambda: None, None, objective)
    return SampleStore.open(root / "store")


def singles() -> list[dict[str, Any]]:
    return [
        {"prompt": record["conversations"][-1]["value"], "completion": answer["value"], "label": good}
        for number, record in enumerate(pairs(COUNT))
        for answer, good in [(record["chosen"], True) if number % 2 else (record["rejected"], False)]
    ]


def one_by_one(model: Yuan2ForCausalLM, store: SampleStore) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each sample's answer, alone in its row and over whole logits; and its tokens."""
    sums, counts = [], []
    for index in range(len(store)):
        tokens, labels = (torch.tensor(part.astype(np.int64)) for part in store.sample(index))
        log_probabilities = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
        learned = labels[1:] >= 0
        sums.append(log_probabilities[learned].gather(1, labels[1:][learned][:, None]).sum())
        counts.append(int(learned.sum()))
    return torch.stack(sums), torch.tensor(counts)


def stepper_of(
    settings: Any, store: SampleStore, model: Yuan2ForCausalLM, packing: bool
) -> PreferenceStepper:
    engine = SimpleNamespace(module=model, eval=model.eval, train=model.train)
    return PreferenceStepper(
        engine=engine,
        store=store,
        device=torch.device("cpu"),
        micro_batch_size=8,
        accumulation_steps=1,
        pad_id=0,
        max_length=192,
        max_grad_norm=1.0,
        packing=packing,
        settings=settings,
    )


def gradients(model: Yuan2ForCausalLM) -> dict[str, torch.Tensor]:
    return {name: item.grad.clone() for name, item in model.named_parameters() if item.grad is not None}


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "a-pair-a-row"])
@pytest.mark.parametrize(
    "settings",
    [DPO(), DPO(beta=0.4, label_smoothing=0.2), ORPO(beta=0.3), KTO(beta=0.5, undesirable_weight=1.5)],
    ids=["dpo", "smoothed", "orpo", "kto"],
)
@pytest.mark.usefixtures("group")
def test_loss_and_gradients_are_those_of_the_paper(
    settings: Any, packing: bool, directory: Path, tokenizer: Yuan2Tokenizer, tmp_path: Path
) -> None:
    model = load_model(directory, dtype=torch.float32)
    torch.manual_seed(5)
    with torch.no_grad():
        for item in model.parameters():
            item.add_(torch.randn_like(item) * 0.02)
    objective = Objective.model_validate({type(settings).__name__.lower(): settings})
    records = singles() if objective.kto is not None else pairs(COUNT)
    store = store_of(records, objective, tokenizer, tmp_path)
    stepper = stepper_of(settings, store, model, packing)
    with torch.no_grad():
        reference, _ = one_by_one(load_model(directory, dtype=torch.float32), store)
    reference[torch.from_numpy(store.marks == MISMATCHED)] -= 2  # so that KTO finds that the model has moved
    stepper.reference.values = reference.numpy()
    batch = np.arange(len(store))

    policy, counts = one_by_one(model, store)
    if isinstance(settings, KTO):
        others = torch.from_numpy(store.marks == MISMATCHED)
        kl = max(0.0, float((policy - reference)[others].mean().detach()))
        good = torch.from_numpy(store.marks == CHOSEN)[~others]
        expected = kto_of_the_paper(policy[~others], reference[~others], good, kl, settings)
    elif isinstance(settings, ORPO):
        expected = orpo_of_the_paper((policy / counts).view(-1, 2), settings.beta)
    else:
        both = policy.view(-1, 2), reference.view(-1, 2)
        expected = dpo_of_the_paper(*both, settings.beta, settings.label_smoothing)
    expected.backward()
    wanted = gradients(model)

    model.zero_grad(set_to_none=True)
    model.train()
    context = stepper.begin(batch)
    assert model.training
    found = sum(stepper.micro_sums(rows, context, model) for rows in stepper.cut(batch))
    assert isinstance(found, torch.Tensor)
    loss = found[0] / stepper.units(batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.usefixtures("group")
def test_a_row_holds_the_prompt_of_a_pair_once(
    directory: Path, tokenizer: Yuan2Tokenizer, tmp_path: Path
) -> None:
    store = store_of(pairs(COUNT), Objective(dpo=DPO()), tokenizer, tmp_path)
    stepper = stepper_of(DPO(), store, load_model(directory), True)
    computed, _ = stepper._work(np.arange(len(store)))
    assert computed < int(store.lengths.sum())
    assert store.marks.tolist() == [CHOSEN, REJECTED] * COUNT


FACTORY = {"conversations": [{"from": "human", "value": "Hi"}]}
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    (
        "factory",
        {**FACTORY, "chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"}},
    ),
    ("alpaca", {"instruction": "Hi", "system": " ", "input": "", "chosen": "yes", "rejected": "no"}),
    ("trl", {"prompt": "Hi", "chosen": "yes", "rejected": "no"}),
    (
        "trl-messages",
        {
            "prompt": [{"role": "user", "content": "Hi"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        },
    ),
    (
        "trl-implicit",
        {
            name: [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
            for name, answer in (("chosen", "yes"), ("rejected", "no"))
        },
    ),
    (
        "openai",
        {
            "messages": [{"role": "user", "content": "Hi"}],
            "chosen": {"role": "assistant", "content": "yes"},
            "rejected": "no",
        },
    ),
]


@pytest.mark.parametrize("record", [item[1] for item in LAYOUTS], ids=[item[0] for item in LAYOUTS])
def test_a_pair_is_read_from_every_layout(
    record: dict[str, Any], tokenizer: Yuan2Tokenizer, tmp_path: Path
) -> None:
    store = store_of([record], Objective(orpo=ORPO()), tokenizer, tmp_path)
    texts = [tokenizer.decode(store.tokens_of(index).tolist()).strip() for index in range(2)]
    assert texts == ["Hi<sep>yes<eod>", "Hi<sep>no<eod>"]


MARKED: list[tuple[str, dict[str, Any]]] = [
    (
        "factory",
        {"conversations": [*FACTORY["conversations"], {"from": "gpt", "value": "yes"}], "kto_tag": True},
    ),
    ("alpaca", {"instruction": "Hi", "system": " ", "output": "yes", "kto_tag": True}),
    ("trl", {"prompt": "Hi", "completion": "yes", "label": True}),
    (
        "openai",
        {
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}],
            "label": True,
        },
    ),
]


@pytest.mark.parametrize("record", [item[1] for item in MARKED], ids=[item[0] for item in MARKED])
def test_a_marked_answer_comes_with_one_to_another_question(
    record: dict[str, Any], tokenizer: Yuan2Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "other.json").write_text(json.dumps([{"prompt": "Bye", "completion": "so", "label": False}]))
    files = [{"path": "data.json"}, {"path": "other.json"}]
    (tmp_path / "data.json").write_text(json.dumps([record]))
    location = DatasetLocation.model_validate({"path": str(tmp_path), "files": files})
    objective = Objective(kto=KTO())
    prepare(location, Training(), tokenizer, tmp_path / "store", lambda: None, None, objective)
    store = SampleStore.open(tmp_path / "store")
    texts = [tokenizer.decode(store.tokens_of(index).tolist()).strip() for index in range(4)]
    assert texts == ["Hi<sep>yes<eod>", "Hi<sep>so<eod>", "Bye<sep>so<eod>", "Bye<sep>yes<eod>"]
    assert store.marks.tolist() == [CHOSEN, MISMATCHED, REJECTED, MISMATCHED]


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_of_the_page_is_read(line: str, tokenizer: Yuan2Tokenizer, tmp_path: Path) -> None:
    objective = Objective(dpo=DPO()) if "chosen" in line else Objective(kto=KTO())
    assert len(store_of([json.loads(line)], objective, tokenizer, tmp_path)) == 2


@pytest.mark.parametrize(
    ("record", "objective", "problem"),
    [
        ({"prompt": "a", "chosen": "b"}, {"dpo": {}}, "rejected: missing"),
        ({"prompt": "a", "completion": "b"}, {"dpo": {}}, "chosen: missing; or label"),
        ({"prompt": "a", "completion": "b", "label": 1}, {"kto": {}}, "label: must be true or false"),
        (
            {"prompt": "a", "completion": "b", "label": True},
            {"dpo": {}},
            "objective.dpo and objective.orpo compare",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, {"dpo": {}}, "rejected: empty answer"),
        ({"text": "a"}, {"orpo": {}}, "format: text has no answers to compare"),
        (
            {**FACTORY, "chosen": {"from": "human", "value": "b"}, "rejected": "c"},
            {"dpo": {}},
            "chosen: must be",
        ),
    ],
)
def test_what_cannot_be_compared_is_named(
    record: dict[str, Any], objective: Any, problem: str, tokenizer: Yuan2Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match=r"data\.json") as caught:
        store_of([record], Objective.model_validate(objective), tokenizer, tmp_path)
    assert problem in str(caught.value)
