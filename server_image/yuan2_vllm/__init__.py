"""Yuan 2.0 as a plugin of an unmodified vLLM: `pip install yuan2-vllm`, then `vllm serve DIRECTORY`.

vLLM calls `register` through the entry point `vllm.general_plugins`, in each of its processes. The package
imports nothing of Yuan2 on Kubernetes and runs no code of the model directory.
"""


def register() -> None:
    """Tell transformers and vLLM about Yuan 2.0: configuration, tokenizer, model. Safe to call twice."""
    from vllm import ModelRegistry

    from yuan2_vllm import internals
    from yuan2_vllm.config import register_config

    register_config()
    ModelRegistry.register_model("YuanForCausalLM", "yuan2_vllm.model:Yuan2ForCausalLM")
    internals.install()
