"""What options that several commands share say of themselves."""

SOURCE = "A GGUF, an HF model folder, or a Hub name: user/repo, user/repo:Q4_K_M, hf://user/repo@rev/file.gguf."
OVERRIDE = "KEY=VALUE: a fact of config.json that the source lost or has wrong. (again)"
CHAT_TEMPLATE = "A Jinja file, or chatml, gemma, llama-2, llama-3, mistral, mistral-v3, phi-3."
