"""An unmodified vLLM in this process, with the plugin `yuan2_vllm`. Nothing else here imports vLLM."""
