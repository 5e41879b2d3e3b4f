"""What PEFT, transformers and mixed precision do with the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from yuan2_model import Yuan2ForCausalLM, random_model
from yuan2_model.layers import RMSNorm

from .conftest import make_config

pytestmark = pytest.mark.numbers


def gradients(model: Yuan2ForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("documents", [True, False])
def test_checkpointed_gradients_are_the_plain_ones(
    model: Yuan2ForCausalLM, sequences: list[Tensor], reentrant: bool, documents: bool
) -> None:
    ids = torch.cat(sequences)[None]
    document_ids = (torch.arange(ids.shape[1])[None] > 12).long() if documents else None
    model.train()
    results = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(input_ids=ids, labels=ids, document_ids=document_ids).loss.backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(results[0], results[1])


def test_padding_index_gets_gradient_from_the_head_only(model: Yuan2ForCausalLM) -> None:
    untied = random_model(make_config(tie_word_embeddings=False), seed=1)
    ids = torch.tensor([[3, 90, 5, 90, 7]])
    assert not gradients(untied, ids)["model.embed_tokens.weight"][90].any()
    assert gradients(untied, ids)["lm_head.weight"][90].any()
    assert gradients(model, ids)["model.embed_tokens.weight"][90].any()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_bf16_logits_stay_near_fp32(sequences: list[Tensor]) -> None:
    """fp32 norms and an fp32 softmax keep a bf16 model within a few of its roundings of the exact one."""
    config = make_config(num_hidden_layers=4, initializer_range=0.1)
    exact, rounded = random_model(config, seed=1), random_model(config, seed=1, dtype=torch.bfloat16)
    exact.load_state_dict(rounded.state_dict())
    ids = torch.cat(sequences)[None]
    with torch.no_grad():
        wanted, found = exact(input_ids=ids).logits, rounded(input_ids=ids).logits
    assert found.dtype == torch.bfloat16
    assert float((found.float() - wanted).norm() / wanted.norm()) < 0.02


def test_bf16_cached_decoding_stays_near_one_call(sequences: list[Tensor]) -> None:
    model = random_model(make_config(initializer_range=0.1), seed=1, dtype=torch.bfloat16)
    ids = sequences[2][None]
    with torch.no_grad():
        whole = model(input_ids=ids).logits.float()
        cache, steps = None, []
        for token in ids.split(1, dim=1):
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits.float())
    assert float((torch.cat(steps, 1) - whole).norm() / whole.norm()) < 0.02


def test_positions_given_are_obeyed(model: Yuan2ForCausalLM, sequences: list[Tensor]) -> None:
    """Rotary attention sees only distances: a shift of all positions changes nothing, a stretch does."""
    ids = sequences[0][None]
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        plain, shifted, stretched = (
            model(input_ids=ids, position_ids=p).logits for p in (positions, positions + 40, positions * 2)
        )
    torch.testing.assert_close(shifted, plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(stretched, plain, atol=1e-2)


def test_hidden_states_are_the_layers_inputs_and_the_normed_output(
    model: Yuan2ForCausalLM, sequences: list[Tensor]
) -> None:
    ids = sequences[0][None]
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    torch.testing.assert_close(states[0], model.get_input_embeddings()(ids))
    torch.testing.assert_close(model.lm_head(states[-1]), model(input_ids=ids).logits)


def test_tuple_output_on_request(model: Yuan2ForCausalLM, sequences: list[Tensor]) -> None:
    ids = sequences[0][None]
    loss, logits, *_ = model(input_ids=ids, labels=ids, return_dict=False)
    output = model(input_ids=ids, labels=ids)
    torch.testing.assert_close((loss, logits), (output.loss, output.logits))


def test_odd_number_of_heads_splits_the_middle_head_between_q_and_k_projection() -> None:
    model = random_model(make_config(hidden_size=24, num_attention_heads=3), seed=1)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        torch.testing.assert_close(
            model(input_ids=ids[:, 5:], past_key_values=cache).logits, whole[:, 5:], atol=1e-5, rtol=1e-5
        )


def test_norm_gradients_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16).requires_grad_()
    grad = torch.randn(2, 3, 16)
    norm = RMSNorm(16, 0.1)
    torch.nn.init.normal_(norm.weight)
    wanted = norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1)
    torch.testing.assert_close(norm(x), wanted)
    torch.testing.assert_close(
        torch.autograd.grad(norm(x), (x, norm.weight), grad),
        torch.autograd.grad(wanted, (x, norm.weight), grad),
        atol=1e-5,
        rtol=1e-5,
    )


class TestPeft:
    """LoRA through PEFT, on the default targets."""

    def wrapped(self, model: Yuan2ForCausalLM) -> object:
        import peft

        config = peft.LoraConfig(
            r=2,
            lora_alpha=16,
            target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        )
        torch.manual_seed(0)
        return peft.get_peft_model(model, config)

    @pytest.mark.parametrize("reentrant", [None, True, False])
    def test_adapters_alone_are_trained(
        self, model: Yuan2ForCausalLM, sequences: list[Tensor], reentrant: bool | None
    ) -> None:
        wrapped = self.wrapped(model)
        wrapped.train()
        if reentrant is not None:
            wrapped.gradient_checkpointing_enable({"use_reentrant": reentrant})
            wrapped.enable_input_require_grads()
        ids = sequences[2][None]
        wrapped(input_ids=ids, labels=ids, return_logits=False).loss.backward()
        trained = {name for name, p in wrapped.named_parameters() if p.grad is not None and p.grad.any()}
        layers = model.config.num_hidden_layers
        assert len(trained) == layers * 2 * 2
        assert all("lora_" in name for name in trained)

    def test_merged_model_is_the_wrapped_one(self, model: Yuan2ForCausalLM, sequences: list[Tensor]) -> None:
        ids = sequences[2][None]
        with torch.no_grad():
            base = model(input_ids=ids).logits
            wrapped = self.wrapped(model).eval()
            adapted = wrapped(input_ids=ids).logits
            generated = wrapped.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
            merged = wrapped.merge_and_unload()
            torch.testing.assert_close(merged(input_ids=ids).logits, adapted, atol=1e-4, rtol=1e-4)
        assert generated.shape == (1, ids.shape[1] + 3)
        assert not torch.allclose(base, adapted, atol=1e-3)
